"""Judges that ask other judges: a weighted sum with gates, and a route by a column."""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

from alignment.judges.formats.scale import HIGH
from alignment.judges.kinds.combined import CombinedConfig, RouteConfig, SumConfig
from alignment.judges.kinds.judge_kind import (
    Judge,
    component_scores,
    rounding_error,
    score_size,
)
from alignment.judges.kinds.score_pairs import prefer_higher, questions_about_responses
from alignment.judges.questions import Question, prompt_of
from alignment.records import Outcome, Pair, Verdict

Scores = dict[str, float]


class CombinedJudge:
    """Base of the judges that ask other judges.

    Attributes:
        judges: The judges by name. All ranks call them in this order.
        identity: A hash of the settings and of the identities of the judges.
        rounding_error: The largest relative error of their scores.
        score_size: The magnitude to which that error is relative where a score is smaller.
        batch_size: The largest number of questions that one of them asks together.
    """

    def __init__(self, config: CombinedConfig, judges: Mapping[str, Judge]) -> None:
        """Combine judges as a configuration states."""
        self.judges = judges
        identities = {name: judge.identity for name, judge in judges.items()}
        depends = [config.kind, config.own_settings, identities]
        self.identity = sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        self.rounding_error = rounding_error(list(judges.values()))
        self.score_size = score_size(list(judges.values()))
        self.batch_size = max(getattr(judge, "batch_size", 1) for judge in judges.values())

    def component_scores(self, verdict: Verdict) -> Scores:
        """Return the scores of the components from which a verdict was computed."""
        scores: Scores = json.loads(verdict.answer) if verdict.answer else {}
        return scores

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """Return the verdicts on questions; see `Judge`.

        Of a pair, the response with the higher score is preferred.
        """
        pairs = [question.item for question in questions if isinstance(question.item, Pair)]
        # By the kind of items, because ranks without questions must make the same calls.
        if not pairs:
            return self.score(questions, check)
        verdicts = self.score(questions_about_responses(questions), check)
        return [
            prefer_higher(
                *(pair, verdicts[2 * i], verdicts[2 * i + 1], q.swapped, q.sample),
                self.rounding_error,
                self.score_size,
            )
            for i, (pair, q) in enumerate(zip(pairs, questions, strict=True))
        ]

    def score(self, questions: Sequence[Question], check: Callable[[], None]) -> list[Verdict]:
        """Return the verdicts on responses; a collective in a training."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the resources of the judges."""
        for judge in self.judges.values():
            if close := getattr(judge, "close", None):
                close()

    def _ask(
        self,
        name: str,
        questions: Sequence[Question],
        chosen: Sequence[int],
        check: Callable[[], None],
    ) -> dict[int, Verdict]:
        """Return the verdicts of one judge on the chosen questions; a collective in a training."""
        verdicts = self.judges[name].judge([questions[place] for place in chosen], check)
        return dict(zip(chosen, verdicts))

    def _scores_of(self, name: str, verdict: Verdict) -> Scores:
        """Return the score of a judge, and those of its components below its name."""
        own_score = {} if verdict.score is None else {name: verdict.score}
        below = component_scores(self.judges[name], verdict)
        return own_score | {f"{name}/{part}": score for part, score in below.items()}

    def _lacking(
        self, question: Question, scores: Scores, reasons: Mapping[str, Verdict]
    ) -> Verdict:
        """Return the verdict on a question without a score of some of the judges."""
        failed = any(verdict.outcome is Outcome.FAILED for verdict in reasons.values())
        return Verdict(
            question.item.id,
            Outcome.FAILED if failed else Outcome.UNPARSEABLE,
            sample=question.sample,
            reason="; ".join(f"{name}: {verdict.reason}" for name, verdict in reasons.items()),
            answer=json.dumps(scores),
            judge=self.identity,
        )

    def _score(self, question: Question, score: float, scores: Scores) -> Verdict:
        return Verdict(
            question.item.id,
            Outcome.SCORE,
            score,
            sample=question.sample,
            answer=json.dumps(scores),
            judge=self.identity,
        )


class SumJudge(CombinedJudge):
    """Weighted sum of the scores of judges.

    A question without a score of one component has no score: a sum over the others would depend on
    which of them failed.
    """

    def __init__(self, config: SumConfig, judges: Mapping[str, Judge]) -> None:
        """Create the sum of the opened components."""
        super().__init__(config, judges)
        self._config = config
        if config.range[0] < 0:  # a component of negative weight counts as 9 minus its score
            self.score_size = HIGH

    def score(self, questions: Sequence[Question], check: Callable[[], None]) -> list[Verdict]:
        """Return the verdicts on responses.

        A component behind a gate judges only the questions for which the gate is open.
        """
        verdicts: dict[str, dict[int, Verdict]] = {}
        for name, component in self._config.components.items():
            chosen: Sequence[int] = range(len(questions))
            if component.only_if is not None:
                gate, least = verdicts[component.only_if], component.at_least
                # The score of a gate that is itself behind a closed one is its `otherwise`.
                shut = self._config.components[component.only_if].otherwise
                scores = [gate[place].score if place in gate else shut for place in chosen]
                chosen = [p for p, s in enumerate(scores) if s is not None and s >= least]
            verdicts[name] = self._ask(name, questions, chosen, check)
        return [
            self._combine(question, place, verdicts) for place, question in enumerate(questions)
        ]

    def _combine(
        self, question: Question, place: int, verdicts: Mapping[str, Mapping[int, Verdict]]
    ) -> Verdict:
        item_verdicts = {
            name: by_place[place] for name, by_place in verdicts.items() if place in by_place
        }
        scores: Scores = {}
        for name, verdict in item_verdicts.items():
            scores |= self._scores_of(name, verdict)
        if lacking := {
            name: verdict for name, verdict in item_verdicts.items() if verdict.score is None
        }:
            return self._lacking(question, scores, lacking)
        total = 0.0
        for name, component in self._config.components.items():
            total += component.weight * (
                scores[name] if name in item_verdicts else component.otherwise
            )
        low, high = self._config.range
        if self._config.normalize:
            total = HIGH * (total - low) / (high - low)
        return self._score(question, min(HIGH, max(0.0, total)), scores)  # rounding of the sum


class RouteJudge(CombinedJudge):
    """Judge that asks the judge of each row's route."""

    def __init__(self, config: RouteConfig, judges: Mapping[str, Judge]) -> None:
        """Create the router over the opened judges."""
        super().__init__(config, judges)
        self._config = config

    def score(self, questions: Sequence[Question], check: Callable[[], None]) -> list[Verdict]:
        """Return the verdicts on responses."""
        routes = [self._config.route_of(prompt_of(question)) for question in questions]
        answers: dict[int, Verdict] = {}
        for name in self.judges:
            chosen = [place for place, route in enumerate(routes) if route == name]
            answers |= self._ask(name, questions, chosen, check)
        return [
            self._verdict(question, routes[place], answers.get(place))
            for place, question in enumerate(questions)
        ]

    def _verdict(self, question: Question, route: str | None, verdict: Verdict | None) -> Verdict:
        if route is None or verdict is None:
            return Verdict(
                question.item.id,
                Outcome.FAILED,
                sample=question.sample,
                reason=f"no route for the column {self._config.column!r}",
                judge=self.identity,
            )
        scores = self._scores_of(route, verdict)
        if verdict.score is None:
            return self._lacking(question, scores, {route: verdict})
        return self._score(question, verdict.score, scores)
