"""The byte-level BPE tokenizer in a GGUF file, as a tokenizer of transformers.

How a text is cut before merges apply is not in the file, only a name for it. transformers knows
many of these names; of the others it would cut like GPT-2 without a word.
"""

from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from megatron_ext.errors import UserError
from megatron_ext.hf.gguf import GGUFModel

_KEY = "tokenizer.ggml."
_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
_CUTS: dict[str, tuple[Any, ...]] = {
    "gpt-2": _GPT2,
    "smollm": (pre_tokenizers.Digits(individual_digits=True), *_GPT2),
    **{
        name: (
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        )
        for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()
    },
}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# llama.cpp ends a text at each of these: end of text, of a turn, of a message to a tool.
_ENDS = ("eos", "eot", "eom")


class _Kind(IntEnum):
    """llama.cpp's kinds of tokens that are not merged from others."""

    CONTROL = 3
    USER_DEFINED = 4


def save_tokenizer(model: GGUFModel, folder: Path) -> dict[str, Any]:
    """Write a model's tokenizer and chat template into a folder.

    Returns:
        The ids of its special tokens, by the names that a configuration has for them; of several
        end tokens, a list.

    Raises:
        UserError: its kind is not supported.
    """
    kind, cut = model.get(_KEY + "model"), model.get(_KEY + "pre", "default")
    if kind != "gpt2":
        raise UserError(f"the GGUF file has a tokenizer of kind {kind}: only gpt2 is converted")
    if cut not in _CUTS:
        raise UserError(
            f"the GGUF file cuts text by rules called {cut}, not known here: known are "
            f"{', '.join(sorted(_CUTS))}"
        )
    tokens: list[str] = model.get(_KEY + "tokens")
    ids = {role: model.get(f"{_KEY}{role}_token_id", -1) for role in _ROLES}
    special = {_ROLES[role]: tokens[number] for role, number in ids.items() if number >= 0}
    tokenizer = _byte_level(tokens, model.get(_KEY + "merges"), _CUTS[cut])
    for token, code in zip(tokens, model.get(_KEY + "token_type", [1] * len(tokens))):
        if code in (_Kind.CONTROL, _Kind.USER_DEFINED):
            added = AddedToken(token, normalized=False, special=code == _Kind.CONTROL)
            tokenizer.add_tokens([added])
    if model.get(_KEY + "add_bos_token", False):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=model.get("tokenizer.chat_template", "") or None,
        clean_up_tokenization_spaces=False,
        model_max_length=model.architecture.max_length,
        **special,
    ).save_pretrained(folder)
    kept: dict[str, Any] = {
        _ROLES[role] + "_id": number
        for role, number in ids.items()
        if number >= 0 and role != "unknown"
    }
    named = [model.get(f"{_KEY}{end}_token_id", -1) for end in _ENDS]
    if ends := list(dict.fromkeys(number for number in named if number >= 0)):
        kept["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return kept


def _byte_level(tokens: list[str], merges: list[str], cut: tuple[Any, ...]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(cut))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
