"""Incremental decoding of token ids to text.

A character may consist of several tokens. Until the last of them has arrived, tokenizers decode the
first ones to replacement characters, which a later token changes.
"""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BROKEN = _REPLACEMENT.encode()
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXT = 4  # tokens
_LONGEST_START = 3  # bytes of a character that lacks at least one


class Detokenizer:
    """Decoder of a model's tokenizer that also reports the bytes of a token.

    Attributes:
        byte_level: Whether every token is a sequence of bytes, as in byte-level BPE. Otherwise only
            byte pieces such as `<0xE2>` can be a part of a character.
        holds_runs: Whether one invalid byte turns a whole run of byte pieces into replacement
            characters, so that the run is certain only when another token follows.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        """Wrap a tokenizer of Megatron; use `detokenizer_of`, which caches the result.

        Args:
            tokenizer: Tokenizer with `detokenize`.
            skip_special_tokens: Whether special tokens are omitted from the text.
        """
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        library = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
        self._sentencepiece = library if hasattr(library, "id_to_piece") else None
        self._hf = library if hasattr(library, "convert_ids_to_tokens") else None
        decoder = _decoder_types(self._hf)
        self._opaque = self._sentencepiece is None and not decoder
        self.byte_level = "ByteLevel" in decoder
        self.holds_runs = "ByteFallback" in decoder
        self._special = frozenset(getattr(self._hf, "all_special_ids", ()))
        self._bytes: dict[int, bytes | None] = {}
        self._of_character: dict[str, int] = {}
        if self.byte_level:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self._of_character = {text: byte for byte, text in bytes_to_unicode().items()}

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._decode(list(tokens), self._skip)

    def name(self, token: int) -> str:
        """Return the text of a token on its own, special or not."""
        return self._decode([token], False)

    def _decode(self, ids: list[int], skip: bool) -> str:
        text: str
        if self._hf is not None:
            # Cleaning up spaces would change the text in front of a token.
            text = self._hf.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
        else:
            text = self._tokenizer.detokenize(ids)
        if self._sentencepiece is not None and not skip:
            # SentencePiece omits control tokens, so that their names are inserted here.
            text_with_names, done = "", 0
            for place, token in enumerate(ids):
                if self._sentencepiece.is_control(token):
                    size = len(self._tokenizer.detokenize(ids[:place]))
                    text_with_names += text[done:size] + self._sentencepiece.id_to_piece(token)
                    done = size
            text = text_with_names + text[done:]
        return text

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes of a token, or None if only its text is known."""
        if token not in self._bytes:
            self._bytes[token] = self._find_bytes(token)
        return self._bytes[token]

    def _find_bytes(self, token: int) -> bytes | None:
        piece = None
        if self._sentencepiece is not None:
            piece = self._sentencepiece.id_to_piece(token)
        elif self.byte_level or self.holds_runs:
            assert self._hf is not None
            if token in self._special and self._skip:
                return b""  # its neighbors are decoded as if they were adjacent
            piece = self._hf.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if self.byte_level:
            if all(character in self._of_character for character in piece):
                return bytes(self._of_character[character] for character in piece)
            return piece.encode()
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(match[1]) if match else None

    def unfinished(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens at the end that form an incomplete character."""
        if self._opaque:
            sizes = range(min(len(tokens), _CONTEXT) + 1)
            complete_sizes = (n for n in sizes if not self._ends_broken(tokens[: len(tokens) - n]))
            return next(complete_sizes, 0)
        data, size = b"", 0
        while size < len(tokens) and len(data) < _LONGEST_START:
            part = self.bytes_of(tokens[-1 - size])
            if part is None:
                break
            data, size = part + data, size + 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(data)
        missing, count = len(decoder.getstate()[0]), 0
        while missing > 0:
            count += 1
            missing -= len(self.bytes_of(tokens[-count]) or b"")
        return count

    def _ends_broken(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and self.decode(tokens[-_CONTEXT:]).endswith(_REPLACEMENT)

    def unsettled(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens at the end whose text a later token may change."""
        if not self.holds_runs:
            return self.unfinished(tokens)
        count = 0
        while count < len(tokens) and self.bytes_of(tokens[-1 - count]) is not None:
            count += 1
        return count


@lru_cache(maxsize=8)
def detokenizer_of(tokenizer: Any, skip_special_tokens: bool = True) -> Detokenizer:
    """Return the cached detokenizer of a tokenizer."""
    return Detokenizer(tokenizer, skip_special_tokens)


def _decoder_types(tokenizer: Any) -> set[str]:
    """Return the types of the decoding steps of a transformers tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


@dataclass(frozen=True)
class TokenText:
    """Part of a text that belongs to one token. The parts of all tokens form the text.

    Attributes:
        token: Token id.
        text: Characters that the token completes; empty for the first tokens of a character.
        data: Bytes of the token in the UTF-8 text.
    """

    token: int
    text: str
    data: bytes


class TextStream:
    """Decoder of one text whose tokens arrive one at a time.

    Attributes:
        unfinished: Number of tokens of an incomplete character at the end of the context. They are
            the first tokens of the text.
        start: Number of characters of the text that these tokens complete.
        settled: Text that no later token changes.
        tail: Text of the remaining tokens, assuming that none follows.
    """

    def __init__(self, detokenizer: Detokenizer, context: Sequence[int] = ()) -> None:
        """Start a text.

        Args:
            detokenizer: Detokenizer of the model's tokenizer.
            context: Token ids before the text. They determine whether it begins with a space, and
                may end within a character that the first tokens of the text complete.
        """
        self._detokenizer = detokenizer
        self.unfinished = detokenizer.unfinished(context)
        first = len(context) - self.unfinished
        self._before, self._before_text = self._window(context[:first])
        self._pending = list(context[first:])
        self._growth: list[str] = []  # the tail after each pending token
        for size in range(1, self.unfinished + 1):
            self._growth.append(self._decode(self._pending[:size]))
        self.settled = ""
        self.tail = self._growth[-1] if self._growth else ""
        self.start = len(self.certain)

    @property
    def text(self) -> str:
        """Text of all tokens, assuming that none follows."""
        return self.settled + self.tail

    @property
    def certain(self) -> str:
        """Text that no later token changes."""
        if not self._pending:
            return self.settled
        if self._detokenizer.byte_level:  # one replacement character for the incomplete bytes
            return self.settled + self.tail[:-1]
        return self.settled

    def add(self, token: int) -> list[TokenText]:
        """Add a token and return the parts of all tokens, also of the context, that it settles."""
        self._pending.append(token)
        self.tail = self._decode(self._pending)
        self._growth.append(self.tail)
        settled = len(self._pending) - self._detokenizer.unsettled(self._pending)
        # The first bytes of the last token may still belong to a character of those before.
        if 0 < settled < len(self._pending) and not self.tail.startswith(self._growth[settled - 1]):
            return []
        return self._settle(settled)

    def flush(self) -> list[TokenText]:
        """Settle all tokens, assuming that none follows, and return their parts."""
        return self._settle(len(self._pending))

    def _settle(self, count: int) -> list[TokenText]:
        """Settle the first pending tokens and return their parts."""
        if not count:
            return []
        text = self._growth[count - 1]
        parts = self._parts(self._pending[:count], self._growth[:count])
        self.settled += text
        self._before += self._pending[:count]
        self._before_text += text
        self.tail = self.tail[len(text) :]
        self._pending = self._pending[count:]
        self._growth = [grown[len(text) :] for grown in self._growth[count:]]
        if len(self._before) > 4 * _CONTEXT:
            self._before, self._before_text = self._window(self._before)
        return parts

    def spell(self, token: int) -> tuple[str, bytes]:
        """Return the text and bytes that a token would add in place of the next one.

        A special token is represented by its name, and a part of a character by `bytes:` and
        escape sequences.
        """
        tokens = [*self._pending, token]
        text, so_far = self._decode(tokens), self.tail
        if not text.startswith(so_far):
            so_far = self.certain[len(self.settled) :]
        text = text[len(so_far) :] or self._detokenizer.name(token)
        data = self._detokenizer.bytes_of(token) or text.encode()
        if self._detokenizer.unfinished(tokens) or data != text.encode() == _BROKEN:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return text, data

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._detokenizer.decode([*self._before, *tokens])
        return text[len(self._before_text) :]

    def _window(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Return the last tokens that have text, which determine how the next one is decoded."""
        size = _CONTEXT
        while tokens:
            window = list(tokens[-size:])
            text = self._detokenizer.decode(window)
            if size >= len(tokens) or (text and not self._detokenizer.unsettled(window[:1])):
                return window, text
            size *= 2
        return [], ""

    def _parts(self, tokens: Sequence[int], growth: Sequence[str]) -> list[TokenText]:
        text, done, texts = growth[-1], 0, []
        for grown in [*growth[:-1], text]:
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(grown, text))
            done, last = max(done, sum(1 for _ in alike)), done
            texts.append(text[last:done])
        data = [self._detokenizer.bytes_of(token) for token in tokens]
        numbers = [part for part in data if part is not None]
        if len(numbers) < len(data) or b"".join(numbers) != text.encode():
            numbers = [part.encode() for part in texts]
        return [TokenText(*part) for part in zip(tokens, texts, numbers)]
