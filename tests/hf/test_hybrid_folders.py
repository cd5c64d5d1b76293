"""Tests of what does not read Hugging Face folders of models with linear attention."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.model_card import CardFacts, model_card
from megatron_ext.hf.sources import open_hf
from megatron_ext.vllm import check_layers
from tests.alignment.engines.test_engines import HYBRID, make_expert_threshold


def test_open_hf_refuses_a_hybrid_model_of_another_family(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig

    Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        open_hf(tmp_path)
    assert str(refused.value) == (
        "Models of type qwen3_next (model_type in config.json) cannot be converted. Supported "
        "types are llama, qwen2, qwen3, mixtral, qwen3_moe, expert_threshold. To add one, see "
        "megatron_ext/hf/families.py."
    )


@pytest.mark.parametrize("hybrid", [False, True])
def test_vllm_plug_in_and_model_card_agree_on_what_vllm_serves(
    hybrid: bool, tmp_path: Path
) -> None:
    make_expert_threshold(tmp_path, **HYBRID if hybrid else {})
    card = model_card(CardFacts("model", open_hf(tmp_path), None))
    assert ("`vllm serve FOLDER` serves it" in card) != hybrid
    assert ("vLLM does not serve it, because it has Gated DeltaNet layers." in card) == hybrid
    config = load_config(tmp_path)
    if not hybrid:
        check_layers(config)
        return
    with pytest.raises(ValueError) as refused:
        check_layers(config)
    assert str(refused.value) == (
        "This model has Gated DeltaNet layers (layer_types in config.json), which the plug-in of "
        "megatron-et does not serve. Use transformers, or tools.serve."
    )
