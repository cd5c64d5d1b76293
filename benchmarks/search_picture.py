"""Draw the search for a cutoff, round by round, for `docs/reference/order-statistics.md`.

Two ranks search the 1,250th largest of 20,000 logits, which they draw from different distributions.
The search is that of the library, with far fewer words per round than usual, so that there are
several rounds with visible bins.

    python benchmarks/search_picture.py [--output docs/pictures/cutoff_search.png]
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.moe import bracket_search, packed_bins
from megatron_ext.moe.candidates import order_preserving_image, value_of_image
from megatron_ext.moe.order_statistics import kth_largest
from tests.distributed import run_ranks

RANKS, TOKENS, K, WORDS = 2, 20000, 1250, 5
FIRST_BRACKET = 0.9, 1.9  # similar to a forecast


def search() -> dict[str, Any]:
    """Return the logits of a rank, and the ends and division of the bracket in each round."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(TOKENS // RANKS, 1, generator=generator) * (1 - 0.3 * rank) - 0.4 * rank
    rounds: list[tuple[int, int, int]] = []
    narrow = bracket_search._Brackets.narrow

    def recorded(brackets: Any, plan: packed_bins.PackedBins, counts: Any) -> torch.Tensor:
        if not plan.alone:  # the last round, in which the only value left is sent, has no bins
            rounds.append((int(brackets.low), int(brackets.high), int(plan.bins)))
        return narrow(brackets, plan, counts)

    low, high = (torch.tensor([end]) for end in FIRST_BRACKET)
    with (
        mock.patch.object(bracket_search._Brackets, "narrow", recorded),
        mock.patch.object(packed_bins, "_LEAST_WORDS", WORDS),
        mock.patch.object(packed_bins, "_WORDS_PER_COLUMN", WORDS),
    ):
        cutoffs = kth_largest([logits], [lambda _: K], dist.group.WORLD, [(low, high)])
    return {"logits": logits.view(-1), "rounds": rounds, "cutoff": float(cutoffs.value)}


def draw(ranks: list[dict[str, Any]], output: Path) -> None:
    """Draw the histogram of each round, with the counts of the ranks on top of each other."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from megatron_ext.reports.plotting import BLUE, VERMILION

    logits = [rank["logits"] for rank in ranks]
    rounds, cutoff = ranks[0]["rounds"], ranks[0]["cutoff"]
    figure = Figure(figsize=(9, 2.1 * (1 + len(rounds))), layout="constrained")
    whole, *panels = figure.subplots(1 + len(rounds), 1)
    edges = np.linspace(-4, 4, 81)
    whole.hist([part.numpy() for part in logits], edges, stacked=True, color=[BLUE, VERMILION])
    whole.axvspan(*FIRST_BRACKET, color="#DDD", zorder=0)
    whole.set_title(f"All {TOKENS:,} logits; gray: the first bracket, from a forecast", loc="left")
    images = [order_preserving_image(part).long() for part in logits]
    for number, (axes, (low, high, bins)) in enumerate(zip(panels, rounds, strict=True), 1):
        width = high - low + 1
        at = [low + -(-bin * width // bins) for bin in range(bins + 1)]
        ends = value_of_image(torch.tensor(at)).double().numpy()
        counts = []
        for image in images:
            inside = image[(image >= low) & (image <= high)] - low
            counts.append(torch.bincount(inside * bins // width, minlength=bins).numpy())
        bottom = np.zeros(bins)
        for rank, (count, color) in enumerate(zip(counts, (BLUE, VERMILION), strict=True)):
            axes.bar(
                ends[:-1], count, np.diff(ends), bottom, align="edge", color=color,
                edgecolor="white", linewidth=0.4, label=f"rank {rank}",
            )  # fmt: skip
            bottom += count
        total = int(bottom.sum())
        above = sum(int((image > high).sum()) for image in images)
        axes.set_title(
            f"Round {number}: {total:,} values in the bracket, {above:,} above it, {bins} bins",
            loc="left",
        )
        chosen = int(np.searchsorted(ends, cutoff, side="right")) - 1
        axes.axvspan(ends[chosen], ends[chosen + 1], color="#DDD", zorder=0)
        axes.set_xlim(ends[0], ends[-1])
    for axes in (whole, *panels):
        axes.axvline(cutoff, color="black", lw=1)
        axes.set_ylabel("values")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel(f"logit; line: the answer, {cutoff:.7g}, the {K:,}th largest")
    figure.savefig(output, dpi=110)


def main() -> None:
    """Run the search on two ranks and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/pictures/cutoff_search.png"),
        metavar="FILE",
        help="Picture to write. Default: docs/pictures/cutoff_search.png.",
    )
    draw(run_ranks(search, RANKS), parser.parse_args().output)


if __name__ == "__main__":
    main()
