"""Tests that the programs print the messages that the troubleshooting page quotes."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_ranks

PAGE = (ROOT / "docs/how-to/troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)
DIFFERS = "\0"  # stands in a message for what differs from case to case


def messages() -> Iterator[str]:
    """Return every text in the code, with `DIFFERS` for values, and whole shell scripts."""
    folders = [ROOT / name for name in ("megatron_ext", "alignment", "tools", "examples")]
    for path in [file for folder in folders for file in folder.rglob("*") if file.is_file()]:
        if path.suffix in (".sh", ".sbatch"):
            script = re.sub(r"\\?\n\s*|\" +\"", " ", path.read_text())
            yield re.sub(r"\$\{?\w+\}?", DIFFERS, script)
        elif path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        p.value if isinstance(p, ast.Constant) else DIFFERS for p in node.values
                    ]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


MESSAGES = list(messages())


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_in_the_code(quoted: str) -> None:
    fixed = [re.escape(part.strip()) for part in quoted.split("…") if part.strip()]
    assert sum(map(len, fixed)) > 15
    pattern = re.compile(f"[^{DIFFERS}]*?{DIFFERS}.*?".join(fixed))
    assert any(pattern.search(message) for message in MESSAGES), quoted


def test_troubleshooting_quotes_frequent_messages() -> None:
    assert len(QUOTED) >= 25
    assert len(set(QUOTED)) == len(QUOTED)


def commands() -> list[tuple[str, str]]:
    """Return the commands of the page and the line that each prints."""
    [block] = re.findall(r"^```console\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^\$ python (.+)\n(.+)$", block.replace("\\\n", " "), re.MULTILINE)


def quotable(line: str) -> str:
    """Return, on a rank, the end of a command's stderr."""
    sys.argv = shlex.split(line)
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert end.value.code == 2, stderr.getvalue()
    return stderr.getvalue().splitlines()[-1]


@pytest.mark.slow
def test_commands_print_the_messages_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = commands()
    assert len(pairs) >= 5
    monkeypatch.chdir(ROOT)
    for command, line in pairs:  # each on a separate rank: Megatron parses flags once
        assert run_ranks(quotable, 1, command) == [line]
