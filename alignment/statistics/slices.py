"""Slices of items, over each of which agreement is reported separately."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.data.read_options import ReadOptions
from alignment.record_files import read_all
from alignment.records import Pair, Response
from alignment.statistics.agreement_measures import AgreementData
from alignment.statistics.bootstrap import Indices
from alignment.statistics.verdict_alignment import groups_of, largest
from megatron_ext.errors import UserError

Judgeable = Response | Pair
_SIDES = {1.0: "first", 0.5: "tie", 0.0: "second"}


@dataclass(frozen=True)
class Slice:
    """Way to divide items into slices.

    Attributes:
        keys: Function that returns the slice of every item, from the verdicts and the items.
        needs_items: Whether `keys` needs the items; if not, it accepts an empty sequence.
        order: Function that returns by what the slices are sorted. Default: by their names.
    """

    keys: Callable[[AgreementData, Sequence[Judgeable]], list[str]]
    needs_items: bool = True
    order: Callable[[str], Any] = str


def _of_gold(compared: AgreementData, items: Sequence[Judgeable]) -> list[str]:
    labels = compared.labels()[0]
    if compared.a.pairwise:
        return [_SIDES.get(x, "none") for x in labels]
    return ["none" if np.isnan(x) else f"{np.floor(x + 0.5):.0f}" for x in labels]


def _of_length(compared: AgreementData, items: Sequence[Judgeable]) -> list[str]:
    """Return the third of each item by the number of words in its text."""
    words = np.array([len(_text(item).split()) for item in items])
    cuts = np.quantile(words, [1 / 3, 2 / 3])
    names = (*(f"up to {math.floor(cut)} words" for cut in cuts), "longer")
    return [names[int(np.searchsorted(cuts, count))] for count in words]


def _most_words(name: str) -> float:
    return math.inf if name == "longer" else float(name.split()[2])


def _text(item: Judgeable) -> str:
    return item.text if isinstance(item, Response) else f"{item.first} {item.second}"


SLICES = {
    "source": Slice(lambda compared, items: [item.source or "none" for item in items]),
    "prompt-source": Slice(
        lambda compared, items: [item.prompt.source or "none" for item in items]
    ),
    "length": Slice(_of_length, order=_most_words),
    "gold": Slice(_of_gold, needs_items=False),
}


def read_items(
    path: Path, ids: Sequence[str], options: ReadOptions | None = None
) -> list[Judgeable]:
    """Read the items that were judged, in the order of their ids.

    Args:
        path: File of responses or pairs.
        ids: Ids of the items.
        options: How a file of another project is read.

    Raises:
        UserError: The file contains other records, or lacks an item.
    """
    rows: list[Judgeable] = read_all(path, Response, Pair, options=options)
    by_id = {row.id: row for row in rows}
    if missing := [item for item in ids if item not in by_id]:
        raise UserError(f"{path} lacks {len(missing)} items with verdicts, {missing[0]!r} for one.")
    return [by_id[item] for item in ids]


def keys_of(
    name: str, compared: AgreementData, items: Sequence[Judgeable] | None, max_slices: int
) -> dict[str, Indices]:
    """Return the indices of the items of each slice.

    Args:
        name: Name of a slicing in `SLICES`.
        compared: Verdicts of both judges.
        items: Items that were judged; None where the slicing does not need them.
        max_slices: Largest number of slices; the less frequent ones are united as "others".
    """
    keys = SLICES[name].keys(compared, items or ())
    frequent = set(largest(keys, max_slices))
    keys = [key if key in frequent else "others" for key in keys]
    groups = {keys[group[0]]: group for group in groups_of(keys)}
    return {key: groups[key] for key in sorted(groups, key=SLICES[name].order)}
