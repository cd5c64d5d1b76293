"""Tests of finding and loading models in Hugging Face folders."""

import json
import re

import pytest
import torch

from megatron_ext.checkpoint import TRACKER
from megatron_ext.errors import UserError
from megatron_ext.model_location import locate_hf_folder, locate_model
from tests.distributed import run_ranks


def logits(run):
    """Return, on a rank, the logits of this project and of transformers for the same folder."""
    from transformers import AutoModelForCausalLM

    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.loading import load_model

    tokens = torch.arange(10, 40).unsqueeze(0)
    trained = load_model(run)
    ours = full_logits(trained, tokens)
    assert ours is not None
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(run / "final")(tokens).logits
    return ours[..., : theirs.shape[-1]], theirs


def test_loaded_alignment_model_has_the_logits_of_transformers(tmp_path):
    from tests.hf.models import make

    make("qwen3_moe-unnormalized", tmp_path / "final")
    [(ours, theirs)] = run_ranks(logits, 1, tmp_path)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(1e-5 * theirs.abs().max()))


def export(folder, **note):
    """Write a minimal Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if note:
        (folder / "best.json").write_text(json.dumps(note))


def checkpoint(folder, *steps):
    """Write a minimal folder of checkpoints of Megatron."""
    for step in steps:
        (folder / f"iter_{step:07d}").mkdir(parents=True)
        for name in ("metadata.json", ".metadata"):
            (folder / f"iter_{step:07d}" / name).touch()
    (folder / TRACKER).write_text(str(steps[-1]))


def test_final_model_of_an_alignment_run_precedes_its_best(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no model yet"):
        locate_model(tmp_path)
    checkpoint(tmp_path / "checkpoints", 7)
    assert locate_model(tmp_path).folder.name == "iter_0000007"
    export(tmp_path / "best", step=4, value=-1.5, sound=True)
    best = locate_model(tmp_path)
    assert str(best) == f"{tmp_path / 'best'} (step 4, value -1.5000)"
    export(tmp_path / "final")
    assert locate_model(tmp_path).folder == tmp_path / "final"
    assert locate_model(tmp_path / "best") == best


def test_every_path_into_a_pretraining_run_leads_to_its_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint(folder, 3, 12)
    rows = [{"step": 12, "loss": 5.0}, {"step": 3, "val_loss": 6.5}, {"step": 12, "val_loss": 5.25}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 13, "val_loss": 1']))
    newest = folder / "iter_0000012"
    for path in (tmp_path, folder, newest):
        assert str(locate_model(path)) == f"{newest} (step 12, validation loss 5.2500)"
    (tmp_path / "metrics.jsonl").write_text('{"step": 12, "val_loss": "NaN"}\n')
    assert str(locate_model(tmp_path)) == f"{newest} (step 12, validation loss nan)"
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    older = locate_model(folder / "iter_0000003")
    assert (older.step, older.metrics) == (3, (("validation loss", 6.5),))
    with pytest.raises(UserError, match=r"leads to .*iter_0000012, a checkpoint of Megatron"):
        locate_hf_folder(tmp_path, "--model", "--engine deepspeed")


def incomplete(folder):
    checkpoint(folder, 3)
    (folder / "iter_0000003" / ".metadata").unlink()


def deepspeed(folder, exported):
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_3")
    if exported:
        export(folder / "best")


CASES = {
    "is not a folder. Choose a run directory": (lambda f: None, "nowhere"),
    "is a file, not a folder": (lambda f: (f / "x").touch(), "x"),
    "iter_0000003 is missing or incomplete": (incomplete, "."),
    "iter_0000003 is an incomplete checkpoint": (incomplete, "iter_0000003"),
    "best has no config.json, so that it is not": (lambda f: (f / "best").mkdir(), "best"),
    "has checkpoints of DeepSpeed, from which only training can resume. The run writes": (
        lambda f: deepspeed(f, False),
        ".",
    ),
    "DeepSpeed, from which only training can resume. Give": (
        lambda f: deepspeed(f, True),
        "checkpoints",
    ),
    "can resume. Give": (lambda f: deepspeed(f, True), "checkpoints/step_3"),
    "holds two models": (lambda f: (export(f / "m"), checkpoint(f / "m", 1)), "m"),
    "has no model, but its subfolders have": (
        lambda f: (export(f / "a"), checkpoint(f / "b" / "checkpoints", 1)),
        ".",
    ),
    "has no checkpoint": (lambda f: (f / "empty").mkdir(), "empty"),
}


@pytest.mark.parametrize("message", CASES)
def test_path_without_one_complete_model_is_refused(message, tmp_path):
    prepare, path = CASES[message]
    prepare(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        locate_model(tmp_path / path)
