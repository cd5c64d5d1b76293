"""Encoder of documents with a Rust tokenizer of Hugging Face, in batches."""

import os
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np


class FastEncoder:
    """Encoder of documents into the tokens of `transformers`, and the end-of-document id.

    The special tokens that the tokenizer puts around a text are included. If the last of them is
    the end-of-document id, no other one is appended.

    Args:
        pipeline: Content of a tokenizer.json.
        eod: End-of-document id.
        dtype: Data type of the tokens.
        parse_special: Whether names of special tokens in a text are these tokens. Otherwise they
            are encoded like other text, so that no text can end a document.
        threads: Number of threads that encode a batch.
    """

    def __init__(
        self, pipeline: str, eod: int, dtype: str, parse_special: bool = False, threads: int = 1
    ) -> None:
        # Rust reads these when the first batch is encoded.
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(pipeline)
        self._tokenizer.encode_special_tokens = not parse_special
        self._code, self._eod, self._parse_special = np.dtype(dtype).char, eod, parse_special
        before, after = self._affixes()
        self._own = before.count(eod) + after.count(eod)  # end tokens that are not of the text
        self._appended = [] if after[-1:] == [eod] else [eod]

    def encode_documents(self, texts: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of each document's tokens and of the end-of-document id.

        A document is None if its text contains the end-of-document id although special tokens are
        not parsed: its vocabulary has the token's name as an ordinary word.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return [self._document(encoding.ids) for encoding in encodings]

    def _document(self, ids: list[int]) -> bytes | None:
        if not self._parse_special and ids.count(self._eod) > self._own:
            return None
        return array(self._code, [*ids, *self._appended]).tobytes()

    def _affixes(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        with_special, plain = (
            self._tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False)
        )
        for start in range(len(with_special) - len(plain) + 1):
            if with_special[start : start + len(plain)] == plain:
                return with_special[:start], with_special[start + len(plain) :]
        return [], []
