"""Tests of Hugging Face folders with repeated tensors, and of folders that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_ext.errors import UserError
from megatron_ext.hf.sources import open_hf
from tests.hf.models import make

FREQUENCIES = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Save a model with further tensors in one file; return its folder and its tensors."""

    def save(name: str, further: dict[str, torch.Tensor], **changes: Any) -> Path:
        make(name, tmp_path, num_hidden_layers=2, **changes)
        tensors = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors | further, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_hf_ignores_rotary_frequencies(dtype: torch.dtype, save: Any) -> None:
    """Their values do not matter, because transformers computes them from the configuration."""
    further = {FREQUENCIES.format(i): torch.ones(16, dtype=dtype) for i in range(2)}
    folder = save("llama-tied", further)
    source = open_hf(folder)
    names = {name for link in source.family.links(source.model) for name, _ in link.parts}
    assert source.tensors.shapes.keys() - names == further.keys()
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_open_hf_ignores_the_output_layer_of_a_tied_model(save: Any) -> None:
    embedding = make("qwen3", save("qwen3", {}), num_hidden_layers=2).model.embed_tokens.weight
    folder = save("qwen3", {"lm_head.weight": embedding.detach().clone()})
    assert open_hf(folder).model.tied
    save("qwen3", {"lm_head.weight": embedding.detach() + 1})
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, though"):
        open_hf(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(
    value: float, dtype: torch.dtype, save: Any
) -> None:
    norm, embedding = torch.ones(64, dtype=dtype), torch.full((500, 64), -3e38, dtype=dtype)
    further = {"model.norm.weight": norm, "model.embed_tokens.weight": embedding}
    assert torch.equal(open_hf(save("llama", further)).tensors.read("model.norm.weight"), norm)
    norm[17] = value
    tensors = open_hf(save("llama", further)).tensors
    assert torch.equal(tensors.read("model.embed_tokens.weight"), embedding)
    with pytest.raises(UserError, match=r"has a value in model\.norm\.weight that is not finite"):
        tensors.read("model.norm.weight")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.bias", "model.position_ids"])
def test_open_hf_refuses_unexpected_tensors(name: str, save: Any) -> None:
    with pytest.raises(UserError, match=f"has a tensor {name}, which no model"):
        open_hf(save("llama", {name: torch.ones(2)}))


def test_open_hf_names_tensors_with_another_prefix(save: Any) -> None:
    folder = save("llama-tied", {})
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("model."): v for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"embed_tokens.weight where model.embed_tokens.weight is"):
        open_hf(folder)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "contains an adapter"),
        ("model.safetensors.index.json", {"weight_map": {"a": "b"}}, "Remove the one that is out"),
        ("model.safetensors.index.json", [], "index.json is damaged"),
        ("model.safetensors.index.json", {"weight_map": []}, "index.json is damaged"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, r"is quantized \(fp8"),
        ("config.json", {"hidden_size": "wide"}, "is not a valid configuration of type llama"),
        ("config.json", {"num_attention_heads": 0}, "is not a valid configuration of type llama"),
    ],
)
def test_open_hf_refuses_adapters_quantized_and_damaged_folders(
    name: str, content: Any, message: str, save: Any
) -> None:
    folder = save("llama", {})
    file = folder / name
    if file.exists():
        content = json.loads(file.read_text()) | content
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_hf(folder)


def test_open_hf_refuses_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json cannot be read: No such file"):
        open_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        open_hf(tmp_path)
