"""Finding and loading models that are Hugging Face folders."""

import pytest
import torch

from megatron_ext.checkpoint import find_model
from megatron_ext.errors import UserError
from tests.distributed import run_ranks


def logits(run):
    """On a rank: what this project and transformers compute of the same folder."""
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


def test_find_model_prefers_the_final_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no model yet"):
        find_model(tmp_path)
    for name in ("best", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert find_model(tmp_path) == tmp_path / name
    assert find_model(tmp_path / "best") == tmp_path / "best"
