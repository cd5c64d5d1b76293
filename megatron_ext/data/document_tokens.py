"""Token ids of texts as training has them, for tools that inspect a model."""

from typing import Any


class DocumentTokens:
    """Encoder of documents and prompts with a tokenizer of Megatron.

    `tools.preprocess_data` encodes a document with the same ids. The names of special tokens in a
    text are text, the tokens that a tokenizer of transformers adds around a text are added once,
    and exactly one end token ends a document.

    Args:
        tokenizer: A tokenizer of Megatron.
        parse_special: Whether names of special tokens in a text are these tokens.

    Attributes:
        begin: Ids in front of each document.
        end: Ids after each document, the last of which is its end token if there is one.
    """

    def __init__(self, tokenizer: Any, parse_special: bool = False) -> None:
        self._tokenizer, self._parse_special = tokenizer, parse_special
        is_transformers = getattr(tokenizer, "library", None) == "huggingface"
        self._transformers = tokenizer._tokenizer.tokenizer if is_transformers else None
        self.begin: list[int] = []
        self.end: list[int] = []
        if self._transformers is not None:
            example = self._transformers("a", return_special_tokens_mask=True)
            ids, added = example.input_ids, example.special_tokens_mask
            self.begin = ids[: added.index(0)]
            self.end = ids[len(added) - added[::-1].index(0) :]
        self._adds_end = self.end[-1:] == [tokenizer.eod]
        if tokenizer.eod is not None and not self._adds_end:
            self.end = [*self.end, tokenizer.eod]

    def document(self, text: str) -> list[int]:
        """Return the ids of a document."""
        return [*self.beginning(text), *self.end]

    def beginning(self, text: str) -> list[int]:
        """Return the ids of a text with which a document begins."""
        return [*self.begin, *self.plain(text)]

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text without those in front of it and after it."""
        if self._transformers is None:
            return self._tokenizer.tokenize(text) if text else []
        return self._transformers(
            text,
            add_special_tokens=False,
            split_special_tokens=not self._parse_special,
            verbose=False,
        ).input_ids

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text to continue, in which names of special tokens are these tokens.

        An end token that the tokenizer adds is left out, because what follows it in training is
        another document.
        """
        ids = self._tokenizer.tokenize(text)
        return ids[:-1] if self._adds_end else ids
