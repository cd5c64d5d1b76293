"""Tests of the language of help texts, messages, docstrings, comments and pages.

The rules are those of CONTRIBUTING.md.
"""

import argparse
import ast
import importlib
import inspect
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from alignment.__main__ import COMMANDS
from alignment.commands.data_config import SUBCOMMANDS
from megatron_ext import devices
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser
from tests.distributed import ROOT

# Words that our texts avoid: participles in place of nouns and verbs, and idioms.
BANNED = re.compile(
    r"\b(told|found|asked|given|kept(?!-logits)|wanted|held(?!-out)|seen|said|mine|beside"
    r"|mends?|mended|mending|gets? on|goes on|go on|see that|tells|wants|of its own|no place with"
    r"|for ever)\b",
    re.IGNORECASE,
)

# What a help text says when its placeholder is a quantity.
UNITS = {
    "S": "second", "SECONDS": "second", "MINUTES": "minute", "HOURS": "hour", "DAYS": "day",
    "BYTES": "byte", "KB": "kB", "MB": "MB", "MIB": "MiB", "GB": "GB", "GIB": "GiB",
    "TOKENS": "token", "STEPS": "step", "RANKS": "rank", "CHARACTERS": "character",
    "TFLOPS": "TFLOP/s", "DOLLARS": "dollar",
}  # fmt: skip


def modules_with_parsers() -> list[str]:
    """Return the modules and the commands of et-align that parse a command line."""
    files = [
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("examples/**/*.py"),
    ]
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if re.search(r"^def main\(", text := file.read_text(), re.MULTILINE)
        and re.search(r"Parser\(|typed_flags", text)
    ]
    data = [f"et-align data {name}" for name in SUBCOMMANDS]
    return sorted([*names, *data, *(f"et-align {name}" for name in COMMANDS if name != "data")])


class _Parsed(BaseException):
    """Exception that interrupts a command at the parsing of its arguments."""


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Return the parser with which the module's `main` reads its arguments."""
    parsers = []

    def intercept(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parsers.append(parser)
        raise _Parsed

    def activate_if_possible(**settings: bool) -> str:
        try:
            return activate(**settings)
        except RuntimeError:  # another test of this process has imported Megatron before
            return "cpu"

    monkeypatch.setattr(devices, "activate", activate_if_possible)
    name, *words = module.split()
    main = importlib.import_module("alignment.__main__" if words else name).main
    monkeypatch.setattr("sys.argv", [module])
    for kind in (ToolParser, argparse.ArgumentParser):
        monkeypatch.setattr(kind, "parse_known_args", intercept)
    with pytest.raises(_Parsed):
        main(*[words for _ in inspect.signature(main).parameters])
    return parsers[0]


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action._choices_actions
            for subparser in dict.fromkeys(action.choices.values()):
                yield from actions(subparser)
        elif not isinstance(action, argparse._HelpAction):
            yield action


def complaints(action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    """Return the faults of the help text of an argument."""
    name = "/".join(action.option_strings) or str(action.metavar or action.dest)
    if action.help == argparse.SUPPRESS:
        return []
    if not action.help:
        return [f"{name} has no help text"]
    text = parser._get_formatter()._expand_help(action)
    results = []
    if not (text[0].isupper() and text.endswith(".")):
        results.append(f"{name}: not a sentence: {text!r}")
    if words := BANNED.findall(text):
        results.append(f"{name}: banned words {words}: {text!r}")
    metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    for unit in filter(None, (UNITS.get(str(metavar)) for metavar in metavars)):
        if unit not in text:
            results.append(f"{name}: the unit is missing ({unit}): {text!r}")
    has_default = not isinstance(action.default, bool) and action.default not in (
        None, argparse.SUPPRESS, "", [], (), {},
    )  # fmt: skip
    is_optional = action.option_strings and not action.required and action.nargs != 0
    if has_default and is_optional and not re.search(r"Default(:|s to)", text):
        results.append(f"{name}: the default ({action.default}) is missing: {text!r}")
    return results


@pytest.mark.parametrize("module", modules_with_parsers())
def test_help_texts_are_complete_sentences(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(module, monkeypatch)
    assert [text for action in actions(parser) for text in complaints(action, parser)] == []


def test_help_texts_of_pretraining_are_complete_sentences() -> None:
    from megatron_ext.run_flags import add_arguments

    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    assert [text for action in actions(parser) for text in complaints(action, parser)] == []


def messages(file: Path) -> Iterator[str]:
    """Yield the literal parts of the error messages that users see."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("UserError", "TooFewResults"):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def docstrings(file: Path) -> Iterator[str]:
    """Yield the sentences of the docstrings of a file: their lines without examples and code."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = re.sub(
                r"^    .*--.*|^    \w+: \w+$", "", ast.get_docstring(node) or "", flags=re.M
            )
            yield from re.sub(r"`[^`]*`|\"[^\"]*\"", "", text).split("\n")


def comments(file: Path) -> Iterator[str]:
    """Yield the comments of a file."""
    with file.open() as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.COMMENT:
                yield re.sub(r"`[^`]*`|\"[^\"]*\"", "", token.string)


def prose(page: Path) -> Iterator[str]:
    """Yield the lines of a Markdown page without its blocks and spans of code."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.sub(r"`[^`]*`", "", text).split("\n")


def with_banned_words(
    files: Iterable[Path], texts: Callable[[Path], Iterator[str]]
) -> list[tuple[str, str]]:
    """Return the texts of files that have a banned word, with the names of the files."""
    return [
        (str(file.relative_to(ROOT)), text)
        for file in sorted(files)
        for text in texts(file)
        if BANNED.search(text)
    ]


@pytest.mark.parametrize("texts", [messages, docstrings, comments])
def test_texts_of_the_code_have_no_banned_word(texts: Callable[[Path], Iterator[str]]) -> None:
    roots = ("megatron_ext", "alignment", "tools", "examples", "benchmarks", "tests")
    files = [ROOT / "pretrain_et.py", *(f for root in roots for f in (ROOT / root).rglob("*.py"))]
    assert with_banned_words(files, texts) == []


def test_pages_have_no_banned_word() -> None:
    assert with_banned_words([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], prose) == []


def test_banned_words_count_outside_of_code_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Nobody\nwants it. `found`\n```\nmine\n```\nThe log tells why.\n")
    assert [line for line in prose(page) if BANNED.search(line)] == [
        "wants it. ",
        "The log tells why.",
    ]
