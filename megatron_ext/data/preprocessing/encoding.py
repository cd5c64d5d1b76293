"""Encoder of documents with SentencePiece, word by word where the tokens are the same.

Most words of natural text occur many times. If no piece of a BPE vocabulary contains a space after
another character, no merge crosses the end of a word, so that each word can be encoded once and
looked up afterwards. With other models a document is encoded as a whole.
"""

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece

_MARK = "\u2581"  # SentencePiece's mark for a space
_SPACES = f"{_MARK} "  # user-defined symbols contain the space itself
_MOST_WORDS = 1 << 18  # cached per process, about 50 MB
_LONGEST_WORD = 64  # characters of a cached word


class DocumentEncoder:
    """Encoder of documents into tokens, each followed by the end-of-document id.

    Args:
        model: Path of a SentencePiece model.
        dtype: Data type of the tokens.
    """

    def __init__(self, model: str, dtype: str):
        self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
        self._code = np.dtype(dtype).char
        self._end = self._bytes([self._tokenizer.eos_id()])
        self._words = _Words(self) if words_are_independent(self._tokenizer) else None

    def __call__(self, text: str) -> bytes:
        """Return the bytes of the document's tokens and of the end-of-document id."""
        # A mark in the text is encoded like a space, so that a run of spaces may include it.
        if self._words is None or _MARK in text:
            return self.encode(text) + self._end
        first, *words = text.split(" ")
        if "" in words:
            words = _with_runs(words)
        tokens = map(self._words.__getitem__, words)
        return b"".join([self.encode(first), *tokens, self._end])

    def encode_documents(self, texts: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of each document, as calling the encoder does; none is None."""
        return list(map(self, texts))

    def encode(self, text: str) -> bytes:
        """Return the bytes of a text's tokens, encoded as a whole."""
        return self._bytes(self._tokenizer.encode(text))

    def _bytes(self, ids: list[int]) -> bytes:
        return array(self._code, ids).tobytes()


class _Words(dict[str, bytes]):
    """Cache of the tokens of a space and the word after it, by word."""

    def __init__(self, encoder: DocumentEncoder):
        super().__init__()
        self._encoder = encoder

    def __missing__(self, word: str) -> bytes:
        tokens = self._encoder.encode(f" {word}")
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = tokens
        return tokens


def _with_runs(words: list[str]) -> list[str]:
    """Put the further spaces of a run, each an empty word, before the word that follows them.

    A run of spaces may be one piece.

    >>> "a b   c  ".split(" ")[1:], _with_runs("a b   c  ".split(" ")[1:])
    (['b', '', '', 'c', '', ''], ['b', '  c', ' '])
    """
    joined, spaces = [], 0
    for word in words:
        if word:
            joined.append(" " * spaces + word)
            spaces = 0
        else:
            spaces += 1
    return joined + [" " * (spaces - 1)] * (spaces > 0)


def words_are_independent(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Return whether a text's tokens are those of its words, each with the spaces before it.

    This requires that text is not normalized, merges depend on the vocabulary alone, no piece
    contains a space after another character, and unknown characters are not merged.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # made at run time
    model = proto.ModelProto.FromString(tokenizer.serialized_model_proto())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    return (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not any(re.search(f"[^{_SPACES}][{_SPACES}]", piece.piece) for piece in model.pieces)
    )
