"""Verification of a conversion: comparison of the logits of both models on a short text."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_ext.errors import UserError
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import OWN
from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM
from megatron_ext.inference.forward import full_logits
from megatron_ext.inference.loading import load_model

TEXT = "The quick brown fox jumps over the lazy dog, and nobody is surprised."
LENGTH = 32  # maximum number of tokens
# Relative to the largest logit. In fp32, different orders of the same sums differ by about 1e-5
# even in deep models, while another model differs by far more, however small its logits are.
TOLERANCE = 1e-4


def largest_difference(megatron: Path, hf: Path, tokenizer_model: str | None = None) -> float:
    """Return the largest difference of any logit of a text, as a share of the largest logit.

    Both models compute in fp32 and are loaded one after the other.

    Args:
        megatron: Folder of checkpoints, or one of them.
        hf: Hugging Face folder.
        tokenizer_model: File or folder of the tokenizer. Default: the one in the folder of
            checkpoints, or the one that training used.

    Raises:
        UserError: The models differ.
    """
    if tokenizer_model is None:
        candidates = (megatron / name for name in ("tokenizer.model", "tokenizer"))
        tokenizer_model = next((str(path) for path in candidates if path.exists()), None)
    trained = load_model(megatron, dtype=torch.float32, tokenizer_model=tokenizer_model)
    tokens = verification_tokens(trained)
    ours = logits_of(trained, tokens)
    del trained
    gc.collect()
    return compare_logits(ours, hf, tokens, str(megatron))


def logits_of(trained: Any, tokens: Tensor) -> Tensor:
    """Return the logits of a loaded model, `[batch, sequence, vocabulary]` without padding."""
    logits = full_logits(trained, tokens)
    assert logits is not None
    return logits[..., : trained.vocab_size].clone()


def compare_logits(ours: Tensor, hf: Path, tokens: Tensor, place: str) -> float:
    """Return the largest difference from the logits of a folder, as a share of the largest logit.

    Args:
        ours: Logits of the model before its conversion, fp32 `[batch, sequence, vocabulary]`.
        hf: Hugging Face folder.
        tokens: Token ids, int64 `[batch, sequence]`.
        place: Path of the model before its conversion, for the error message.

    Raises:
        UserError: The models differ.
    """
    theirs = hf_logits(hf, tokens)[..., : ours.shape[-1]]
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"The logits of {place} and of its conversion differ by up to {difference:.3g}, "
            f"where the largest logit is {largest:.3g}. The conversion was removed; please report "
            "this."
        )
    return difference / largest if largest else 0.0


def verification_tokens(trained: Any) -> Tensor:
    """Return the token ids of the text, or other ids without a text tokenizer, `[1, tokens]`."""
    if trained.args.tokenizer_type == "NullTokenizer":
        ids = [(7919 * i) % trained.vocab_size for i in range(LENGTH)]
    else:
        ids = trained.tokenizer.tokenize(TEXT)
    return torch.tensor([ids[: min(LENGTH, trained.max_length)]])


@torch.no_grad()
def hf_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Compute logits with the model of a Hugging Face folder, in fp32 on the CPU.

    Args:
        folder: Hugging Face folder.
        tokens: Token ids, int64 `[batch, sequence]`.

    Returns:
        Logits, fp32 `[batch, sequence, vocabulary]`.
    """
    disable_progress_bar()  # it is printed to stderr
    is_expert_threshold = load_config(folder).model_type == OWN.name
    kind: Any = ExpertThresholdForCausalLM if is_expert_threshold else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=tokens, use_cache=False).logits
