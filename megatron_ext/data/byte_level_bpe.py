"""Training of byte-level BPE tokenizers in the format of Hugging Face.

Every byte has an entry, so that no text is unknown and decoding restores every text exactly. As
with `tools.train_tokenizer`'s SentencePiece models, digits are separate tokens and text is not
normalized.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

PAD_TOKEN = "<|pad|>"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Files that `save_tokenizer` writes."""

_BYTES = 256


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a tokenizer; their ids are 0, 1, 2 and so on.

    Attributes:
        end: Token that ends a document and also marks the beginning of a text.
        more: Further ones, after the end and the padding token.
        ends_of_turns: Those that end a turn, after which generation stops too.
    """

    end: str = "<|endoftext|>"
    more: tuple[str, ...] = ()
    ends_of_turns: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All special tokens, in the order of their ids."""
        return list(dict.fromkeys([self.end, PAD_TOKEN, *self.more]))


def train_byte_level_bpe(lines: Sequence[str], vocab_size: int, special: SpecialTokens) -> Any:
    """Train a tokenizer with exactly `vocab_size` entries; the same lines give the same one.

    Args:
        lines: The text.
        vocab_size: Number of entries: special tokens, 256 bytes and merges.
        special: The special tokens.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        UserError: The vocabulary is too small, or too large for the lines, or there are none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = len(special.names) + _BYTES
    if vocab_size < least:
        raise UserError(
            f"--vocab-size {vocab_size} is too small for 256 bytes and {least - _BYTES} special "
            f"tokens. Set it to at least {least}."
        )
    if not lines:
        raise UserError("--input contains no text to train on. Give files with text.")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special.names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(lines), trainer, length=len(lines))
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is too large for this text, in which only {size:,} entries "
            f"occur twice or more. Set it to at most {size} or give more text."
        )
    return tokenizer


def save_tokenizer(
    tokenizer: Any, folder: Path, special: SpecialTokens, chat_template: str | None
) -> None:
    """Write tokenizer.json and its settings into a folder.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        folder: An existing folder.
        special: Its special tokens.
        chat_template: Jinja template of conversations.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.end,
        "eos_token": special.end,
        "pad_token": PAD_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' number for no limit
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    ends = [tokenizer.token_to_id(name) for name in (special.end, *special.ends_of_turns)]
    generation = {
        "bos_token_id": ends[0],
        "eos_token_id": ends if special.ends_of_turns else ends[0],
        "pad_token_id": tokenizer.token_to_id(PAD_TOKEN),
    }
    for name, content in (
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
