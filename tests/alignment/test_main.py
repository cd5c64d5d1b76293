"""The command line of alignment."""

import subprocess
import sys

import pytest

from alignment.__main__ import COMMANDS, main
from megatron_ext.errors import UserError


def test_help_names_every_tool_and_imports_no_torch() -> None:
    check = "import sys; from alignment.__main__ import main; main(['--help']); "
    check += "from alignment.commands import data; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_an_unknown_tool_is_told_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="no tool 'dta': known are data"):
        main(["dta"])
    run = [sys.executable, "-m", "alignment", "dta"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("et-align: there is no tool 'dta'")
    assert done.stderr.count("\n") == 1
