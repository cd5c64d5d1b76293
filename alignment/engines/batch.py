"""Batches of token ids, in rows of one sample or of several consecutive samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class TokenSample:
    """Prompt and its response, in tokens.

    Attributes:
        tokens: Token ids of both.
        prompt: Number of prompt tokens, at least 1. The other tokens are trained on.
        extras: Numbers for each token, or one for all tokens, by name: an advantage for example, or
            log-probabilities of the sampler.
    """

    tokens: Sequence[int]
    prompt: int = 1
    extras: Mapping[str, float | Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the length of the prompt."""
        if not 0 < self.prompt <= len(self.tokens):
            raise ValueError(f"{self.prompt} prompt tokens of a sample of {len(self.tokens)}")


@dataclass(frozen=True)
class TokenBatch:
    """Rows of equal length, with the data of a token at the token's position.

    Attributes:
        tokens: int64 `[rows, length]`.
        samples: int64 `[rows, length]`, number of a token's sample in its row, from 0. `PADDING`
            after the last sample.
        loss_mask: bool `[rows, length]`, tokens that are trained on. The first token of a sample is
            not one of them, because nothing predicts it.
        extras: fp32 `[rows, length]`, by name.
    """

    tokens: Tensor
    samples: Tensor
    loss_mask: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Sequence[TokenSample], length: int | None = None) -> "TokenBatch":
        """Create a batch with one row per sample.

        Args:
            samples: Samples.
            length: Length of the rows. Default: that of the longest sample.
        """
        return cls.of_rows([[sample] for sample in samples], length)

    @classmethod
    def packed(cls, samples: Sequence[TokenSample], length: int) -> "TokenBatch":
        """Create a batch by putting each sample into the first row with room for it, longest first.

        Raises:
            ValueError: A sample is longer than a row.
        """
        rows: list[list[TokenSample]] = []
        room: list[int] = []
        for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
            size = len(sample.tokens)
            if size > length:
                raise ValueError(f"a sample of {size} tokens does not fit a row of {length}")
            place = next((row for row, left in enumerate(room) if left >= size), len(rows))
            if place == len(rows):
                rows.append([])
                room.append(length)
            rows[place].append(sample)
            room[place] -= size
        return cls.of_rows(rows, length)

    @classmethod
    def balanced(cls, samples: Sequence[TokenSample], length: int) -> "TokenBatch":
        """Pack samples into as few rows as `packed`, filled as evenly as possible.

        Rows are as long as the fullest one, so that little of the computation is on padding.

        Raises:
            ValueError: A sample is longer than a row.
        """
        packed = cls.packed(samples, length)
        rows: list[list[TokenSample]] = [[] for _ in range(packed.rows)]
        tokens = [0] * packed.rows
        for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
            place = min(range(len(rows)), key=tokens.__getitem__)
            rows[place].append(sample)
            tokens[place] += len(sample.tokens)
        if max(tokens, default=0) > length:
            return packed
        return cls.of_rows(rows)

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[TokenSample]], length: int | None = None
    ) -> "TokenBatch":
        """Create one row from each list of samples, padded at the end."""
        longest = max((sum(len(sample.tokens) for sample in row) for row in rows), default=0)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"samples of {longest} tokens do not fit a row of {length}")
        shape = (len(rows), length)
        tokens = torch.zeros(shape, dtype=torch.int64)
        numbers = torch.full(shape, PADDING)
        mask = torch.zeros(shape, dtype=torch.bool)
        names = sorted({name for row in rows for sample in row for name in sample.extras})
        extras = {name: torch.zeros(shape) for name in names}
        for place, row in enumerate(rows):
            begin = 0
            for number, sample in enumerate(row):
                end = begin + len(sample.tokens)
                tokens[place, begin:end] = torch.as_tensor(sample.tokens)
                numbers[place, begin:end] = number
                mask[place, begin + sample.prompt : end] = True
                for name in names:
                    extras[name][place, begin:end] = torch.as_tensor(sample.extras[name])
                begin = end
        return cls(tokens, numbers, mask, extras)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Length of a row, in tokens."""
        return self.tokens.shape[1]

    @cached_property
    def is_packed(self) -> bool:
        """Whether any row has more than one sample."""
        return bool((self.samples > 0).any())

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the tokens in samples, int64 `[rows, length]`; padding is a sample."""
        index = torch.arange(self.length, device=self.tokens.device)
        begins = self.samples != F.pad(self.samples, (1, 0), value=PADDING - 1)[:, :-1]
        return index - torch.where(begins, index, 0).cummax(dim=1).values

    @cached_property
    def predicted(self) -> Tensor:
        """Tokens that follow others of their sample, bool `[rows, length]`."""
        return (self.samples != PADDING) & (self.positions > 0)

    @cached_property
    def last(self) -> Tensor:
        """Last token of each sample, bool `[rows, length]`."""
        following = F.pad(self.samples, (0, 1), value=PADDING)[:, 1:]
        return (self.samples != PADDING) & (self.samples != following)

    def sum_by_sample(self, values: Tensor) -> Tensor:
        """Return sums over the tokens of each sample, in the order of rows and samples.

        Args:
            values: Values of the tokens, `[rows, length]`.

        Returns:
            `[samples]`.
        """
        real = self.samples != PADDING
        row = torch.arange(self.rows, device=values.device).unsqueeze(1)
        key = (row * (self.length + 1) + self.samples)[real]
        _, place = key.unique(return_inverse=True)
        count = int(place.max()) + 1 if len(place) else 0
        return values.new_zeros(count).index_add(0, place, values[real])

    def to(self, device: torch.device | int | str) -> "TokenBatch":
        """Return the batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def slice(self, rows: slice) -> "TokenBatch":
        """Return some of the rows."""
        return self._each(lambda tensor: tensor[rows])

    def padded(self, rows: int, length: int) -> "TokenBatch":
        """Return the batch with padding up to a number of rows and a length."""
        padding = (0, length - self.length, 0, rows - self.rows)
        padded = self._each(lambda tensor: F.pad(tensor, padding))
        return replace(padded, samples=F.pad(self.samples, padding, value=PADDING))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TokenBatch":
        return TokenBatch(
            change(self.tokens),
            change(self.samples),
            change(self.loss_mask),
            {name: change(tensor) for name, tensor in self.extras.items()},
        )
