"""What a resumed run keeps: every flag has a mark, and a model is known by its content."""

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignment.commands import train_judge as judge
from alignment.commands import train_policy as train
from alignment.commands import train_sft as sft
from alignment.training.run_settings import MARKS, lasting_settings, model_content


class Parsed(Exception):
    """Carries the names that a command's parser knows."""


@pytest.mark.parametrize("parse", [sft._parse, train.parse, judge.parse])
def test_every_flag_of_a_training_command_has_a_mark(
    parse: Callable[[Sequence[str]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed({action.dest for action in parser._actions} - {"help"})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", names)
    with pytest.raises(Parsed) as caught:
        parse([])
    assert caught.value.args[0] - MARKS.keys() == set(), "mark them in run_settings.MARKS"


def test_layout_and_precision_may_change_and_what_is_learned_may_not() -> None:
    options = argparse.Namespace(lr=1e-5, dtype="bf16", tensor_model_parallel_size=2, unknown=1)
    assert lasting_settings(options) == {"lr": 1e-5, "unknown": 1}


def make(folder: Path, seed: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = torch.randn(400, 1000, generator=torch.Generator().manual_seed(seed))
    save_file({"weight": weights}, folder / "model.safetensors")
    return folder


def test_a_model_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    first = make(tmp_path / "first", 1)
    moved = shutil.copytree(first, tmp_path / "moved", copy_function=shutil.copyfile)
    assert model_content(first) == model_content(moved)
    assert model_content(make(tmp_path / "other weights", 2)) != model_content(first)
    (moved / "config.json").write_text('{"rms_norm_eps": 0.1}')
    assert model_content(moved) != model_content(first)


def test_a_folder_without_a_model_has_no_content(tmp_path: Path) -> None:
    assert model_content(tmp_path) == ""
    options = argparse.Namespace(model=str(tmp_path), critic=None)
    assert lasting_settings(options)["model_content"] == ""
