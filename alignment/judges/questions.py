"""What an annotation asks, and the rows that it makes of the answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Protocol

from alignment.judges.client import Answer, expected_score
from alignment.records import Message, Outcome, Pair, Prompt, Response, Verdict
from megatron_ext.errors import UserError

Judgeable = Response | Pair
Item = Prompt | Judgeable
Made = Verdict | Response | Prompt


@dataclass(frozen=True)
class Question:
    """One call: an item in one order, once.

    Attributes:
        sample: which of several answers to the same question.
    """

    item: Item
    swapped: bool = False
    sample: int = 0


def questions(items: Sequence[Item], orders: str, samples: int) -> Iterator[Question]:
    """All questions on items, those of an item together.

    Args:
        orders: of pairs: "given", "swapped" or "both".
    """
    for item in items:
        ways = {"given": [False], "swapped": [True], "both": [False, True]}[orders]
        for swapped in ways if isinstance(item, Pair) else [False]:
            for sample in range(samples):
                yield Question(item, swapped, sample)


class Task(Protocol):
    """What is asked about items, and what becomes of an answer."""

    def messages(self, question: Question) -> Sequence[Message]: ...

    def record(self, question: Question, answer: Answer | None, reason: str) -> Made | None:
        """The record of an answer, or of none for a reason; None where nothing is to write."""
        ...

    def note(self, question: Question, answer: Answer) -> str:
        """In a word, what is wrong with an answer; raises a UserError if no answer can be right."""
        ...


@dataclass(frozen=True)
class Form:
    """How a judge is asked, and how its answers are read.

    Attributes:
        ask: the messages for an item, with the second response of a pair first if swapped.
        read: the fields of a verdict in a text: outcome and what belongs to it, and thinking; the
            side preferred is in the pair's own order.
        read_label: the same where the endpoint has told the thinking apart.
        identity: a hash of the template and the parser.
    """

    ask: Callable[[Judgeable, bool], Sequence[Message]]
    read: Callable[[str, bool], Mapping[str, Any]]
    read_label: Callable[[str, bool], Mapping[str, Any]]
    identity: str


@dataclass(frozen=True)
class Judging:
    """Asks a judge for verdicts.

    Attributes:
        judge: a hash of all that they depend on.
        expected: give the expectation over labels instead of the label.
    """

    form: Form
    judge: str
    expected: bool = False

    def messages(self, question: Question) -> Sequence[Message]:
        assert not isinstance(question.item, Prompt)
        return self.form.ask(question.item, question.swapped)

    def record(self, question: Question, answer: Answer | None, reason: str = "") -> Verdict:
        """What the judge said, or that there is no answer for a reason."""
        of = {
            "item": question.item.id,
            "swapped": question.swapped,
            "sample": question.sample,
            "judge": self.judge,
        }
        if answer is None:
            return Verdict.from_row(of | {"outcome": Outcome.FAILED, "reason": reason})
        read = self.form.read_label if answer.thinking else self.form.read
        fields = dict(read(answer.text, question.swapped))
        thinking = fields.pop("thinking") or answer.thinking
        said = of | {"thinking": thinking, "answer": answer.text}
        if fields["outcome"] == Outcome.UNPARSEABLE and answer.finish == "length":
            cut = f"cut off after {answer.completion_tokens} tokens"
            return Verdict.from_row(said | {"outcome": Outcome.FAILED, "reason": cut})
        if fields["outcome"] == Outcome.SCORE and self.expected:
            try:
                fields["score"] = expected_score(answer, fields["score"])
            except LookupError as error:
                return Verdict.from_row(
                    said | {"outcome": Outcome.UNPARSEABLE, "reason": str(error)}
                )
        return Verdict.from_row(said | fields)

    def lacks_log_probs(self, answer: Answer) -> bool:
        """Whether the endpoint gives none, so that no expectation can be taken of any answer.

        An empty answer has none either, and says nothing of others.
        """
        return self.expected and answer.labels is None and bool(answer.text)

    def note(self, question: Question, answer: Answer) -> str:
        if self.lacks_log_probs(answer):
            raise UserError(
                "--expected-score needs log-probabilities, and the endpoint gives none with "
                "logprobs and top_logprobs: leave the flag out, or ask another server"
            )
        outcome = self.record(question, answer).outcome
        return {Outcome.UNPARSEABLE: "malformed", Outcome.FAILED: "cut off"}.get(outcome, "")


@dataclass(frozen=True)
class Generating:
    """Asks a policy for responses.

    Attributes:
        source: of the responses.
    """

    source: str
    identity: str

    def messages(self, question: Question) -> Sequence[Message]:
        assert isinstance(question.item, Prompt)
        return question.item.messages

    def record(
        self, question: Question, answer: Answer | None, reason: str = ""
    ) -> Response | None:
        if answer is None:
            return None
        assert isinstance(question.item, Prompt)
        unique = f"{self.identity}:{question.item.id}:{question.sample}"
        name = sha256(unique.encode()).hexdigest()[:32]
        return Response(name, question.item, answer.text, self.source)

    def note(self, question: Question, answer: Answer) -> str:
        return "cut off" if answer.finish == "length" else ""


@dataclass(frozen=True)
class WritingRubrics:
    """Asks a gold judge what a good answer to a prompt has.

    Attributes:
        ask: the messages for a prompt.
    """

    ask: Callable[[Prompt], Sequence[Message]]

    def messages(self, question: Question) -> Sequence[Message]:
        assert isinstance(question.item, Prompt)
        return self.ask(question.item)

    def record(self, question: Question, answer: Answer | None, reason: str = "") -> Prompt | None:
        """The prompt with the rubric in place of any that it had; none that is cut off or empty."""
        if answer is None or self.note(question, answer):
            return None
        assert isinstance(question.item, Prompt)
        return replace(question.item, rubric=answer.text.strip())

    def note(self, question: Question, answer: Answer) -> str:
        if answer.finish == "length":
            return "cut off"
        return "" if answer.text.strip() else "empty"
