"""Labels of judges: their texts, their tokens, and what verdict a distribution over them is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.chat_prompts import example
from alignment.judges.formats.parsing import CLOSE, OPEN
from alignment.judges.formats.scale import HIGH, rescale
from alignment.records import Message, Outcome, Side, Verdict
from alignment.rounding import exceeds, nearest_whole
from megatron_ext.errors import UserError

SCORES = tuple(str(score) for score in range(10))
SIDES = ("A", "B", "tie")
# Labels that together are less likely than this are not what the judge is about to say.
LEAST_MASS = 0.01


def answer_text(label: str, thinking: str | None) -> str:
    """An answer in the form that `parsing.Parser` reads."""
    return label if thinking is None else f"{OPEN}\n{thinking.strip()}\n{CLOSE}\n{label}"


def label_of(verdict: Verdict) -> str:
    """The label that a judge gives who agrees with a verdict, in the verdict's order.

    Raises:
        ValueError: the verdict is no judgement, or its score is outside of 0 to 9.
    """
    if verdict.outcome is Outcome.SCORE:
        assert verdict.score is not None
        return SCORES[int(nearest_whole(rescale(verdict.score)))]
    if verdict.outcome is Outcome.TIE:
        return "tie"
    if verdict.outcome is not Outcome.PREFERENCE:
        raise ValueError(f"a verdict of outcome {verdict.outcome} has no label")
    first_shown = Side.SECOND if verdict.swapped else Side.FIRST
    return "A" if verdict.preferred is first_shown else "B"


@dataclass(frozen=True)
class LabelTokens:
    """The token that each label is, or begins with, where an answer has it.

    Attributes:
        labels, ids: in the same order.
    """

    labels: Sequence[str]
    ids: Sequence[int]

    @classmethod
    def of(
        cls, tokenizer: Any, labels: Sequence[str], thinks: bool, template: Mapping[str, Any]
    ) -> "LabelTokens":
        """Find them by encoding answers that differ in the label alone.

        Raises:
            UserError: a score is several tokens, or one together with what stands beside it; or two
                labels begin alike.
        """
        ask = [Message("user", "Which?")]
        thinking = "So." if thinks else None
        answers = [
            example(tokenizer, ask, answer_text(label, thinking), **template).completion
            for label in labels
        ]
        lengths = {len(answer) for answer in answers}
        for label, answer in zip(labels, answers):
            if tuple(labels) == SCORES and len(answer) > min(lengths):
                raise UserError(
                    f"the tokenizer splits the label {label!r} into several tokens, and a judge's "
                    "score is read from one: give a template with other labels, or another model"
                )
        # Of a word that is several tokens the first one stands for it.
        places = [i for i, ids in enumerate(zip(*answers)) if len(set(ids)) > 1]
        ids = [answer[places[0]] for answer in answers] if places else []
        together = tuple(labels) == SCORES and len(places) != 1
        if together or len(set(ids)) != len(labels):
            raise UserError(
                "the tokenizer does not give each label of a judge a token of its own: "
                f"{', '.join(labels)} differ in {len(places)} tokens"
            )
        return cls(tuple(labels), tuple(ids))

    def judgement(self, log_probs: Sequence[float], swapped: bool = False) -> Mapping[str, Any]:
        """The fields of a verdict by the probabilities of the labels.

        A score is the expectation over the ten, renormalised among themselves (arXiv 2603.12246);
        of a pair the likeliest label counts, and labels that are equally likely make a tie.

        Args:
            log_probs: of each label, in their order.
        """
        mass = sum(map(math.exp, log_probs))
        if not mass >= LEAST_MASS:
            reason = f"all labels together have a probability of {mass:.2g}"
            return {"outcome": Outcome.UNPARSEABLE, "reason": reason}
        if tuple(self.labels) == SCORES:
            expected = sum(s * math.exp(value) for s, value in enumerate(log_probs)) / mass
            return {"outcome": Outcome.SCORE, "score": min(expected, HIGH)}  # but for rounding
        most = max(log_probs)
        likeliest = [
            label
            for label, value in zip(self.labels, log_probs)
            if not exceeds(most, value, size=1.0)
        ]
        label = likeliest[0]
        if label == "tie" or len(likeliest) > 1:
            return {"outcome": Outcome.TIE}
        side = Side.SECOND if (label == "B") != swapped else Side.FIRST
        return {"outcome": Outcome.PREFERENCE, "preferred": side}
