"""Tests that blends, weights, splits and lengths of data are checked before anything is built."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.data.blend_words import parse_blend
from megatron_ext.errors import UserError
from megatron_ext.training import run_progress
from megatron_ext.training.blends import (
    blends,
    check_documents,
    check_enough_samples,
    check_mock_split,
)
from megatron_ext.training.run_progress import RunProgress


def run(**changes: Any) -> Namespace:
    usual: dict[str, Any] = {
        "data_path": None, "data_args_path": None, "train_data_path": None,
        "valid_data_path": None, "test_data_path": None, "per_split_data_args_path": None,
        "split": None, "eval_iters": 1, "full_validation": False, "skip_train": False,
        "mock_data": False, "seq_length": 16, "train_iters": 6, "train_samples": None,
        "global_batch_size": 4, "eval_global_batch_size": 4, "eval_interval": 100,
        "step_batch_size_schedule": None,
    }  # fmt: skip
    return Namespace(**usual | changes)


def dataset(path: Path, documents: int, length: int = 10) -> str:
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(np.arange(length), [length])
    builder.finalize(f"{path}.idx")
    return str(path)


def test_blend_weights_belong_to_the_datasets_after_them() -> None:
    assert parse_blend(["A"], "--data-path") == (["A"], None)
    assert parse_blend(["A", "B"], "--data-path") == (["A", "B"], None)
    assert parse_blend(["0.3", "A", "7", "B"], "--data-path") == (["A", "B"], [0.3, 7.0])


@pytest.mark.parametrize(
    "words, message",
    [
        ("0 A 1 B", "the weight 0 of A must be above 0"),
        ("1 A -2 B", "the weight -2 of B must be above 0"),
        ("nan A", "the weight nan of A must be above 0"),
        ("inf A", "the weight inf of A must be above 0"),
        ("0.5 A B", "B has no weight"),
        ("0.5 A B C", "B has no weight"),
        ("A 0.5", "A has no weight"),
        ("0.5 0.5 A B", "0.5 is a number where a dataset is expected"),
        ("0.5 A 0.5", "the weight 0.5 has no dataset"),
    ],
)
def test_blend_refuses_impossible_weights(words: str, message: str) -> None:
    with pytest.raises(UserError, match=r"--data-path: ") as caught:
        parse_blend(words.split(), "--data-path")
    assert message in str(caught.value)


def test_blend_accepts_a_dataset_named_like_a_number(tmp_path: Path) -> None:
    name = dataset(tmp_path / "7", 4)
    assert parse_blend([name], "--data-path") == ([name], None)


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "No data. Give --data-path"),
        ({"train_data_path": ["A"]}, "No validation data with --train-data-path alone"),
        ({"data_path": ["A"], "split": "100,0,0"}, "No validation data with --split 100,0,0"),
        ({"data_path": ["A"], "split": "100"}, "No validation data with --split 100"),
        ({"data_path": ["A"], "split": "0,1,0"}, "No training data"),
        ({"valid_data_path": ["A"]}, "No training data"),
        ({"data_path": ["A"], "split": "0,0,0"}, "--split 0,0,0 is invalid. Give the shares"),
        ({"data_path": ["A"], "split": "some"}, "--split some is invalid. Give the shares"),
        ({"data_path": ["A"], "split": "9,-1"}, "--split 9,-1 is invalid. Give the shares"),
        (
            {"train_data_path": ["A"], "valid_data_path": ["B"], "split": "9,1,0"},
            "Leave --split out",
        ),
        (
            {"data_path": ["A"], "split": "9,1,0", "train_data_path": ["A"]},
            "--data-path and --train-data-path both name training data",
        ),
        (
            {"train_data_path": ["A"], "valid_data_path": ["1", "B"], "full_validation": True},
            "--full-validation reads every dataset once",
        ),
        ({"data_args_path": "nowhere", "split": "9,1,0"}, "nowhere cannot be read"),
        ({"per_split_data_args_path": "nowhere"}, "nowhere cannot be read"),
    ],
)
def test_blend_refuses_data_without_training_documents(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        blends(run(**values))
    assert message in str(caught.value)


def test_blend_without_evaluation_requires_no_validation_data(tmp_path: Path) -> None:
    assert len(blends(run(train_data_path=["A"], eval_iters=0))) == 1
    assert len(blends(run(data_path=["A"], split="1", eval_iters=0))) == 1
    file = tmp_path / "splits.json"
    file.write_text('{"train": "1 A 2 B", "valid": ["C"], "test": null}')
    train, valid = blends(run(per_split_data_args_path=str(file)))
    assert (train.prefixes, train.weights, valid.prefixes) == (["A", "B"], [1.0, 2.0], ["C"])
    file.write_text('{"train": "A"}')
    with pytest.raises(UserError, match="must be a JSON object with train, valid and test"):
        blends(run(per_split_data_args_path=str(file)))


def test_mock_data_require_a_split_for_validation() -> None:
    check_mock_split(run(split="90,5,5"))
    check_mock_split(run())  # Megatron's own, of three parts
    with pytest.raises(UserError, match="No validation data with --split 1,0,0"):
        check_mock_split(run(split="1,0,0"))


def test_split_without_documents_is_refused(tmp_path: Path) -> None:
    prefix = dataset(tmp_path / "text", 20)
    args = run(data_path=[prefix], split="80,20,0")
    check_documents(blends(args), args)
    args.split = "969,30,1"  # of 20 documents, round(19.98) are before the test's
    with pytest.raises(UserError, match=r"--split 969,30,1 leaves 0 tokens .* for test"):
        check_documents(blends(args), args)


def test_blend_without_weights_must_hold_all_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_progress, "next_batch_size", lambda samples: 4)
    train = [dataset(tmp_path / name, 20) for name in "AB"]  # of 199 tokens, 12 samples each
    valid = [dataset(tmp_path / name, 4) for name in "CD"]  # 2 samples each
    args = run(train_data_path=train, valid_data_path=valid)
    monkeypatch.setattr(run_progress, "get_args", lambda: args)
    check_documents(blends(args), args)
    check_enough_samples(args, RunProgress())  # 24 and 4 samples
    args.eval_iters = 2
    with pytest.raises(UserError, match=r"their 4 samples are fewer than the 8 of validation"):
        check_enough_samples(args, RunProgress())
    args.valid_data_path = ["1", valid[0], "1", valid[1]]  # read as often as necessary
    check_enough_samples(args, RunProgress())
    args.train_iters = 7
    with pytest.raises(UserError, match=r"their 24 samples are fewer than the 28 of training"):
        check_enough_samples(args, RunProgress())
    # A resumed run counts its samples with the batch sizes of their steps.
    check_enough_samples(args, RunProgress(iteration=6, samples=12, history=[[0, 0], [6, 12]]))
