"""Tests of recipe.yaml of a converted checkpoint: the same model at step 0, and training."""

import io
import json
import shutil
import subprocess
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from tests.distributed import ROOT, run_ranks
from tests.hf.models import VOCAB, add_tokenizer, make
from tests.pretraining import start, train
from tests.warm import warm_python

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
    """Convert, on a rank, the model and write a dataset."""
    from tools import convert_checkpoint

    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(folder / "first")])
    write_dataset(folder / "data")


def convert_with_thresholds(folder):
    """Upcycle and calibrate the model on a rank, and convert it to Hugging Face and back."""
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
    """Convert, on a rank, the checkpoint to a Hugging Face folder."""
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


def upcycle(folder):
    """Upcycle, on a rank, the model without thresholds, and write a dataset."""
    from tools import upcycle as tool

    flags = ["--load", str(folder / "hf"), "--num-experts", "8", "--granularity", "4"]
    with redirect_stdout(io.StringIO()) as output:
        tool.main([*flags, "--save", str(folder / "moved")])
    write_dataset(folder / "data")
    return output.getvalue()


def test_upcycled_model_without_a_tokenizer_trains_and_resumes_from_its_recipe(tmp_path):
    """Flags override the recipe, a new optimizer starts at step 0, and the same run resumes."""
    make("llama-tied", tmp_path / "hf")
    [output] = run_ranks(upcycle, 1, tmp_path, timeout=240)
    assert "the source has no tokenizer" in output
    recipe = yaml.safe_load((tmp_path / "moved" / "recipe.yaml").read_text())
    assert recipe["et_warmup_iters"] == 100 and recipe["vocab_size"] == VOCAB
    more = ["--train-iters", "4", "--lr", "1e-2", "--et-warmup-iters", "1", "--log-interval", "1"]
    train(flags(tmp_path, "run", *more, "--exit-interval", "2"), ranks=1)
    train(flags(tmp_path, "run", *more), ranks=1)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]


def refused(folder, *more):
    """Return the error message of a run with the recipe."""
    words = flags(folder, "refused", "--train-iters", "2", *more)
    [(code, message)] = run_ranks(start, 1, words, timeout=240)
    assert code == 2
    return message


def test_recipe_with_data_of_another_tokenizer_is_refused(tmp_path):
    make("llama-tied", tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", 450)
    run_ranks(convert, 1, tmp_path, timeout=240)
    (tmp_path / "first").rename(tmp_path / "moved")
    dry_run = subprocess.run(
        [warm_python(), "pretrain_et.py", "--dry-run", "1"]
        + ["--recipe", tmp_path / "moved" / "recipe.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert dry_run.returncode == 0, dry_run.stderr
    assert "saving a checkpoint takes up to" in dry_run.stdout
    manifest = {"tokenizer": {"path": "other.model", "sha256": "0" * 64}}
    (tmp_path / "data.json").write_text(json.dumps(manifest))
    message = refused(tmp_path)
    assert "was made with another tokenizer than" in message
    (tmp_path / "data.json").unlink()
    shutil.rmtree(tmp_path / "moved" / "release")
    assert "release is missing or incomplete" in refused(tmp_path)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "expert_threshold"])
def test_validation_loss_at_step_0_equals_that_of_transformers(name, tmp_path):
    """The tokenizer has fewer entries than the model rows, and the folder was moved."""
    own = name == "expert_threshold"
    make("llama-tied" if own else name, tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", 450)
    run_ranks(convert_with_thresholds if own else convert, 1, tmp_path, timeout=240)
    (tmp_path / "first").rename(tmp_path / "moved")
    if own:
        run_ranks(export, 1, tmp_path, timeout=240)
    shutil.rmtree(tmp_path / "hf", ignore_errors=own) if own else None
    train(flags(tmp_path, "run", "--skip-train", "--train-iters", "2"), ranks=1)
    [row] = [row for row in rows(tmp_path / "run") if "val_loss" in row]
    theirs = loss_of_transformers(tmp_path / ("exported" if own else "hf"))
    assert row["step"] == 0
    assert row["val_loss"] == pytest.approx(theirs, rel=3e-6)
