"""Tests of the list of flags that is checked before Megatron is imported.

`python -m tests.test_flag_names` writes the list of the installed version.
"""

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_ext import flag_names
from megatron_ext.errors import UserError
from megatron_ext.recipes import check_flag_names, find_recipe
from tests.distributed import ROOT

_PRINT = """
import json
from argparse import ArgumentParser
from megatron_ext.devices import activate
activate(use_cuda=False)
from megatron.training.arguments import add_megatron_arguments
from megatron_ext.run_flags import add_arguments
parser = add_arguments(add_megatron_arguments(ArgumentParser()))
names = {action.dest for action in parser._actions}
print(json.dumps([sorted(parser._option_string_actions), sorted(names)]))
"""


def _names_of_parser() -> tuple[list[str], list[str]]:
    """Return the flags of `pretrain_et.py`, and names of arguments that differ from their flag."""
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PRINT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    flags, names = json.loads(output.splitlines()[-1])
    return flags, [name for name in names if "--" + name.replace("_", "-") not in flags]


@pytest.mark.slow
def test_flags_equal_those_of_the_parser():
    flags, names = _names_of_parser()
    hint = "run python -m tests.test_flag_names"
    assert sorted(flag_names.FLAGS) == flags and sorted(flag_names.NAMES) == names, hint
    assert version("megatron-core") == flag_names.MEGATRON_VERSION, hint


def test_misspelled_flag_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"--train-itres is not a flag .* mean --train-iters\?"):
        check_flag_names(["--train-itres", "3"])
    check_flag_names(["--train-iters=3", "--lr", "-1", "--moe-layer-freq", "[0]+[1]*3"])


def test_misspelled_key_is_answered_with_the_nearest(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_itres: 3\n")
    with pytest.raises(UserError, match=r"train_itres is not a flag .* mean train_iters\?"):
        check_flag_names(["--recipe", str(recipe)])
    recipe.write_text("train_iters: null\nbias_swiglu_fusion: false\n")
    check_flag_names([f"--recipe={recipe}"])


def test_shipped_recipes_have_only_flags_of_the_parser():
    for path in (ROOT / "examples" / "recipes").rglob("*.yaml"):
        check_flag_names(["--recipe", str(path)])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("quickstart", "recipes/quickstart.yaml"),
        ("recipes/d12.yaml", "recipes/d12.yaml"),
        ("examples/recipes/d12.yaml", "recipes/d12.yaml"),
        ("judges/pairwise", "alignment/judges/pairwise.yaml"),
        ("alignment/policies/kl.yaml", "alignment/policies/kl.yaml"),
    ],
)
def test_shipped_recipe_is_named_without_its_folder(
    name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == ROOT / "examples" / path


def test_unknown_recipe_is_answered_with_near_names():
    with pytest.raises(UserError, match=r"quikstart: No such .* mean recipes/quickstart.yaml\?"):
        find_recipe("quikstart")


def test_flag_names_are_checked_without_torch():
    code = "import megatron_ext.recipes, sys; assert not {'torch', 'megatron'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _write() -> None:
    flags, names = _names_of_parser()
    lists = {
        "FLAGS": (flags, "Flags of `pretrain_et.py`."),
        "NAMES": (names, "Names of arguments without a flag of that name."),
    }
    text = '"""Flags of `pretrain_et.py`, written by `python -m tests.test_flag_names`."""\n'
    text += f'\nMEGATRON_VERSION = "{version("megatron-core")}"\n'
    for name, (values, doc) in lists.items():
        quoted = ", ".join(f'"{value}"' for value in values)
        lines = textwrap.wrap(quoted, 94, break_on_hyphens=False, break_long_words=False)
        body = "".join(f"    {line}\n" for line in lines)
        text += f'\n{name} = frozenset((\n{body.rstrip()},\n))  # fmt: skip\n"""{doc}"""\n'
    (ROOT / "megatron_ext" / "flag_names.py").write_text(text)


if __name__ == "__main__":
    _write()
