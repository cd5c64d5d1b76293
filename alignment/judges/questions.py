"""What an annotation asks, and the rows that it makes of the answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

from alignment.judges.formats.answers import Answer
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.formats.label_log_probs import expected_score
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

    def lack(self, question: Question, answer: Answer) -> str:
        """Return in a sentence why an answer gives no record of worth, or "" where it gives one."""
        ...


@dataclass(frozen=True)
class Judging:
    """Asks a judge for verdicts.

    Attributes:
        judge: a hash of all that they depend on.
        expected: give the expectation over labels instead of the label.
    """

    format: JudgeFormat
    judge: str
    expected: bool = False

    def messages(self, question: Question) -> Sequence[Message]:
        assert not isinstance(question.item, Prompt)
        return self.format.messages(question.item, question.swapped)

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
        fields = dict(self.format.read(answer.text, question.swapped, bool(answer.thinking)))
        thinking = fields.pop("thinking") or answer.thinking
        said = of | {"thinking": thinking, "answer": answer.text}
        cut_off = fields["outcome"] == Outcome.UNPARSEABLE and answer.finish == "length"
        if reason := answer.problem or (answer.cut_off if cut_off else ""):
            return Verdict.from_row(said | {"outcome": Outcome.FAILED, "reason": reason})
        if fields["outcome"] == Outcome.SCORE and self.expected:
            try:
                fields["score"] = expected_score(answer.labels or [], fields["score"])
            except LookupError as error:
                return Verdict.from_row(
                    said | {"outcome": Outcome.UNPARSEABLE, "reason": str(error)}
                )
        return Verdict.from_row(said | fields)

    def lacks_log_probs(self, answer: Answer) -> str:
        """Return why no expectation can be taken of any answer of the endpoint, in a sentence, or
        "" where it can.

        An empty answer has no log-probabilities either, and says nothing of others.
        """
        if not self.expected or answer.labels is not None or answer.problem or not answer.text:
            return ""
        return answer.label_problem or "the answer has no logprobs"

    def note(self, question: Question, answer: Answer) -> str:
        if problem := self.lacks_log_probs(answer):
            raise UserError(
                "--expected-score needs log-probabilities, and the endpoint gives none with "
                f"logprobs and top_logprobs that can be used ({problem}): leave the flag out, or "
                "ask another server"
            )
        verdict = self.record(question, answer)
        if verdict.outcome is Outcome.FAILED:
            return "without an answer" if answer.problem else "cut off"
        return "malformed" if verdict.outcome is Outcome.UNPARSEABLE else ""

    def lack(self, question: Question, answer: Answer) -> str:
        return self.record(question, answer).reason


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
        if answer is None or answer.missing:
            return None
        assert isinstance(question.item, Prompt)
        unique = f"{self.identity}:{question.item.id}:{question.sample}"
        name = sha256(unique.encode()).hexdigest()[:32]
        return Response(name, question.item, answer.text, self.source)

    def note(self, question: Question, answer: Answer) -> str:
        if answer.missing:
            return "without a response"
        return "cut off" if answer.finish == "length" else ""

    def lack(self, question: Question, answer: Answer) -> str:
        """A response that is cut off is one, and so is an empty one of the model's own."""
        return answer.missing


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
        if answer is None or self.lack(question, answer):
            return None
        assert isinstance(question.item, Prompt)
        return replace(question.item, rubric=answer.text.strip())

    def note(self, question: Question, answer: Answer) -> str:
        return "without a rubric" if self.lack(question, answer) else ""

    def lack(self, question: Question, answer: Answer) -> str:
        if answer.problem or answer.finish == "length":
            return answer.problem or answer.cut_off
        return "" if answer.text.strip() else "the answer is empty"
