"""Normalization of text, which undoes disguises by Unicode characters.

Full-width and mathematical letters, accents and stacked marks, look-alike letters of other
alphabets, invisible characters, digits in place of letters and letters with spaces between them are
replaced by the plain letters that a reader sees. Positions map back to the text as generated.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

_PUNCTUATION = str.maketrans({
    "‘": "'", "’": "'", "ʼ": "'", "`": "`", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"',
    "‐": "-", "‑": "-", "–": "-", "—": "-", "−": "-", "\u00a0": " ", "\u202f": " ",
})  # fmt: skip

# Letters that look like Latin ones, beyond what Unicode calls compatible.
_LOOK_ALIKES = dict(
    zip(
        "аеорсухіјѕԁһӏԛԝвкмнтгпАВЕКМНОРСТУХІЈЅԌԚԜ"
        "αεοριυνκτχωγμσηβΑΒΕΖΗΙΚΜΝΟΡΤΥΧ"
        "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢıɑɡ",
        "aeopcyxijsdhlqwbkmhtrnABEKMHOPCTYXIJSGQW"
        "aeopiuvktxwymonbABEZHIKMNOPTYX"
        "abcdefghijklmnoprstuvwyziag",
        strict=True,
    )
)
_WORD = re.compile(r"\w+")
_LATIN = re.compile("[a-zA-Z]")
# A digit or sign between letters of a word, or before four of them, is read as a letter.
_LEET = re.compile(
    r"(?<=[a-zA-Z])[013457@$](?=[a-zA-Z])|(?<!\w)[013457@$](?=[a-zA-Z][a-zA-Z0-9]{2})"
)
_LETTERS = dict(zip("013457@$", "oieastas", strict=True))
# At least five single letters with one separator each.
_SPACED = re.compile(r"(?<!\w)[a-zA-Z](?:([ ._-])[a-zA-Z](?!\w))(?:\1[a-zA-Z](?!\w)){3,}")


@dataclass(frozen=True)
class NormalizedText:
    """Text in plain letters.

    Attributes:
        text: Text that the detectors read.
        source: Text as generated.
        origins: Index in `source` of each character of `text`; None if both have the same indices.
    """

    text: str
    source: str
    origins: Sequence[int] | None = None

    def original(self, start: int, end: int) -> str:
        """Return the piece of the source that became `text[start:end]`."""
        if self.origins is None:
            return self.source[start:end]
        if start >= end:
            return ""
        first, last = self.origins[start], self.origins[end - 1]
        following = bisect_right(self.origins, last)
        stop = self.origins[following] if following < len(self.origins) else len(self.source)
        return self.source[first:stop]


def normalize(text: str) -> NormalizedText:
    """Return a text in plain letters."""
    plain = text if text.isascii() else text.translate(_PUNCTUATION)
    origins: Sequence[int] | None = None
    if not plain.isascii():
        pieces = [_plain(character) for character in plain]
        joined = "".join(pieces)
        if len(joined) != len(plain) or not all(len(piece) == 1 for piece in pieces):
            origins = [position for position, piece in enumerate(pieces) for _ in piece]
        plain = _latin_words(joined)
    plain = _LEET.sub(lambda match: _LETTERS[match[0]], plain)
    if _SPACED.search(plain):
        mask = [True] * len(plain)
        for match in _SPACED.finditer(plain):
            for position in range(match.start() + 1, match.end(), 2):
                mask[position] = False
        before = range(len(plain)) if origins is None else origins
        origins = [position for position, keep in zip(before, mask) if keep]
        plain = "".join(character for character, keep in zip(plain, mask) if keep)
    return NormalizedText(plain, text, origins)


@lru_cache(1 << 16)
def _plain(character: str) -> str:
    """Return the plain form of a character; an empty string if it is invisible."""
    code = ord(character)
    if 0xE0020 <= code <= 0xE007E:  # tag characters, which spell ASCII invisibly
        return chr(code - 0xE0000)
    if unicodedata.category(character) in ("Cf", "Cs") or 0xFE00 <= code <= 0xFE0F:
        return ""
    if 0x0300 <= code <= 0x036F or 0x20D0 <= code <= 0x20FF or 0x1AB0 <= code <= 0x1AFF:
        return ""
    for first in (0x1F150, 0x1F170, 0x1F1E6):  # letters in circles, boxes and flags
        if first <= code < first + 26:
            return chr(code - first + ord("a"))
    base = "".join(c for c in unicodedata.normalize("NFKD", character) if not _is_accent(c))
    if base.isascii():
        return base
    return unicodedata.normalize("NFKC", character)


def _is_accent(character: str) -> bool:
    return 0x0300 <= ord(character) <= 0x036F


def _latin_words(text: str) -> str:
    """Replace look-alikes in words that then consist of Latin letters alone.

    A word without any Latin letter, which may be of another language, is left as it is unless most
    letters of the text are Latin.
    """
    mostly_latin = 2 * len(_LATIN.findall(text)) >= sum(map(str.isalpha, text))

    def replace(match: re.Match[str]) -> str:
        word = match[0]
        if word.isascii() or not (mostly_latin or _LATIN.search(word)):
            return word
        latin = "".join(_LOOK_ALIKES.get(character, character) for character in word)
        return latin if latin.isascii() else word

    return _WORD.sub(replace, text)
