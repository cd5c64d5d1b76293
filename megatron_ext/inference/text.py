"""Text of token ids, as tokens arrive one at a time.

A character may take several tokens. Until the last of them has arrived, tokenizers decode the first
ones to replacement characters, which a later token changes.
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
    """Decoder of a model's tokenizer that also reports which bytes a token stands for.

    Attributes:
        byte_level: whether every token is a sequence of bytes, as in byte-level BPE. Otherwise only
            byte pieces such as `<0xE2>` can hold a part of a character.
        holds_runs: whether one invalid byte turns a whole run of byte pieces into replacement
            characters, so that the run is certain only when another token follows.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        """Wrap a tokenizer of Megatron's; `detokenizer_of` does so once for each.

        Args:
            tokenizer: has `detokenize`.
            skip_special_tokens: whether special tokens have no text.
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
            # SentencePiece decodes control tokens to nothing: put their names in.
            named, done = "", 0
            for place, token in enumerate(ids):
                if self._sentencepiece.is_control(token):
                    size = len(self._tokenizer.detokenize(ids[:place]))
                    named += text[done:size] + self._sentencepiece.id_to_piece(token)
                    done = size
            text = named + text[done:]
        return text

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes a token stands for, or None where only its text is known."""
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
                return b""  # its neighbours are decoded as if they were adjacent
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
        """Count the tokens at the end that hold a character which is not complete."""
        if self._opaque:
            sizes = range(min(len(tokens), _CONTEXT) + 1)
            whole = (n for n in sizes if not self._ends_broken(tokens[: len(tokens) - n]))
            return next(whole, 0)
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
        """Count the tokens at the end whose text a later token may change."""
        if not self.holds_runs:
            return self.unfinished(tokens)
        count = 0
        while count < len(tokens) and self.bytes_of(tokens[-1 - count]) is not None:
            count += 1
        return count


@lru_cache(maxsize=8)
def detokenizer_of(tokenizer: Any, skip_special_tokens: bool = True) -> Detokenizer:
    """Return the detokenizer of a tokenizer, the same one every time."""
    return Detokenizer(tokenizer, skip_special_tokens)


def _decoder_types(tokenizer: Any) -> set[str]:
    """Types of the steps by which a tokenizer of transformers decodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


@dataclass(frozen=True)
class TokenText:
    """A token's part of a text. Parts of consecutive tokens join to the text.

    Attributes:
        token: its id.
        text: the characters it completes; empty for the first tokens of a longer character.
        data: its bytes of the text in UTF-8.
    """

    token: int
    text: str
    data: bytes


class TextStream:
    """Decoder of one text whose tokens arrive one at a time.

    Attributes:
        unfinished: tokens at the context's end that begin a character it does not complete. They
            are the first tokens of the text.
        start: characters of the text that are complete in these.
        settled: text that no later token changes.
        tail: text of the tokens after that, as it would be if none followed.
    """

    def __init__(self, detokenizer: Detokenizer, context: Sequence[int] = ()) -> None:
        """Start a text.

        Args:
            detokenizer: of the model's tokenizer.
            context: token ids before the text. They decide whether it begins with a space, and may
                end within a character that the text's first tokens complete.
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
        """All text, as it would be if no token followed."""
        return self.settled + self.tail

    @property
    def certain(self) -> str:
        """The text that no later token changes."""
        if not self._pending:
            return self.settled
        if self._detokenizer.byte_level:  # one replacement character for the incomplete bytes
            return self.settled + self.tail[:-1]
        return self.settled

    def add(self, token: int) -> list[TokenText]:
        """Take a token; return the parts of all tokens that are settled now, those of the context
        among them."""
        self._pending.append(token)
        self.tail = self._decode(self._pending)
        self._growth.append(self.tail)
        settled = len(self._pending) - self._detokenizer.unsettled(self._pending)
        # The first bytes of the last token may still belong to a character of those before.
        if 0 < settled < len(self._pending) and not self.tail.startswith(self._growth[settled - 1]):
            return []
        return self._settle(settled)

    def flush(self) -> list[TokenText]:
        """Settle all tokens as if none followed; return their parts."""
        return self._settle(len(self._pending))

    def _settle(self, count: int) -> list[TokenText]:
        """Settle the first pending tokens."""
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
        """Return text and bytes that another token would add in the next one's place.

        A special token is named; a part of a character is written as `bytes:` and escapes.
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
        whole = self._detokenizer.decode([*self._before, *tokens])
        return whole[len(self._before_text) :]

    def _window(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The last tokens that have any text, which decide how the next one is decoded."""
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
        known = [part for part in data if part is not None]
        if len(known) < len(data) or b"".join(known) != text.encode():
            known = [part.encode() for part in texts]
        return [TokenText(*part) for part in zip(tokens, texts, known)]
