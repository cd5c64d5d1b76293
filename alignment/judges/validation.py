"""How a judge in training agrees with gold on held-out items."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignment.judges.kinds.local_judge import LocalJudge
from alignment.judges.training_examples import Labelled
from alignment.ranks import map_over_data_ranks
from alignment.records import Verdict
from alignment.rounding import EXACT, exceeds
from alignment.statistics.agreement_measures import Compared, alone
from alignment.statistics.coefficients import Undefined
from alignment.statistics.verdict_alignment import by_item, judged

BEST = {False: "val/alpha_interval", True: "val/accuracy"}
"""The figure that marks the best judge, of scores and of preferences."""


def is_sound(row: Mapping[str, Any]) -> bool:
    """Whether nine tenths of the items have a verdict: agreement on the few is easily high."""
    return not exceeds(row["val/malformed_rate"] + row["val/failed_rate"], 0.1, EXACT)


def judge_all(
    judge: LocalJudge, rows: Sequence[Labelled], check: Callable[[], None] = lambda: None
) -> list[Verdict]:
    """Verdicts on all questions, on every rank, each asked on one share of the ranks."""
    questions = [row.question for row in rows]
    return map_over_data_ranks(judge.engine, questions, lambda mine: judge.judge(mine, check))


def agreement(gold: Sequence[Verdict], found: Sequence[Verdict]) -> dict[str, float | None]:
    """Figures named `val/...`; None where they are not defined."""
    pairwise = gold[0].score is None
    shares: dict[str, float | None] = {
        "val/malformed_rate": float(np.mean([v.outcome == "unparseable" for v in found])),
        "val/failed_rate": float(np.mean([v.outcome == "failed" for v in found])),
    }
    figures: dict[str, float | None] = {BEST[pairwise]: None}
    if any(verdict.judged for verdict in found):
        items = list(dict.fromkeys(verdict.item for verdict in gold))
        places = np.arange(len(items))
        right = judged(by_item(gold, "gold"), items, "gold")
        judge = judged(by_item(found, "the judge"), items, "the judge")
        compared = Compared(right, judge)
        wanted: dict[str, Callable[[Any], float]] = dict(compared.agreement())
        if pairwise:
            wanted["flip_rate"] = alone(judge)["flip_rate"]
        for name, figure in wanted.items():
            try:
                value: float | None = figure(places)
            except Undefined:
                value = None
            figures[f"val/{name}"] = value if value is not None and math.isfinite(value) else None
    return figures | shares
