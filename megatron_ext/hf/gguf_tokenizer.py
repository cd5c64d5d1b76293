"""Conversion of the byte-level BPE tokenizer in a GGUF file to a tokenizer of transformers.

The file does not contain the rules that split a text before merges apply, only a name for them
(`tokenizer.ggml.pre`). transformers knows many of these names but splits as GPT-2 does, without a
warning, where it does not know one. Here the names of transformers and `smollm` are known, and
every other name raises an error.
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
_SPLITS: dict[str, tuple[Any, ...]] = {
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
# For these rules llama.cpp takes a word of the vocabulary as it is, although its merges may end in
# other tokens, and puts the token bos before a text unless the file denies it.
_WHOLE_WORDS_AND_BOS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# llama.cpp ends a text at each of these tokens: end of text, of a turn, of a message to a tool.
_ENDS = ("eos", "eot", "eom")


class _Kind(IntEnum):
    """Token types of llama.cpp for tokens that no merge produces."""

    CONTROL = 3
    USER_DEFINED = 4


def save_tokenizer(model: GGUFModel, folder: Path) -> dict[str, Any]:
    """Write the tokenizer and chat template of a model into a folder.

    Args:
        model: The GGUF file.
        folder: An existing folder.

    Returns:
        The ids of the special tokens by their names in a transformers configuration. The value of
        `eos_token_id` is a list if there are several end tokens.

    Raises:
        UserError: The kind of tokenizer or its pre-tokenizer is not supported.
    """
    kind, split_name = model.get(_KEY + "model"), model.get(_KEY + "pre", "default")
    if kind != "gpt2":
        raise UserError(
            f"The GGUF file has a tokenizer of kind {kind} (tokenizer.ggml.model). Only gpt2 can "
            "be converted. Convert the Hugging Face folder of the model instead, with --from hf."
        )
    if split_name not in _SPLITS:
        raise UserError(
            f"The GGUF file splits text by the rules {split_name} (tokenizer.ggml.pre), which are "
            f"not supported. Supported are {', '.join(sorted(_SPLITS))}. Convert the Hugging Face "
            "folder of the model instead, with --from hf."
        )
    tokens: list[str] = model.get(_KEY + "tokens")
    ids = {role: model.get(f"{_KEY}{role}_token_id", -1) for role in _ROLES}
    special = {_ROLES[role]: tokens[number] for role, number in ids.items() if number >= 0}
    as_llama3 = split_name in _WHOLE_WORDS_AND_BOS
    tokenizer = _byte_level(tokens, model.get(_KEY + "merges"), _SPLITS[split_name], as_llama3)
    for token, code in zip(tokens, model.get(_KEY + "token_type", [1] * len(tokens))):
        if code in (_Kind.CONTROL, _Kind.USER_DEFINED):
            added = AddedToken(token, normalized=False, special=code == _Kind.CONTROL)
            tokenizer.add_tokens([added])
    if (bos := special.get("bos_token")) and model.get(_KEY + "add_bos_token", as_llama3):
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
    special_ids: dict[str, Any] = {
        _ROLES[role] + "_id": number
        for role, number in ids.items()
        if number >= 0 and role != "unknown"
    }
    end_ids = [model.get(f"{_KEY}{end}_token_id", -1) for end in _ENDS]
    if ends := list(dict.fromkeys(number for number in end_ids if number >= 0)):
        special_ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return special_ids


def _byte_level(
    tokens: list[str], merges: list[str], split_steps: tuple[Any, ...], whole_words: bool
) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(split_steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
