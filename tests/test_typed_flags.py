"""Tests of command lines described by dataclasses: help, values, groups, errors, recipes."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megatron_ext.errors import UserError
from megatron_ext.typed_flags import (
    build_parser,
    flag,
    flag_values,
    flags_of,
    group,
    may_change,
    must_match,
    parse_config,
)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimization."""

    lr: float = must_match(1e-3, above=0)
    """Peak learning rate."""
    recipe: str | None = may_change(None)
    """YAML file of flags. Default: none."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of a command."""

    study: str = flag(positional=True, metavar="STUDY")
    """Folder of a study."""
    files: tuple[str, ...] = flag((), metavar="FILE")
    """Files to read."""
    judge: tuple[str, ...] = flag((), repeat=True)
    """Judge. Can be given several times."""
    scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest score. Default: 0 9."""
    mode: Literal["fast", "exact"] = flag("fast")
    """Mode."""
    steps: int = flag(metavar="N", at_least=1)
    """Number of steps."""
    share: float = flag(0.5, at_least=0, at_most=1)
    """Share of 100 % of the data."""
    dry_run: int | None = flag(None, value_if_bare=lambda: 8)
    """Print the memory for this many ranks. Default: run."""
    reference: bool = flag(True)
    """Do not load the reference."""
    overwrite: bool = flag(False)
    """Replace the output."""
    optimizer: Optimizer = group(lr=1e-6)


def parse(*words: str) -> Config:
    return parse_config(Config, words, "et-align train", "Train.")


def test_parsed_values_equal_fields_and_groups() -> None:
    config = parse("here", "--steps", "3", "--judge", "a", "--judge", "b", "--files", "x", "y")
    assert (config.study, config.steps, config.judge) == ("here", 3, ("a", "b"))
    assert config.files == ("x", "y") and config.scale is None
    assert config.reference and not config.overwrite and config.dry_run is None
    assert config.optimizer.lr == 1e-6
    more = ("--scale", "0", "1", "--no-reference", "--overwrite", "--dry-run", "--lr", "0.1")
    values = flag_values(parse("here", "--steps", "3", *more))
    assert values["scale"] == (0, 1) and values["dry_run"] == 8 and values["lr"] == 0.1
    assert values["overwrite"] and not values["reference"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stps", "3"], "--stps is not a flag of train. Did you mean --steps?"),
        (["--zzz"], "--zzz is not a flag of train. See et-align train --help."),
        (["here"], "train requires --steps. See et-align train --help."),
        (["here", "--steps", "x"], "--steps x is not a whole number."),
        (["here", "--steps", "0"], "--steps 0 must be at least 1."),
        (["here", "--steps", "1", "--share", "nan"], "--share nan must be at least 0 and at most"),
        (["here", "--steps", "1", "--scale", "0", "inf"], "--scale inf must be a finite number."),
        (["here", "--steps", str(10**20)], f"--steps {10**20} must be at most {10**15}."),
        (["here", "--steps", "1", "--files", "a", ""], "--files is empty. Give a value, or leave"),
        (["", "--steps", "1"], "study is empty."),
        (["here", "--steps", "1", "--lr", "0"], "--lr 0.0 must be above 0."),
        (["here", "--steps"], "--steps requires one value. See et-align train --help."),
        (
            ["here", "--steps", "1", "--files", "a", "--files=b"],
            "--files is repeated. Write all values after one --files.",
        ),
        (["here", "--steps", "1", "--mode", "slow"], "--mode slow is not one of fast, exact."),
    ],
)
def test_parse_config_error_names_the_flag_and_the_fix(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value)


def test_help_is_the_docstring_with_the_default() -> None:
    helps = {each.dest: each.help for each in build_parser(Config, "train", None)._actions}
    assert helps["steps"] == "Number of steps."
    assert helps["share"] == "Share of 100 %% of the data. Default: 0.5."
    assert helps["lr"] == "Peak learning rate. Default: 1e-06."
    assert helps["scale"] == "Lowest and highest score. Default: 0 9."


def test_resume_marks_list_what_may_change() -> None:
    marks = {each.name: each.resume for each in flags_of(Config)}
    assert (marks["lr"], marks["recipe"], marks["steps"]) == ("must match", "may change", None)


def test_recipe_is_checked_against_the_fields_and_unset_by_null(tmp_path: Path) -> None:
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text("steps: 3\nlr: 0.5\n")
    recipe.write_text("base: base.yaml\nlr: null\n")
    config = parse("here", "--recipe", str(recipe))
    assert config.steps == 3 and config.optimizer.lr == 1e-6
    assert parse("here", "--recipe", str(recipe), "--steps", "4").steps == 4
    recipe.write_text("stepz: 3\n")
    with pytest.raises(UserError, match=r"stepz is not a flag .*[Dd]id you mean steps\?"):
        parse("here", "--recipe", str(recipe))


def test_configurations_of_commands_import_no_torch() -> None:
    check = (
        "import importlib, sys\n"
        "from alignment.__main__ import COMMANDS\n"
        "for name in COMMANDS:\n"
        "    importlib.import_module(f\"alignment.commands.{name.replace('-', '_')}_config\")\n"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True, kw_only=True)
class OptionalPlace:
    """Flags of a command with a value by place that may be left out."""

    first: str = flag(positional=True, metavar="FIRST")
    """First file."""
    second: str | None = flag(None, positional=True, metavar="SECOND")
    """Second file."""


def test_a_value_by_place_with_a_default_may_be_left_out() -> None:
    def parsed(*words: str) -> OptionalPlace:
        return parse_config(OptionalPlace, words, "et-align command", None)

    assert parsed("a") == OptionalPlace(first="a")
    assert parsed("a", "b") == OptionalPlace(first="a", second="b")
    with pytest.raises(UserError, match="requires FIRST"):
        parsed()
