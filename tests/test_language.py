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


# Errors of users. A test below checks that the list is complete.
ERRORS = {
    "UserError", "TooFewResults", "LimitExceeded", "BudgetSpent", "EvaluationFailed",
    "ServerRefused",
}  # fmt: skip

# Modules whose errors say what is wrong in a row; other messages name the row, and the advice.
PARTS_OF_SENTENCES = {
    "alignment/records.py", "alignment/data/dataset_schemas.py", "alignment/data/messages.py",
    "alignment/data/people_labels.py", "alignment/data/preference_rows.py",
    "alignment/data/response_rows.py", "alignment/monitors/detector_quality.py",
}  # fmt: skip

# What to do is a separate sentence, not an appendix such as "…: choose a multiple of 4".
APPENDED_ADVICE = re.compile(
    r"[:;] ((?:add|annotate|check|choose|copy|free|give|install|leave|lower|make|name|pass|raise"
    r"|read|remove|repeat|restore|run|save|see|set|split|start|state|train|use|write)\b"
    r"(?! is\b)|\{_?(?:advice|fix)\b[^}]*\})",
    re.IGNORECASE,
)


def error_messages(file: Path) -> Iterator[ast.expr]:
    """Yield the expressions of the error messages that users see."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ERRORS and node.args:
                yield node.args[0]


def messages(file: Path) -> Iterator[str]:
    """Yield the literal parts of the error messages that users see."""
    for message in error_messages(file):
        for part in ast.walk(message):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def as_text(node: ast.expr) -> str:
    """Return the text of a message, with its values in braces as they are in the code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(as_text, node.values))
    if isinstance(node, ast.BinOp):
        return as_text(node.left) + as_text(node.right)
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def is_sentence(message: str) -> bool:
    """Return whether a message ends like a sentence, and gives advice in a separate sentence."""
    return message.rstrip(")")[-1:] in ".?}" and not APPENDED_ADVICE.search(message)


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


def test_errors_are_sentences_with_the_advice_last() -> None:
    roots = ("megatron_ext", "alignment", "tools", "examples")
    files = [ROOT / "pretrain_et.py", *(f for root in roots for f in (ROOT / root).rglob("*.py"))]
    wrong = [
        (name, text)
        for file in files
        if (name := str(file.relative_to(ROOT))) not in PARTS_OF_SENTENCES
        for text in map(as_text, error_messages(file))
        if not is_sentence(text)
    ]
    assert wrong == []


def test_appended_advice_is_detected() -> None:
    assert is_sentence("--a 3 is not a multiple of --b 2. Choose a multiple of 2.")
    assert is_sentence("{file} cannot be read: {error}") and is_sentence("--a is unknown. {advice}")
    assert is_sentence("{file} has no rows. (Set expected_score: false.)")
    for text in ("3 is odd: choose 2.", "3 is odd; use 2.", "3 is odd: {advice}", "3 is odd"):
        assert not is_sentence(text)


def test_every_error_of_users_is_checked() -> None:
    classes: dict[str, set[str]] = {}
    for root in ("megatron_ext", "alignment", "tools", "examples"):
        for file in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    classes[node.name] = {ast.unparse(base) for base in node.bases}
    errors = {"UserError"}
    while more := {name for name, bases in classes.items() if bases & errors} - errors:
        errors |= more
    # The last two make their messages themselves.
    assert errors == {*ERRORS, "MalformedRow", "AmbiguousColumns"}


def test_pages_have_no_banned_word() -> None:
    assert with_banned_words([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], prose) == []


def test_banned_words_count_outside_of_code_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Nobody\nwants it. `found`\n```\nmine\n```\nThe log tells why.\n")
    assert [line for line in prose(page) if BANNED.search(line)] == [
        "wants it. ",
        "The log tells why.",
    ]
