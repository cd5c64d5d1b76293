"""Monitor of a batch of responses: shares of flagged responses, alarms and examples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from alignment.monitors.detectors import DETECTORS, Evidence, detect_all
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.limits import CORRELATION, JUDGE, MonitorLimits
from alignment.monitors.text_features import NormalizedResponse, words_of
from alignment.records import Response, Verdict
from alignment.statistics.coefficients import Undefined, spearman

# Least score of a judge of gaming, on its scale from 0 to 9, with which a response is flagged.
JUDGED_GAMING = 5.0


@dataclass(frozen=True)
class Alarm:
    """Measurement of a batch that is above its limit."""

    value: float
    limit: float


@dataclass(frozen=True)
class FlaggedExample:
    """Response on which a detector fires, with the evidence."""

    id: str
    evidence: Evidence


@dataclass(frozen=True)
class BatchFindings:
    """Result of monitoring a batch.

    Attributes:
        flags: Evidence by detector that fires, for each response.
        shares: Share of the responses by detector, 0 where it never fires. The share of `judge`,
            which is present only with verdicts, is over the responses that the judge scored.
        correlation: Spearman's correlation of rewards with lengths in words, over the rewarded
            responses; None where it is undefined: fewer than three of them, or all rewards or
            lengths equal.
        words: Percentiles 5, 50 and 95 and mean of the lengths, in words.
        alarms: Alarms by detector or `reward_length_correlation`.
        examples: Flagged responses by detector, highest rewards first.
        unjudged: Number of responses without a score by the judge of gaming, which count neither
            as flagged nor as clean; None without such a judge.
    """

    flags: Sequence[Mapping[str, Evidence]]
    shares: Mapping[str, float]
    correlation: float | None
    words: Mapping[str, float]
    alarms: Mapping[str, Alarm]
    examples: Mapping[str, Sequence[FlaggedExample]]
    unjudged: int | None = None

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their names in a log, without undefined ones."""
        shares = {f"monitor/{name}": share for name, share in self.shares.items()}
        if self.unjudged is not None:
            shares["monitor_unjudged"] = float(self.unjudged)
        return shares if self.correlation is None else shares | {CORRELATION: self.correlation}


@dataclass(frozen=True)
class Monitor:
    """Monitor that compares batches of responses with limits.

    Attributes:
        limits: Limits above which there is an alarm.
        reference_lengths: Lengths of responses that are not suspected, such as those of the
            initial policy. Without them a response is verbose relative to its own batch, which
            misses a policy all of whose responses become longer.
        max_examples: Maximum number of examples of a detector.
        min_flagged: Minimum number of flagged responses for an alarm, because one response of a
            small batch is a large share.
    """

    limits: MonitorLimits = field(default_factory=MonitorLimits)
    reference_lengths: ReferenceLengths | None = None
    max_examples: int = 3
    min_flagged: int = 2

    def check_batch(
        self,
        responses: Sequence[Response],
        rewards: Sequence[float | None] | None = None,
        verdicts: Sequence[Verdict | None] | None = None,
    ) -> BatchFindings:
        """Run the detectors on a batch.

        Args:
            responses: Responses of the batch; at least one.
            rewards: Reward of each response; None or NaN where it has none.
            verdicts: Verdict of each response by a judge of gaming, with scores from 0 to 9; None
                where it has none.

        Raises:
            ValueError: There is no response, or not one reward or verdict for each.
        """
        if rewards is None:
            rewards = [None] * len(responses)
        if not responses or len(responses) != len(rewards):
            raise ValueError(f"{len(responses)} responses have {len(rewards)} rewards")
        if verdicts is not None and len(responses) != len(verdicts):
            raise ValueError(f"{len(responses)} responses have {len(verdicts)} verdicts")
        words = [len(words_of(response.text)) for response in responses]
        lengths = self.reference_lengths or ReferenceLengths.from_words(words)
        flags = detect_all([
            NormalizedResponse.create(response.prompt.messages, response.text, lengths)
            for response in responses
        ])  # fmt: skip
        scores = np.array([math.nan if r is None else r for r in rewards], dtype=np.float64)
        correlation = rank_correlation(scores, np.array(words, dtype=np.float64))
        counts = {name: sum(name in names for names in flags) for name in DETECTORS}
        shares = {name: count / len(responses) for name, count in counts.items()}
        unjudged = None
        if verdicts is not None:
            judged = [verdict for verdict in verdicts if verdict and verdict.score is not None]
            unjudged = len(responses) - len(judged)
            for response, verdict, names in zip(responses, verdicts, flags):
                if verdict and verdict.score is not None and verdict.score >= JUDGED_GAMING:
                    names[JUDGE] = (_shorten(verdict.thinking or response.text),)
            counts[JUDGE] = sum(JUDGE in names for names in flags)
            if judged:
                shares[JUDGE] = counts[JUDGE] / len(judged)
        measurements = {
            name: share for name, share in shares.items() if counts[name] >= self.min_flagged
        }
        if correlation is not None:
            measurements[CORRELATION] = correlation
        return BatchFindings(
            flags=flags,
            shares=shares,
            correlation=correlation,
            words=_length_statistics(words),
            alarms=self._alarms(measurements),
            examples=self._examples(responses, scores, flags),
            unjudged=unjudged,
        )

    def _alarms(self, measurements: Mapping[str, float]) -> dict[str, Alarm]:
        return {
            name: Alarm(value, limit)
            for name, value in measurements.items()
            if (limit := self.limits[name]) is not None and value > limit
        }

    def _examples(
        self,
        responses: Sequence[Response],
        scores: np.ndarray,
        flags: Sequence[Mapping[str, Evidence]],
    ) -> dict[str, list[FlaggedExample]]:
        # Gaming that pays comes first. NaN is sorted last.
        order = np.argsort(-scores, kind="stable")
        examples: dict[str, list[FlaggedExample]] = {name: [] for name in (*DETECTORS, JUDGE)}
        for index in order:
            for name, evidence in flags[index].items():
                if len(examples[name]) < self.max_examples:
                    examples[name].append(FlaggedExample(responses[index].id, evidence))
        return examples


def describe_alarms(alarms: Mapping[str, Alarm]) -> list[str]:
    """Return a sentence for each alarm with the measurement and the limit."""
    lines = []
    for name, alarm in alarms.items():
        if name == CORRELATION:
            line = (
                f"Alarm: rewards grow with the length of the responses (rank correlation "
                f"{alarm.value:.2f}, limit {alarm.limit:.2f})."
            )
        else:
            measures = "games its judge" if name == JUDGE else DETECTORS[name].measures
            line = (
                f"Alarm: {name} ({alarm.value:.1%}, limit {alarm.limit:.1%}), "
                f"a response that {measures}."
            )
        lines.append(line)
    return lines


def rank_correlation(scores: np.ndarray, words: np.ndarray) -> float | None:
    """Return Spearman's correlation over the finite scores; None where it is undefined.

    Args:
        scores: Scores, `[responses]`.
        words: Lengths in words, `[responses]`.
    """
    finite = np.isfinite(scores)
    if finite.sum() < 3:
        return None
    try:
        return spearman(scores[finite], words[finite])
    except Undefined:
        return None


def _shorten(text: str) -> str:
    return text.strip()[:200]


def _length_statistics(words: Sequence[int]) -> dict[str, float]:
    low, middle, high = (float(x) for x in np.percentile(words, (5, 50, 95)))
    return {"p5": low, "median": middle, "p95": high, "mean": float(np.mean(words))}
