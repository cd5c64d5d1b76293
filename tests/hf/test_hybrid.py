"""Tests of a trained model with Gated DeltaNet layers as a Hugging Face folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.hf.torch_dist import TorchDistReader
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.hf.test_expert_threshold import NEW, PROMPTS, TEXTS, VOCABULARY, there_and_back
from tests.inference.checkpoint import hybrid_run_dir  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def megatron(hybrid_run_dir: Path, folder: Path) -> SimpleNamespace:  # noqa: F811
    [facts] = run_ranks(there_and_back, 1, hybrid_run_dir, folder, timeout=240)
    return facts


@pytest.fixture(scope="module")
def model(megatron: SimpleNamespace, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder / "hf", trust_remote_code=True, dtype=torch.float32
    ).eval()


def test_hybrid_hf_logits_equal_those_of_megatron(megatron: SimpleNamespace, model: Any) -> None:
    with torch.no_grad():
        logits = model(TEXTS).logits
    assert logits.std() > 1
    torch.testing.assert_close(logits, megatron.logits, atol=rounding(megatron.logits), rtol=0)


def test_hybrid_hf_model_generates_the_tokens_of_megatron(
    megatron: SimpleNamespace, model: Any
) -> None:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 3}
    width = max(map(len, PROMPTS))
    # Rows of unequal length are padded on the left; padding must not change a state.
    batch = torch.tensor([[3] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    together = model.generate(batch, attention_mask=mask, eos_token_id=-1, **options)
    assert together[:, width:].tolist() == megatron.tokens
    for prompt, tokens in zip(PROMPTS, megatron.tokens):
        for use_cache in (True, False):
            ids = torch.tensor([prompt])
            alone = model.generate(ids, use_cache=use_cache, eos_token_id=-1, **options)
            assert alone[0, len(prompt) :].tolist() == tokens


def test_hybrid_hf_model_continues_a_cache_by_several_tokens(model: Any) -> None:
    with torch.no_grad():
        expected = model(TEXTS).logits
        first = model(TEXTS[:, :7], use_cache=True)
        second = model(TEXTS[:, 7:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, expected, atol=rounding(expected, 1e-5), rtol=0)


def test_hybrid_round_trip_is_bit_exact(
    megatron: SimpleNamespace,
    hybrid_run_dir: Path,  # noqa: F811
    folder: Path,
) -> None:
    old = TorchDistReader(hybrid_run_dir / "checkpoints" / "iter_0000040")
    new = TorchDistReader(folder / "back" / "release")
    assert old.shapes.keys() == new.shapes.keys() and old.dtypes == new.dtypes
    for name in old.shapes:
        tensor = old.read(name)
        if name in VOCABULARY:
            tensor = tensor[:500]  # without Megatron's padding
        assert torch.equal(tensor, new.read(name)), name
    assert torch.equal(megatron.back, megatron.logits)


def test_hybrid_hf_model_refuses_what_would_mix_samples(model: Any) -> None:
    mask = torch.ones(2, 1, 30, 30).tril().bool()
    with pytest.raises(ValueError, match="needs a mask"):
        model(TEXTS, attention_mask=mask)
    model.config._attn_implementation, before = "vllm", model.config._attn_implementation
    try:  # vLLM's Transformers back end passes the tokens of all requests as one row
        with pytest.raises(ValueError, match="vLLM does not serve"):
            model(TEXTS)
    finally:
        model.config._attn_implementation = before
