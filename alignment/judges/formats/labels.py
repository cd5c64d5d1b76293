"""Labels of judges: their texts, their tokens, and the verdict in a distribution over them."""

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
# If all labels together are less likely than this, the judge is about to write something else.
LEAST_MASS = 0.01


def answer_text(label: str, thinking: str | None) -> str:
    """Return an answer in the format that `parsing.Parser` reads.

    Args:
        label: The label.
        thinking: The thinking before it, or None for a judge that does not think.
    """
    return label if thinking is None else f"{OPEN}\n{thinking.strip()}\n{CLOSE}\n{label}"


def label_of(verdict: Verdict) -> str:
    """Return the label of a judge that agrees with a verdict, in the order of the verdict.

    Args:
        verdict: The verdict.

    Raises:
        ValueError: If the verdict is not a judgment, or its score is not between 0 and 9.
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
    """First token of each label at its position in an answer.

    Attributes:
        labels: The labels.
        ids: The id of the token of each label.
    """

    labels: Sequence[str]
    ids: Sequence[int]

    @classmethod
    def of(
        cls, tokenizer: Any, labels: Sequence[str], thinks: bool, template: Mapping[str, Any]
    ) -> "LabelTokens":
        """Find the tokens by encoding answers that differ only in the label.

        Args:
            tokenizer: The tokenizer of the model, from transformers.
            labels: The labels.
            thinks: Whether the judge thinks before its label.
            template: The variables of the chat template.

        Raises:
            UserError: If a score is several tokens or merges with its neighbors, or two labels
                begin with the same token.
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
                    f"The tokenizer splits the label {label!r} into several tokens, but the score "
                    "of a judge is read from one token. Choose another model."
                )
        # A label of several tokens is represented by its first one.
        places = [i for i, ids in enumerate(zip(*answers)) if len(set(ids)) > 1]
        ids = [answer[places[0]] for answer in answers] if places else []
        together = tuple(labels) == SCORES and len(places) != 1
        if together or len(set(ids)) != len(labels):
            raise UserError(
                "The tokenizer does not encode each label of a judge as a separate token: "
                f"{', '.join(labels)} differ in {len(places)} tokens. Choose another model."
            )
        return cls(tuple(labels), tuple(ids))

    def judgment(self, log_probs: Sequence[float], swapped: bool = False) -> Mapping[str, Any]:
        """Return the fields of a verdict from the probabilities of the labels.

        A score is the expectation over the ten labels, renormalized among themselves (arXiv
        2603.12246). For a pair the likeliest label counts, and equally likely labels are a tie.

        Args:
            log_probs: The log-probability of each label, in their order.
            swapped: Whether the second response of the pair was shown first.
        """
        mass = sum(map(math.exp, log_probs))
        if not mass >= LEAST_MASS:
            reason = f"all labels together have a probability of {mass:.2g}"
            return {"outcome": Outcome.UNPARSEABLE, "reason": reason}
        if tuple(self.labels) == SCORES:
            expected = sum(s * math.exp(value) for s, value in enumerate(log_probs)) / mass
            return {
                "outcome": Outcome.SCORE,
                "score": min(expected, HIGH),
            }  # rounding may exceed the scale
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
