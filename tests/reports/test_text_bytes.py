"""Tests of the losses of runs with different tokenizers, in bits per byte."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.reports.comparison.compared_runs import group_runs, loss_unit, read_runs
from megatron_ext.reports.comparison.final_metrics import metrics_table
from megatron_ext.reports.comparison.text_bytes import bytes_per_token
from tests.reports.test_comparison import make_run
from tools import report


def make_dataset(folder: Path, train: tuple[int, int], valid: tuple[int, int]) -> dict[str, Any]:
    """Write the manifest of a dataset with bytes and tokens, and return settings that name it."""
    folder.mkdir(exist_ok=True)
    counts = {
        split: {"documents": 3, "bytes": of[0], "tokens": of[1]}
        for split, of in (("train", train), ("valid", valid))
    }
    (folder / "news.json").write_text(json.dumps({"splits": counts}))
    prefixes = {split: [str(folder / f"news_{split}_text_document")] for split in counts}
    return {f"{split}_data_path": paths for split, paths in prefixes.items()}


def test_bytes_per_token_of_several_datasets_are_those_of_the_tokens_of_the_run(
    tmp_path: Path,
) -> None:
    one = make_dataset(tmp_path / "a", (400, 100), (90, 30))
    other = make_dataset(tmp_path / "b", (600, 300), (10, 10))
    assert bytes_per_token(one, "train") == 4 and bytes_per_token(one, "valid") == 3
    [first], [second] = one["train_data_path"], other["train_data_path"]
    # Without weights each dataset is read once, of 4 and 2 bytes per token.
    assert bytes_per_token({"train_data_path": [first, second]}, "train") == 1000 / 400
    weighted = {"train_data_path": ["9", first, "1", second]}
    assert bytes_per_token(weighted, "train") == pytest.approx(0.9 * 4 + 0.1 * 2)
    assert bytes_per_token({"train_data_path": ["9", first, second]}, "train") is None
    assert bytes_per_token({}, "train") is None
    assert bytes_per_token({"train_data_path": [str(tmp_path / "none_train")]}, "train") is None


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    small = make_dataset(tmp_path / "small", (400, 200), (100, 50))  # 2 bytes per token
    large = make_dataset(tmp_path / "large", (800, 200), (160, 40))  # 4 bytes per token
    paths = [
        make_run(tmp_path / "a", tokenizer_sha256="a", **small),
        make_run(tmp_path / "b", tokenizer_sha256="b", **large),
    ]
    runs = read_runs(paths)
    assert loss_unit(runs) == "bits per byte"
    table = {label: cells for label, *cells in metrics_table(group_runs(runs))}
    nats = 5 - 0.4 + 0.1
    expected = [f"{nats / math.log(2) / of_bytes:.4f}" for of_bytes in (2, 4)]
    assert table["final validation loss, bits per byte"] == expected
    assert not any("all have it" in label for label in table)
    ratio = [float(cell) for cell in table["training loss, last tenth, bits per byte"]]
    assert ratio[0] == pytest.approx(2 * ratio[1], abs=1e-3)
    report.main([*paths, "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "The tokenizers differ: losses are in bits per byte of text" in page
    assert "nats per token" not in page


def test_unknown_bytes_of_text_are_stated(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, tokenizer_sha256=name) for name in "ab"]
    report.main([*paths, "--markdown", str(tmp_path / "c.md")])
    markdown = (tmp_path / "c.md").read_text()
    assert "losses in nats per token cannot be compared between runs" in markdown
    assert "final validation loss, nats per token" in markdown


def test_runs_with_one_tokenizer_are_compared_in_nats_per_token(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", (400, 200), (100, 50))
    paths = [make_run(tmp_path / name, lr=lr, **data) for name, lr in (("a", 1), ("b", 2))]
    assert loss_unit(read_runs(paths)) == "nats per token"
