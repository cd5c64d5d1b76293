"""Text into tokens as SentencePiece does it, word by word where that is the same.

In natural text most words have been seen before. When no piece of a BPE vocabulary reaches over the
space after a word, no merge does, so each word can be encoded on its own, once, and looked up from
then on. Models that give no such guarantee encode a document at a time.
"""

import re
from array import array
from typing import Any

import numpy as np
import sentencepiece

_MARK = "\u2581"  # SentencePiece's mark for a space
_SPACES = f"{_MARK} "  # symbols that a user defines keep the space itself
_MOST_WORDS = 1 << 18  # kept by a process: some 50 MB
_LONGEST_WORD = 64  # characters of a word that is kept


class DocumentEncoder:
    """Encodes documents, each with its end.

    Args:
        model: path of a SentencePiece model.
        dtype: of the tokens.
    """

    def __init__(self, model: str, dtype: str):
        self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
        self._code = np.dtype(dtype).char
        self._end = self._bytes([self._tokenizer.eos_id()])
        self._words = _Words(self) if words_are_independent(self._tokenizer) else None

    def __call__(self, text: str) -> bytes:
        """The document's tokens and the end of document, one after the other in the dtype."""
        # A mark in the text reads as a space, so that a run of spaces may reach over it.
        if self._words is None or _MARK in text:
            return self.encode(text) + self._end
        first, *words = text.split(" ")
        if "" in words:
            words = _with_runs(words)
        tokens = map(self._words.__getitem__, words)
        return b"".join([self.encode(first), *tokens, self._end])

    def encode(self, text: str) -> bytes:
        """Tokens of a text, by SentencePiece alone."""
        return self._bytes(self._tokenizer.encode(text))

    def _bytes(self, ids: list[int]) -> bytes:
        return array(self._code, ids).tobytes()


class _Words(dict[str, bytes]):
    """Tokens of a space and the word after it, by word; a word that is not there is encoded."""

    def __init__(self, encoder: DocumentEncoder):
        super().__init__()
        self._encoder = encoder

    def __missing__(self, word: str) -> bytes:
        tokens = self._encoder.encode(f" {word}")
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = tokens
        return tokens


def _with_runs(words: list[str]) -> list[str]:
    """Put the further spaces of a run, each an empty word, before the word that follows them: a run
    may be one piece.

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
    """Whether a text's tokens are those of its first word and of each further one with the spaces
    before it.

    They are when the text is taken as it is, merges are looked for in the vocabulary alone, no
    piece has a space after something else, and unknown characters stay apart.
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
