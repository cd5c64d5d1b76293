"""Rewards of responses from the verdicts of judges. What no judge has judged has no reward."""

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np

from alignment.data.chat_prompts import decoded
from alignment.engines.protocol import GeneratedResponse
from alignment.judges.kinds.judge_config import Judge, rounding_error
from alignment.judges.questions import Question
from alignment.records import Outcome, Pair, Prompt, Response, Side, Verdict
from alignment.rl.rollouts import RewardResult, Rollout
from alignment.rl.tasks import PromptTask
from alignment.rounding import EXACT, tolerance


class JudgeReward:
    """Rewards for the trainer: means over the judges. What one of them has not judged has none: a
    mean over the others would tell which judge failed, not what the response is worth."""

    def __init__(self, judges: Sequence[Judge], tokenizer: Any, pairwise: bool) -> None:
        """See the class.

        Args:
            tokenizer: of the policy.
            pairwise: a response's reward is its mean win rate against the others of its group, over
                the pairs that were judged in both orders; else its score.
        """
        self.judges, self.tokenizer, self.pairwise = judges, tokenizer, pairwise

    def __call__(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], check: Callable[[], None]
    ) -> list[list[RewardResult]]:
        texts = [[text_of(self.tokenizer, r) for r in rollouts] for _, rollouts in groups]
        questions = self._matches(groups, texts) if self.pairwise else self._scores(groups, texts)
        verdicts = [judge.judge(questions, check) for judge in self.judges]  # [judges][questions]
        give = self._win_rates if self.pairwise else self._means
        return give(groups, texts, [list(each) for each in zip(*verdicts)])

    def _scores(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], texts: Sequence[Sequence[str]]
    ) -> list[Question]:
        return [
            Question(response_of(task.metadata, rollout, text))
            for (task, rollouts), own in zip(groups, texts)
            for rollout, text in zip(rollouts, own)
        ]

    def _means(
        self,
        groups: Sequence[tuple[PromptTask, Sequence[Rollout]]],
        texts: Sequence[Sequence[str]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> list[list[RewardResult]]:
        found, error = iter(verdicts), rounding_error(self.judges)
        return [[_mean(next(found), text, error) for text in own] for own in texts]

    def _matches(
        self, groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], texts: Sequence[Sequence[str]]
    ) -> list[Question]:
        return [
            Question(
                Pair(f"{rollouts[a].key}/{rollouts[b].key}", task.metadata, own[a], own[b]), swapped
            )
            for (task, rollouts), own in zip(groups, texts)
            for a, b in combinations(range(len(own)), 2)
            for swapped in (False, True)
        ]

    def _win_rates(
        self,
        groups: Sequence[tuple[PromptTask, Sequence[Rollout]]],
        texts: Sequence[Sequence[str]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> list[list[RewardResult]]:
        found = iter(verdicts)
        rewarded = []
        for own in texts:
            wins: list[list[float]] = [[] for _ in own]
            bad: list[list[Verdict]] = [[] for _ in own]
            for a, b in combinations(range(len(own)), 2):
                orders = next(found), next(found)
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
                    else _without(b, text)
                    for w, b, text in zip(wins, bad, own)
                ]
            )
        return rewarded


def win_of(order: Sequence[Verdict], swapped: Sequence[Verdict]) -> float | None:
    """How often a pair's first response wins, a tie half; None unless all judged both orders, as
    a judge that goes by position gives 0.5 only by both.

    Args:
        order, swapped: a verdict of each judge.
    """
    verdicts = [*order, *swapped]
    if not all(verdict.judged for verdict in verdicts):
        return None
    points = {Side.FIRST: 1.0, Side.SECOND: 0.0, None: 0.5}
    return float(np.mean([points[verdict.preferred] for verdict in verdicts]))


def mean_score(verdicts: Sequence[Verdict]) -> float | None:
    """Over the judges; None unless all gave a score."""
    scores = [verdict.score for verdict in verdicts]
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if len(known) == len(scores) else None


def text_of(tokenizer: Any, rollout: Rollout | GeneratedResponse) -> str:
    """A response, without the token that ended it."""
    tokens = rollout.tokens[:-1] if rollout.ended else rollout.tokens
    return decoded(tokenizer, tokens)


def response_of(prompt: Prompt, rollout: Rollout, text: str) -> Response:
    """As judges are asked about it."""
    return Response(rollout.key, prompt, text, "policy")


def _mean(verdicts: Sequence[Verdict], text: str, error: float) -> RewardResult:
    """The mean over judges whose scores have a relative error."""
    if (mean := mean_score(verdicts)) is None:
        return _without(verdicts, text)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return RewardResult(
        mean, str(Outcome.SCORE), text, {"scores": scores}, tolerance(scores, error)
    )


def _without(verdicts: Sequence[Verdict], text: str) -> RewardResult:
    details = {"reasons": sorted({v.reason for v in verdicts if v.reason})[:4]}
    failed = any(verdict.outcome is Outcome.FAILED for verdict in verdicts)
    return RewardResult(None, str(Outcome.FAILED if failed else Outcome.UNPARSEABLE), text, details)
