"""Encoding and decoding of text, identical for a checkpoint and its Hugging Face folder."""

from typing import Any

from megatron_ext.errors import UserError


class TextCodec:
    """Uniform interface of tokenizers of transformers and Megatron.

    Attributes:
        end: Token that ends a document; None if there is none.

    Args:
        of_transformers: A tokenizer of transformers, or None.
        of_megatron: A tokenizer of Megatron, if there is none of transformers.
    """

    def __init__(self, of_transformers: Any = None, of_megatron: Any = None) -> None:
        self._transformers, self._megatron = of_transformers, of_megatron
        self.end: int | None
        self._begin: int | None = None
        self._adds_end = False
        if of_transformers is None:
            self.end = self._prefix = of_megatron.eod
        else:
            self.end = of_transformers.eos_token_id
            empty_ids = of_transformers("").input_ids
            [with_special, plain] = (
                of_transformers("a", add_special_tokens=s).input_ids for s in (True, False)
            )
            self._begin = with_special[0] if with_special[:1] != plain[:1] else None
            self._adds_end = with_special[-1:] != plain[-1:]
            self._prefix = empty_ids[0] if empty_ids else self.end

    @property
    def prefix(self) -> int:
        """Token that precedes the beginning of a text.

        This is the token that the tokenizer adds there, or else the end of the previous document,
        as in training.
        """
        if self._prefix is None:
            raise UserError(
                "The tokenizer has no token that begins or ends a text. Use a model whose "
                "tokenizer has one."
            )
        return self._prefix

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: The text.
            special: Whether the special tokens that the tokenizer adds in front of a text are
                included. The first of them is not added to a text that begins with it, such as a
                rendered chat. A token that it adds at the end is left out, because what follows it
                in training is another document.

        Raises:
            UserError: The tokenizer cannot encode the text.
        """
        if self._transformers is not None:
            plain = self._transformers(text, add_special_tokens=False).input_ids
            if not special or (plain and plain[0] == self._begin):
                return plain
            ids = self._transformers(text).input_ids
            return ids[:-1] if self._adds_end else ids
        try:
            return self._megatron.tokenize(text)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"The model's tokenizer cannot encode {text[:40]!r}: {error}. Use a model with a "
                "text tokenizer."
            ) from error

    def without_special(self, tokens: list[int]) -> list[int]:
        """Return tokens without special ones, such as those that begin and end a text."""
        if self._transformers is None:
            return tokens  # SentencePiece omits them from the text
        special = set(self._transformers.all_special_ids)
        return [token for token in tokens if token not in special]

    def text_bytes(self, tokens: list[int]) -> int:
        """Return the size of the tokens' text in UTF-8, without the names of special tokens."""
        return len(self.decode(self.without_special(tokens)).encode())

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        if self._transformers is not None:
            return self._transformers.decode(tokens, clean_up_tokenization_spaces=False)
        return self._megatron.detokenize(tokens)
