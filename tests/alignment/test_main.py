"""Tests of the command line of alignment."""

import subprocess
import sys

import pytest

from alignment.__main__ import COMMANDS, main
from megatron_ext.errors import UserError


def test_help_names_every_command_and_imports_no_torch() -> None:
    check = "import sys; from alignment.__main__ import main; main(['--help']); "
    check += "from alignment.commands import data; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_unknown_command_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"dta is not a command of et-align\. Did you mean data\?"):
        main(["dta"])
    with pytest.raises(UserError, match="Choose one of data, annotate, "):
        main(["xyz"])
    run = [sys.executable, "-m", "alignment", "dta"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("et-align: dta is not a command")
    assert done.stderr.count("\n") == 1
