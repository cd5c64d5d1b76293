"""Which texts of one list are near to a text of another: MinHash signatures in bands (LSH).

Two texts are as near as the Jaccard similarity of their sets of three consecutive words. A
signature estimates it with a standard error of at most 0.045; texts are compared only when one
band of their signatures is equal, which 98 of 100 pairs at the threshold have, and nearly all
above it.
"""

import re
import tempfile
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

HASHES = 128
SHINGLE = 3  # words
_BATCH = 1 << 15  # pairs of signatures compared at a time
# Scripts that are written without spaces count a character as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_random = np.random.Generator(np.random.PCG64(2603_12246))
_FACTORS = _random.integers(0, 1 << 63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _random.integers(0, 1 << 63, HASHES, dtype=np.uint64)
_PLACES = _random.integers(0, 1 << 63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_LONGEST = 1 << 14  # shingles hashed at a time


def words(text: str) -> list[str]:
    """Words without case, punctuation and compatibility forms; the text where it has no word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(folded) or [folded.strip()]


@lru_cache(1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def _shingles(text: Sequence[str]) -> np.ndarray:
    """Hashes of runs of SHINGLE words; of the whole text where it is shorter. [shingles] uint64"""
    hashes = np.array([_hash(word) for word in text], dtype=np.uint64)
    size = min(SHINGLE, len(hashes))
    count = len(hashes) - size + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        mixed += hashes[place : place + count] * _PLACES[place]
    mixed ^= mixed >> np.uint64(29)
    return mixed * _PLACES[0]


def signature(text: Sequence[str]) -> np.ndarray:
    """The MinHash of a text's words. [HASHES] uint32"""
    shingles = _shingles(text)
    least = np.full(HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles), _LONGEST):
        part = shingles[start : start + _LONGEST, None] * _FACTORS + _TERMS
        least = np.minimum(least, (part >> np.uint64(32)).min(axis=0).astype(np.uint32))
    return least


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band): the most rows that find 98 of 100 pairs at the threshold."""
    for rows in range(16, 1, -1):
        bands = HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.98:
            return bands, rows
    return HASHES, 1


class Signatures:
    """Signatures of many texts, on disk: 512 bytes a text, in a file without a name.

    `add` them all, then compare.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._array: np.ndarray | None = None

    def add(self, text: Sequence[str]) -> None:
        self._file.write(signature(text).tobytes())

    def near(self, texts: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
        """Which of some texts are near to one of the others.

        Args:
            texts, others: numbers of texts, in the order in which they were added.
            threshold: the least similarity, above 0.

        Returns:
            booleans, one for each of `texts`.
        """
        found = np.zeros(len(texts), dtype=bool)
        if not len(texts) or not len(others):
            return found
        if self._array is None:
            self._file.flush()
            self._array = np.memmap(self._file, np.uint32, "r").reshape(-1, HASHES)
        bands, rows = bands_for(threshold)
        for band in range(bands):
            columns = slice(band * rows, (band + 1) * rows)
            keys = self._keys(others, columns)
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            open_ = np.flatnonzero(~found)
            sought = self._keys(texts[open_], columns)
            first = np.searchsorted(keys, sought, "left")
            counts = np.searchsorted(keys, sought, "right") - first
            self._compare(texts, others[order], open_, first, counts, threshold, found)
        return found

    def _keys(self, texts: np.ndarray, columns: slice) -> np.ndarray:
        """The band's hash, so that equal bands sort together. [texts] uint64"""
        assert self._array is not None
        keys = np.zeros(len(texts), dtype=np.uint64)
        for start in range(0, len(texts), _BATCH):
            part = self._array[texts[start : start + _BATCH], columns]
            for column in part.T:
                keys[start : start + _BATCH] = (keys[start : start + _BATCH] + column) * _FACTORS[
                    0
                ] ^ (keys[start : start + _BATCH] >> np.uint64(31))
        return keys

    def _compare(
        self, texts: np.ndarray, others: np.ndarray, open_: np.ndarray, first: np.ndarray,
        counts: np.ndarray, threshold: float, found: np.ndarray,
    ) -> None:  # fmt: skip
        """Compare each open text with its `counts` candidates from `first` on, in rounds: a text
        that has been found needs no further ones."""
        assert self._array is not None
        done = np.zeros_like(counts)
        while (waiting := np.flatnonzero((done < counts) & ~found[open_])).size:
            waiting = waiting[:_BATCH]
            share = max(1, _BATCH // len(waiting))
            taken = np.minimum(counts[waiting] - done[waiting], share)
            ends = np.cumsum(taken)
            within = np.arange(ends[-1]) - np.repeat(ends - taken, taken)
            candidates = others[np.repeat(first[waiting] + done[waiting], taken) + within]
            numbers = np.repeat(open_[waiting], taken)
            equal = self._array[texts[numbers]] == self._array[candidates]
            found[numbers[equal.mean(axis=1) >= threshold]] = True
            done[waiting] += taken
