"""Rewards of responses from the verdicts of judges."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import numpy as np

from alignment.data.chat_prompts import decode_ids
from alignment.engines.protocol import GeneratedResponse
from alignment.judges.kinds.judge_kind import Judge, component_scores, rounding_error, score_size
from alignment.judges.questions import Question
from alignment.records import Outcome, Pair, Prompt, Response, Side, Verdict
from alignment.rl.rollouts import RewardResult, Rollout
from alignment.rl.tasks import PromptTask
from alignment.rounding import EXACT, tolerance


class JudgeReward:
    """Reward function that averages the verdicts of judges.

    A response without a verdict of one of the judges has no reward. A mean over the other judges
    would depend on which judge failed.
    """

    def __init__(
        self, judges: Sequence[Judge], tokenizer: Any, pairwise: bool, names: Sequence[str] = ()
    ) -> None:
        """Create the reward function.

        Args:
            judges: Judges whose verdicts are averaged.
            tokenizer: Tokenizer of the policy.
            pairwise: Whether the reward is the mean win rate against the others of the group, over
                the pairs that were judged in both orders, and not the score.
            names: Name of each judge, for the scores of the components.
        """
        self.judges, self.tokenizer, self.pairwise = judges, tokenizer, pairwise
        self.names = names

    def __call__(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], check: Callable[[], None]
    ) -> list[list[RewardResult]]:
        """Return the rewards of each group's responses; see `RewardFunction`."""
        texts = [[text_of(self.tokenizer, r) for r in rollouts] for _, rollouts in groups]
        questions = self._matches(groups, texts) if self.pairwise else self._scores(groups, texts)
        verdicts = [judge.judge(questions, check) for judge in self.judges]  # [judges][questions]
        rewards = self._win_rates if self.pairwise else self._means
        return rewards(groups, texts, [list(column) for column in zip(*verdicts)])

    def _scores(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], texts: Sequence[Sequence[str]]
    ) -> list[Question]:
        return [
            Question(response_of(task.metadata, rollout, text))
            for (task, rollouts), group_texts in zip(groups, texts)
            for rollout, text in zip(rollouts, group_texts)
        ]

    def _means(
        self,
        groups: Sequence[tuple[PromptTask, Sequence[Rollout]]],
        texts: Sequence[Sequence[str]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> list[list[RewardResult]]:
        remaining = iter(verdicts)
        error, size = rounding_error(self.judges), score_size(self.judges)
        rewarded = []
        for group_texts in texts:
            results = []
            for text in group_texts:
                column = next(remaining)
                result = _mean(column, text, error, size)
                if components := scores_by_component(self.judges, self.names, column):
                    details = {**result.details, "components": components}
                    result = replace(result, details=details)
                results.append(result)
            rewarded.append(results)
        return rewarded

    def _matches(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], texts: Sequence[Sequence[str]]
    ) -> list[Question]:
        return [
            Question(
                Pair(
                    f"{rollouts[a].key}/{rollouts[b].key}",
                    task.metadata,
                    group_texts[a],
                    group_texts[b],
                ),
                swapped,
            )
            for (task, rollouts), group_texts in zip(groups, texts)
            for a, b in combinations(range(len(group_texts)), 2)
            for swapped in (False, True)
        ]

    def _win_rates(
        self,
        groups: Sequence[tuple[PromptTask, Sequence[Rollout]]],
        texts: Sequence[Sequence[str]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> list[list[RewardResult]]:
        remaining = iter(verdicts)
        rewarded = []
        for group_texts in texts:
            wins: list[list[float]] = [[] for _ in group_texts]
            bad: list[list[Verdict]] = [[] for _ in group_texts]
            for a, b in combinations(range(len(group_texts)), 2):
                orders = next(remaining), next(remaining)
                if (win := win_of(*orders)) is None:
                    bad[a] += chain(*orders)
                    bad[b] += chain(*orders)
                    continue
                wins[a].append(win)
                wins[b].append(1 - win)
            rewarded.append(
                [
                    RewardResult(float(np.mean(w)), "preference", text, {"matches": len(w)}, EXACT)
                    if w
                    else _without_reward(b, text)
                    for w, b, text in zip(wins, bad, group_texts)
                ]
            )
        return rewarded


def win_of(order: Sequence[Verdict], swapped: Sequence[Verdict]) -> float | None:
    """Return the win rate of a pair's first response, with a tie as one half.

    It is None unless all judges judged both orders: a judge that decides by position has a win rate
    of 0.5 only over both.

    Args:
        order: Verdict of each judge on the pair.
        swapped: Verdict of each judge on the pair in the other order.
    """
    verdicts = [*order, *swapped]
    if not all(verdict.judged for verdict in verdicts):
        return None
    points = {Side.FIRST: 1.0, Side.SECOND: 0.0, None: 0.5}
    return float(np.mean([points[verdict.preferred] for verdict in verdicts]))


def mean_score(verdicts: Sequence[Verdict]) -> float | None:
    """Return the mean score over the judges, or None unless all of them returned one."""
    scores = [verdict.score for verdict in verdicts]
    numbers = [score for score in scores if score is not None]
    return float(np.mean(numbers)) if len(numbers) == len(scores) else None


def scores_by_component(
    judges: Sequence[Judge], names: Sequence[str], verdicts: Sequence[Verdict]
) -> dict[str, float]:
    """Return the scores of which a mean over judges consists, by name.

    These are the scores of the judges, if there are several, and of the components of each judge
    that combines others. A component that was not called, or failed, has no score.

    Args:
        judges: The judges.
        names: Name of each judge. Judges of one name are numbered.
        verdicts: Verdict of each judge.
    """
    scores: dict[str, float] = {}
    for place, (judge, verdict) in enumerate(zip(judges, verdicts)):
        prefix = ""
        if len(judges) > 1:
            name = names[place] if place < len(names) else "judge"
            if names.count(name) != 1:
                name = f"{name}-{place + 1}"
            prefix = f"{name}/"
            scores |= {} if verdict.score is None else {name: verdict.score}
        below = component_scores(judge, verdict)
        scores |= {f"{prefix}{part}": score for part, score in below.items()}
    return scores


def text_of(tokenizer: Any, rollout: Rollout | GeneratedResponse) -> str:
    """Return the text of a response, without its end token."""
    tokens = rollout.tokens[:-1] if rollout.ended else rollout.tokens
    return decode_ids(tokenizer, tokens)


def response_of(prompt: Prompt, rollout: Rollout, text: str) -> Response:
    """Return the record of a response for judges."""
    return Response(rollout.key, prompt, text, "policy")


def _mean(verdicts: Sequence[Verdict], text: str, error: float, size: float) -> RewardResult:
    """Return the mean over judges whose scores have a relative error; see `tolerance`."""
    if (mean := mean_score(verdicts)) is None:
        return _without_reward(verdicts, text)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return RewardResult(
        mean, str(Outcome.SCORE), text, {"scores": scores}, tolerance(scores, error, size)
    )


def _without_reward(verdicts: Sequence[Verdict], text: str) -> RewardResult:
    details = {"reasons": sorted({v.reason for v in verdicts if v.reason})[:4]}
    failed = any(verdict.outcome is Outcome.FAILED for verdict in verdicts)
    return RewardResult(None, str(Outcome.FAILED if failed else Outcome.UNPARSEABLE), text, details)
