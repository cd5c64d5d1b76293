"""recipe.yaml next to a converted checkpoint: the model of transformers at step 0, and training."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed import run_ranks
from tests.hf.models import add_tokenizer, make
from tests.pretraining import train

LENGTH, SAMPLES = 16, 12
IDS = np.random.default_rng(0).integers(0, 450, LENGTH * SAMPLES + 1)


def write_dataset(prefix):
    """Write one document, whose samples are consecutive windows."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_item(torch.from_numpy(IDS))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")


def convert(folder):
    """On a rank: convert the model and write a dataset."""
    from tools import convert_checkpoint

    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(folder / "first")])
    write_dataset(folder / "data")


def convert_with_thresholds(folder):
    """On a rank: add experts to the model, calibrate it, and bring it to Hugging Face and back."""
    from megatron_ext.checkpoint import find_checkpoint
    from megatron_ext.hf.recalibrate import use_thresholds, with_thresholds
    from megatron_ext.inference.calibration import calibrate
    from megatron_ext.inference.loading import load_model
    from tools import upcycle

    raw, ready = folder / "raw", folder / "first"
    upcycle.main(
        ["--load", str(folder / "hf"), "--save", str(raw), "--num-experts", "8"]
        + ["--granularity", "4", "--router-std", "1"]
    )
    cutoffs = calibrate(load_model(raw, with_thresholds=use_thresholds), torch.tensor([IDS[:60]]))
    ready.mkdir()
    with_thresholds(find_checkpoint(raw), ready, ready, cutoffs).write(lambda _: None)
    write_dataset(folder / "data")


def export(folder):
    """On a rank: convert the checkpoint to a Hugging Face folder."""
    from tools import convert_checkpoint

    flags = ["--from", "megatron", "--to", "hf", "--load", str(folder / "moved")]
    convert_checkpoint.main([*flags, "--save", str(folder / "exported")])


def loss_of_transformers(folder):
    """Return the mean loss of transformers over the samples of the dataset, nats per token."""
    from megatron_ext.hf.verify import hf_logits

    windows = np.stack([IDS[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(SAMPLES)])
    tokens = torch.from_numpy(windows)
    logits = hf_logits(folder, tokens[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()))


def flags(folder, run, *more):
    data = folder / "data"
    return [
        *("--recipe", folder / "moved" / "recipe.yaml", "--run-dir", folder / run),
        *("--train-data-path", data, "--valid-data-path", data),
        *("--eval-iters", "3", "--global-batch-size", "4", "--seq-length", str(LENGTH), *more),
    ]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "expert_threshold"])
def test_validation_loss_at_step_0_equals_that_of_transformers(name, tmp_path):
    """The tokenizer has fewer entries than the model rows, and the folder was moved."""
    own = name == "expert_threshold"
    make("llama-tied" if own else name, tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", 450)
    run_ranks(convert_with_thresholds if own else convert, 1, tmp_path)
    (tmp_path / "first").rename(tmp_path / "moved")
    if own:
        run_ranks(export, 1, tmp_path)
    shutil.rmtree(tmp_path / "hf", ignore_errors=own) if own else None
    train(flags(tmp_path, "run", "--skip-train", "--train-iters", "2"), ranks=1)
    [row] = [row for row in rows(tmp_path / "run") if "val_loss" in row]
    theirs = loss_of_transformers(tmp_path / ("exported" if own else "hf"))
    assert row["step"] == 0
    assert row["val_loss"] == pytest.approx(theirs, rel=3e-6)
