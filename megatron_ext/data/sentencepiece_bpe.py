"""Training of lossless SentencePiece BPE tokenizers."""

import io
import re
from collections.abc import Sequence

import sentencepiece

from megatron_ext.errors import UserError


def train_sentencepiece(lines: Sequence[str], vocab_size: int, character_coverage: float) -> bytes:
    """Train a BPE model with exactly `vocab_size` entries; the same lines give the same bytes.

    Args:
        lines: The text.
        vocab_size: Number of entries.
        character_coverage: Share of all characters that get their own entry.

    Returns:
        The content of the model file.

    Raises:
        UserError: The vocabulary is too large or too small for the lines, or there are none.
    """
    if not lines:
        raise UserError("--input contains no text to train on. Give files with text.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=1,  # BPE gains nothing from more, and the number is stored in the file
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # SentencePiece requires at least 10.
            max_sentence_length=max(10, *(len(line.encode()) + 1 for line in lines)),
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    return model.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> UserError:
    message = str(error)
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too large for this text. Set it to at most {match[1]} "
            "or give more text."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too small for the characters of this text. Set it to at "
            f"least {match[1]} or lower --character-coverage."
        )
    return UserError(f"SentencePiece cannot train on the text of --input: {message}")
