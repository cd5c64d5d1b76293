"""Search for near-duplicates between two lists of texts, by MinHash signatures in bands (LSH).

The similarity of two texts is the Jaccard similarity of their sets of three consecutive words. A
signature estimates it with a standard error of at most 0.045. Texts are compared only if one band
of their signatures is equal, which holds for 98 of 100 pairs at the threshold and for nearly all
pairs above it.
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
# In scripts without spaces, each character counts as a word.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_random = np.random.Generator(np.random.PCG64(2603_12246))
_FACTORS = _random.integers(0, 1 << 63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _random.integers(0, 1 << 63, HASHES, dtype=np.uint64)
_PLACES = _random.integers(0, 1 << 63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_LONGEST = 1 << 14  # shingles hashed at a time


def words(text: str) -> list[str]:
    """Return the words of a text without case, punctuation and compatibility forms.

    A text without words is returned as one word.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(folded) or [folded.strip()]


@lru_cache(1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def _shingles(text: Sequence[str]) -> np.ndarray:
    """Return the hashes of all runs of SHINGLE words, or of the whole text if it is shorter.

    Args:
        text: Words of the text.

    Returns:
        The hashes, `[shingles]` uint64.
    """
    hashes = np.array([_hash(word) for word in text], dtype=np.uint64)
    size = min(SHINGLE, len(hashes))
    count = len(hashes) - size + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        mixed += hashes[place : place + count] * _PLACES[place]
    mixed ^= mixed >> np.uint64(29)
    return mixed * _PLACES[0]


def signature(text: Sequence[str]) -> np.ndarray:
    """Return the MinHash signature of the words of a text, `[HASHES]` uint32."""
    shingles = _shingles(text)
    least = np.full(HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles), _LONGEST):
        part = shingles[start : start + _LONGEST, None] * _FACTORS + _TERMS
        least = np.minimum(least, (part >> np.uint64(32)).min(axis=0).astype(np.uint32))
    return least


def bands_for(threshold: float) -> tuple[int, int]:
    """Return the number of bands, and of rows per band, for a threshold of similarity.

    The number of rows is the largest one by which 98 of 100 pairs at the threshold share a band.
    """
    for rows in range(16, 1, -1):
        bands = HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.98:
            return bands, rows
    return HASHES, 1


class Signatures:
    """Signatures of many texts, in a temporary file of 512 bytes per text.

    All texts must be added before the first comparison.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._array: np.ndarray | None = None

    def add(self, text: Sequence[str]) -> None:
        """Add a text by its words."""
        self._file.write(signature(text).tobytes())

    def near(self, texts: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
        """Return which of some texts are near-duplicates of one of the others.

        Args:
            texts: Numbers of the texts to check, in the order in which they were added, `[texts]`.
            others: Numbers of the texts to compare with, `[others]`.
            threshold: Smallest similarity of near-duplicates, above 0.

        Returns:
            Whether each text is a near-duplicate, `[texts]` bool.
        """
        near = np.zeros(len(texts), dtype=bool)
        if not len(texts) or not len(others):
            return near
        if self._array is None:
            self._file.flush()
            self._array = np.memmap(self._file, np.uint32, "r").reshape(-1, HASHES)
        bands, rows = bands_for(threshold)
        for band in range(bands):
            columns = slice(band * rows, (band + 1) * rows)
            keys = self._keys(others, columns)
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            remaining = np.flatnonzero(~near)
            queries = self._keys(texts[remaining], columns)
            first = np.searchsorted(keys, queries, "left")
            counts = np.searchsorted(keys, queries, "right") - first
            self._compare(texts, others[order], remaining, first, counts, threshold, near)
        return near

    def _keys(self, texts: np.ndarray, columns: slice) -> np.ndarray:
        """Return the hash of a band of each text, so that equal bands sort together.

        Args:
            texts: Numbers of the texts.
            columns: Columns of the band in the signatures.

        Returns:
            The hashes, `[texts]` uint64.
        """
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
        self, texts: np.ndarray, others: np.ndarray, remaining: np.ndarray, first: np.ndarray,
        counts: np.ndarray, threshold: float, near: np.ndarray,
    ) -> None:  # fmt: skip
        """Compare each remaining text with its candidates, and mark near-duplicates in `near`.

        The comparison proceeds in rounds, as a text needs no further candidates once it is known to
        be a near-duplicate.

        Args:
            texts: Numbers of all texts to check, `[texts]`.
            others: Numbers of the texts to compare with, sorted by the hash of their band.
            remaining: Indices in `texts` of the texts that are not yet marked, `[remaining]`.
            first: Index in `others` of the first candidate of each, `[remaining]`.
            counts: Number of candidates of each, `[remaining]`.
            threshold: Smallest similarity of near-duplicates.
            near: Marks of the near-duplicates, changed in place, `[texts]` bool.
        """
        assert self._array is not None
        done = np.zeros_like(counts)
        while (waiting := np.flatnonzero((done < counts) & ~near[remaining])).size:
            waiting = waiting[:_BATCH]
            share = max(1, _BATCH // len(waiting))
            sizes = np.minimum(counts[waiting] - done[waiting], share)
            ends = np.cumsum(sizes)
            within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
            candidates = others[np.repeat(first[waiting] + done[waiting], sizes) + within]
            numbers = np.repeat(remaining[waiting], sizes)
            equal = self._array[texts[numbers]] == self._array[candidates]
            near[numbers[equal.mean(axis=1) >= threshold]] = True
            done[waiting] += sizes
