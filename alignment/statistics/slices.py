"""Kinds of items over which agreement is told apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    """What an item's key is.

    Attributes:
        keys: of all items, from the judges and, where they are needed, the items.
    """

    keys: Callable[[AgreementData, Sequence[Judgeable]], list[str]]
    needs_items: bool = True


def _of_gold(compared: AgreementData, items: Sequence[Judgeable]) -> list[str]:
    labels = compared.labels()[0]
    if compared.a.pairwise:
        return [_SIDES.get(x, "none") for x in labels]
    return ["none" if np.isnan(x) else f"{np.floor(x + 0.5):.0f}" for x in labels]


def _of_length(compared: AgreementData, items: Sequence[Judgeable]) -> list[str]:
    """Thirds of the items by the words of what was judged."""
    words = np.array([len(_text(item).split()) for item in items])
    cuts = np.quantile(words, [1 / 3, 2 / 3])
    names = (*(f"up to {math.floor(cut)} words" for cut in cuts), "longer")
    return [names[int(np.searchsorted(cuts, count))] for count in words]


def _text(item: Judgeable) -> str:
    return item.text if isinstance(item, Response) else f"{item.first} {item.second}"


SLICES = {
    "source": Slice(lambda compared, items: [item.source or "none" for item in items]),
    "prompt-source": Slice(
        lambda compared, items: [item.prompt.source or "none" for item in items]
    ),
    "length": Slice(_of_length),
    "gold": Slice(_of_gold, needs_items=False),
}


def read_items(path: Path, wanted: Sequence[str]) -> list[Judgeable]:
    """The items that were judged, in the order wanted.

    Raises:
        UserError: the file holds something else, or lacks one.
    """
    rows: list[Judgeable] = read_all(path, Response, Pair)
    by_id = {row.id: row for row in rows}
    if missing := [item for item in wanted if item not in by_id]:
        raise UserError(f"{path} lacks {len(missing)} items with verdicts, {missing[0]!r} for one")
    return [by_id[item] for item in wanted]


def keys_of(
    name: str, compared: AgreementData, items: Sequence[Judgeable] | None, most: int
) -> dict[str, Indices]:
    """Places of the items of each slice; beyond the most frequent ones they are together."""
    keys = SLICES[name].keys(compared, items or ())
    kept = set(largest(keys, most))
    keys = [key if key in kept else "others" for key in keys]
    return {keys[group[0]]: group for group in sorted(groups_of(keys), key=lambda g: keys[g[0]])}
