"""Agreement with gold, on held-out items, of a judge that is being trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignment.judges.kinds.local_judge import LocalJudge
from alignment.judges.training_examples import LabeledQuestion
from alignment.ranks import map_over_data_ranks
from alignment.records import Verdict
from alignment.rounding import EXACT, exceeds
from alignment.statistics.agreement_measures import AgreementData, judge_measures
from alignment.statistics.coefficients import Undefined
from alignment.statistics.verdict_alignment import align_verdicts, verdicts_by_item

BEST = {False: "val/alpha_interval", True: "val/accuracy"}
"""The measure that selects the best judge, by whether it compares pairs."""


def is_sound(row: Mapping[str, Any]) -> bool:
    """Return whether nine tenths of the items have a verdict, because few may agree by chance."""
    return not exceeds(row["val/malformed_rate"] + row["val/failed_rate"], 0.1, EXACT)


def judge_all(
    judge: LocalJudge, rows: Sequence[LabeledQuestion], check: Callable[[], None] = lambda: None
) -> list[Verdict]:
    """Return the verdicts on all questions on every rank, which divide the questions among them."""
    questions = [row.question for row in rows]
    return map_over_data_ranks(judge.engine, questions, lambda part: judge.judge(part, check))


def agreement(gold: Sequence[Verdict], verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Return measures of agreement by names `val/...`; None where a measure is not defined."""
    pairwise = gold[0].score is None
    shares: dict[str, float | None] = {
        "val/malformed_rate": float(np.mean([v.outcome == "unparseable" for v in verdicts])),
        "val/failed_rate": float(np.mean([v.outcome == "failed" for v in verdicts])),
    }
    results: dict[str, float | None] = {BEST[pairwise]: None}
    if any(verdict.judged for verdict in verdicts):
        items = list(dict.fromkeys(verdict.item for verdict in gold))
        places = np.arange(len(items))
        right = align_verdicts(verdicts_by_item(gold, "gold"), items, "gold")
        judge = align_verdicts(verdicts_by_item(verdicts, "the judge"), items, "the judge")
        compared = AgreementData(right, judge)
        measures: dict[str, Callable[[Any], float]] = dict(compared.agreement())
        if pairwise:
            measures["flip_rate"] = judge_measures(judge)["flip_rate"]
        for name, measure in measures.items():
            try:
                value: float | None = measure(places)
            except Undefined:
                value = None
            results[f"val/{name}"] = value if value is not None and math.isfinite(value) else None
    return results | shares
