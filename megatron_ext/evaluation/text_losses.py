"""Between text and tokens, the same for a checkpoint and for its Hugging Face folder."""

from typing import Any

from megatron_ext.errors import UserError


class TextCodec:
    """A tokenizer of transformers or one of Megatron's.

    Attributes:
        end: the token that ends a document; None when there is none.
        prefix: what stands before a text that nothing precedes: the token that the tokenizer itself
            puts there, or else the end of the document before, as in training.

    Args:
        of_transformers: a tokenizer of transformers, or None.
        of_megatron: one of Megatron's, where there is none of transformers.
    """

    def __init__(self, of_transformers: Any = None, of_megatron: Any = None) -> None:
        self._transformers, self._megatron = of_transformers, of_megatron
        self.end: int | None
        self._begin: int | None = None
        if of_transformers is None:
            self.end = self._prefix = of_megatron.eod
        else:
            self.end = of_transformers.eos_token_id
            own = of_transformers("").input_ids
            [whole, plain] = (
                of_transformers("a", add_special_tokens=s).input_ids for s in (True, False)
            )
            self._begin = whole[0] if whole[:1] != plain[:1] else None
            self._prefix = own[0] if own else self.end

    @property
    def prefix(self) -> int:
        if self._prefix is None:
            raise UserError("the tokenizer has no token that begins or ends a text")
        return self._prefix

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: to encode.
            special: with those that the tokenizer by itself puts around a text. A text that begins
                with the first of them already, as a rendered chat may, does not get it twice.

        Raises:
            UserError: the tokenizer knows no text.
        """
        if self._transformers is not None:
            plain = self._transformers(text, add_special_tokens=False).input_ids
            if not special or (plain and plain[0] == self._begin):
                return plain
            return self._transformers(text).input_ids
        try:
            return self._megatron.tokenize(text)
        except (ValueError, KeyError) as error:
            raise UserError(f"the model's tokenizer cannot read {text[:40]!r}: {error}") from error

    def without_special(self, tokens: list[int]) -> list[int]:
        """Return tokens without special ones, such as those that begin and end a text."""
        if self._transformers is None:
            return tokens  # SentencePiece gives them no text
        special = set(self._transformers.all_special_ids)
        return [token for token in tokens if token not in special]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        if self._transformers is not None:
            return self._transformers.decode(tokens, clean_up_tokenization_spaces=False)
        return self._megatron.detokenize(tokens)
