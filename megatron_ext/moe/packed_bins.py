"""Histograms of a search round, packed into 64-bit words that the ranks sum in one reduction."""

from typing import NamedTuple

import torch
from torch import Tensor

# Least number of words of a round in all (32 KiB), and their average number per column.
_LEAST_WORDS, _WORDS_PER_COLUMN = 4096, 11
_WORD_BITS = 63  # the sign bit is not used
# Factor by which a bracket gets more words than others if it is so wide that the usual rounds would
# not exhaust it, or if it had to be replaced. There are few of either.
_WIDE, _WIDE_SHARE = 1 << 26, 64


class BinCounts(NamedTuple):
    """Counts of a round's bins, with the bins of all columns in a row.

    Attributes:
        counts: int64 `[bins]`, values in each bin over all ranks.
        below: int64 `[bins + 1]`, values in all bins before each one, those of other columns too.
        first: int64 `[columns]`, index of a column's lowest bin.
        last: int64 `[columns]`, index of a column's highest bin.
        lone: int64 `[columns]`, distance of the value from the lower end of a bracket that has one.
    """

    counts: Tensor
    below: Tensor
    first: Tensor
    last: Tensor
    lone: Tensor


class PackedBins(NamedTuple):
    """Division of brackets into bins, and the layout of the bins' counts in 64-bit words.

    The number of values in each bracket, over all ranks, is known from the round before. No count
    of a bin exceeds it, so a count has a fixed field of just enough bits, also in the sum over
    ranks: nothing is carried from one field to the next. The fewer values are left, the more bins
    share a word. A bracket with one value needs no bins: its word is the value itself, as the
    distance from the lower end of the bracket.

    Two ranks count seven values between 0 and 15 in four bins of three bits each:

    >>> column, seven = torch.zeros(7, dtype=torch.int64), torch.tensor([3, 9, 12, 5, 9, 14, 15])
    >>> plan = PackedBins(
    ...     width=torch.tensor([16]), bins=torch.tensor([4]), first_word=torch.tensor([0]),
    ...     alone=torch.tensor([False]), bits=3, bins_per_word=4, word_count=1)
    >>> _, first = plan.pack(column[:3], seven[:3])
    >>> _, second = plan.pack(column[3:], seven[3:])
    >>> f"{first[0]:012b} + {second[0]:012b} = {(first + second)[0]:012b}"
    '001001000001 + 010001001000 = 011010001001'
    >>> plan.unpack(first + second).counts[:4].tolist()  # 0..3, 4..7, 8..11, 12..15
    [1, 1, 2, 3]

    Attributes:
        width: int64 `[columns]`, number of integers in each bracket.
        bins: int64 `[columns]`, number of bins of each bracket; 0 for a finished column.
        first_word: int64 `[columns]`, place of each column's words. A finished column, which has
            none, points to a spare word at the end.
        alone: bool `[columns]`, whether a bracket has one value.
        bits: Bits of a count.
        bins_per_word: Number of counts in a word.
        word_count: Number of words, without the spare one.
    """

    width: Tensor
    bins: Tensor
    first_word: Tensor
    alone: Tensor
    bits: int
    bins_per_word: int
    word_count: int

    @staticmethod
    def divide(
        width: Tensor, inside: Tensor, done: Tensor, replaced: Tensor, pending: Tensor
    ) -> "tuple[PackedBins, int]":
        """Give each bracket as many bins as fit in its share of the round's words.

        Args:
            width: int64 `[columns]`, number of integers in each bracket.
            inside: int64 `[columns]`, bound on the number of values in each bracket, at least 1.
            done: bool `[columns]`, columns that need no bins.
            replaced: bool `[columns]`, columns whose last bracket did not contain the answer.
            pending: int64 `[]`, a number that the caller needs on the host, too: the host then
                waits for the device once.

        Returns:
            The division, and `pending` on the host.
        """
        alone = ~done & (inside == 1)
        searching = ~(done | alone)
        most = inside.where(searching, 1).max()
        bits = torch.frexp(most.double()).exponent.long()  # of the number in binary
        per_word = _WORD_BITS // bits
        share = torch.where(replaced | (width > _WIDE), _WIDE_SHARE, 1).where(searching, 0)
        total = max(_LEAST_WORDS, _WORDS_PER_COLUMN * width.numel())
        words = share * total // share.sum().clamp(min=1)
        words = torch.minimum(words, (width + per_word - 1) // per_word).clamp(min=1)
        words = words.masked_fill(alone, 1).masked_fill(done, 0)
        sizes = torch.stack([bits, per_word, words.sum(), pending]).tolist()
        bins = torch.minimum(words * per_word, width)
        first_word = (words.cumsum(0) - words).masked_fill(done, sizes[2])
        return PackedBins(width, bins, first_word, alone, *sizes[:3]), sizes[3]

    def pack(self, column: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Count this rank's values.

        Args:
            column: int64 `[values]`, column of each value.
            offset: int64 `[values]`, distance from the lower end of the column's bracket.

        Returns:
            Each value's bin within its bracket, int64 `[values]`, and the packed counts, int64
            `[word_count + 1]`. The sum of these over the ranks is for :meth:`unpack`.
        """
        bin = offset * self.bins.take(column) // self.width.take(column)
        count = 1 << (bin % self.bins_per_word * self.bits)
        words = torch.zeros(self.word_count + 1, dtype=torch.int64, device=column.device)
        words.index_add_(
            0,
            self.first_word.take(column) + bin // self.bins_per_word,
            torch.where(self.alone.take(column), offset, count),
        )
        return bin, words

    def unpack(self, words: Tensor) -> BinCounts:
        """Return the counts of all ranks from their summed words, which are changed."""
        lone = words[self.first_word]
        words[self.first_word] = lone.masked_fill(self.alone, 1)  # a count like the others
        shifts = self.bits * torch.arange(self.bins_per_word, device=words.device)
        counts = ((words.unsqueeze(1) >> shifts) & ((1 << self.bits) - 1)).view(-1)
        below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        first = self.first_word * self.bins_per_word
        return BinCounts(counts, below, first, first + self.bins.clamp(min=1) - 1, lone)
