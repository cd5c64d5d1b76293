"""Small random models of every family of transformers that is converted."""

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 500
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits far from 0, and scores far from equal
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3, "rms_norm_eps": 1e-5},
    "llama-tied": {"tie_word_embeddings": True, "head_dim": 32},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen3_moe-unnormalized": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
    },
}


def add_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of transformers into a model's folder; its words are w0, w1 and so on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make(name: str, folder: Path, **changes: Any) -> Any:
    """Save a model with no parameter at 0 or 1, and return it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[name.partition("-")[0]]
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(kind(**(_COMMON | CONFIGS[name] | changes)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.eval().save_pretrained(folder, max_shard_size="100KB")
    return model
