"""Questions of an annotation, and the tasks that turn their answers into rows."""

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
ResultRecord = Verdict | Response | Prompt


@dataclass(frozen=True)
class Question:
    """Question about an item in one order.

    Attributes:
        item: The prompt, response or pair.
        swapped: Whether the second response of a pair is shown first.
        sample: Number of this sample of the same question, from 0.
    """

    item: Item
    swapped: bool = False
    sample: int = 0


def make_questions(items: Sequence[Item], orders: str, samples: int) -> Iterator[Question]:
    """Yield all questions about items, those of an item together.

    Args:
        items: The items.
        orders: Orders of the responses of a pair: "given", "swapped" or "both".
        samples: Number of samples of each question.
    """
    for item in items:
        ways = {"given": [False], "swapped": [True], "both": [False, True]}[orders]
        for swapped in ways if isinstance(item, Pair) else [False]:
            for sample in range(samples):
                yield Question(item, swapped, sample)


def prompt_of(question: Question) -> Prompt:
    """Return the prompt of a question's item, which may be the item itself."""
    return question.item if isinstance(question.item, Prompt) else question.item.prompt


def prompts_of(questions: Sequence[Question]) -> list[Prompt]:
    """Return the prompts of the items of questions, each object once."""
    prompts = [prompt_of(question) for question in questions]
    return list({id(prompt): prompt for prompt in prompts}.values())


class AnnotationTask(Protocol):
    """Task of an annotation: the messages about an item, and the use of the answer."""

    def messages(self, question: Question) -> Sequence[Message]:
        """Return the messages that ask a question."""
        ...

    def record(self, question: Question, answer: Answer | None, reason: str) -> ResultRecord | None:
        """Return the row of an answer, or None if there is nothing to write.

        Args:
            question: The question.
            answer: The answer, or None if every call failed.
            reason: Reason why there is no answer.
        """
        ...

    def inspect(self, question: Question, answer: Answer) -> str:
        """Return the fault of an answer in a word or two, or "".

        Raises:
            UserError: If no answer of the endpoint can be right.
        """
        ...

    def explain_lack(self, question: Question, answer: Answer) -> str:
        """Return the reason why an answer gives no usable row, or "" if it gives one."""
        ...


@dataclass(frozen=True)
class JudgingTask:
    """Task of asking a judge for verdicts.

    Attributes:
        format: The format of the judge.
        judge: A hash of everything on which the verdicts depend.
        expected: Whether the score is the expectation over the labels instead of the label.
    """

    format: JudgeFormat
    judge: str
    expected: bool = False

    def messages(self, question: Question) -> Sequence[Message]:
        """Return the messages that ask the judge."""
        return self.format.messages(question.item, question.swapped)

    def record(self, question: Question, answer: Answer | None, reason: str = "") -> Verdict:
        """Return the verdict in an answer, or a failed verdict with the reason."""
        fields = {
            "item": question.item.id,
            "swapped": question.swapped,
            "sample": question.sample,
            "judge": self.judge,
        }
        if answer is None:
            return Verdict.from_row(fields | {"outcome": Outcome.FAILED, "reason": reason})
        parsed = dict(self.format.read(answer.text, question.swapped, bool(answer.thinking)))
        thinking = parsed.pop("thinking") or answer.thinking
        fields |= {"thinking": thinking, "answer": answer.text}
        cut_off = parsed["outcome"] == Outcome.UNPARSEABLE and answer.finish == "length"
        if reason := answer.problem or (answer.cut_off if cut_off else ""):
            return Verdict.from_row(fields | {"outcome": Outcome.FAILED, "reason": reason})
        if parsed["outcome"] == Outcome.SCORE and self.expected:
            try:
                parsed["score"] = expected_score(answer.labels or [], parsed["score"])
            except LookupError as error:
                return Verdict.from_row(
                    fields | {"outcome": Outcome.UNPARSEABLE, "reason": str(error)}
                )
        return Verdict.from_row(fields | parsed)

    def lacks_log_probs(self, answer: Answer) -> str:
        """Return the reason why no answer of the endpoint can have an expected score, or "".

        An empty answer also lacks log-probabilities, but implies nothing about other answers.
        """
        if not self.expected or answer.labels is not None or answer.problem or not answer.text:
            return ""
        return answer.label_problem or "the answer has no logprobs"

    def inspect(self, question: Question, answer: Answer) -> str:
        """Return "without an answer", "cut off", "malformed" or "".

        Raises:
            UserError: If an expectation is requested and the endpoint gives no log-probabilities.
        """
        if problem := self.lacks_log_probs(answer):
            raise UserError(
                "--expected-score needs log-probabilities, and the endpoint gives none with "
                f"logprobs and top_logprobs that can be used ({problem}). Leave the flag out, or "
                "use another server."
            )
        verdict = self.record(question, answer)
        if verdict.outcome is Outcome.FAILED:
            return "without an answer" if answer.problem else "cut off"
        return "malformed" if verdict.outcome is Outcome.UNPARSEABLE else ""

    def explain_lack(self, question: Question, answer: Answer) -> str:
        """Return the reason why an answer contains no judgment, or ""."""
        return self.record(question, answer).reason


@dataclass(frozen=True)
class ResponseTask:
    """Task of asking a policy for responses.

    Attributes:
        source: Name of the policy, which becomes the source of the responses.
        identity: A hash of everything on which the responses depend.
    """

    source: str
    identity: str

    def messages(self, question: Question) -> Sequence[Message]:
        """Return the messages of the prompt."""
        assert isinstance(question.item, Prompt)
        return question.item.messages

    def record(
        self, question: Question, answer: Answer | None, reason: str = ""
    ) -> Response | None:
        """Return the response, or None if the model gave none."""
        if answer is None or answer.missing:
            return None
        assert isinstance(question.item, Prompt)
        unique = f"{self.identity}:{question.item.id}:{question.sample}"
        name = sha256(unique.encode()).hexdigest()[:32]
        return Response(name, question.item, answer.text, self.source)

    def inspect(self, question: Question, answer: Answer) -> str:
        """Return "without a response", "cut off" or ""."""
        if answer.missing:
            return "without a response"
        return "cut off" if answer.finish == "length" else ""

    def explain_lack(self, question: Question, answer: Answer) -> str:
        """Return the reason why there is no response, or "".

        Responses that are cut off, and empty ones that the model ended, count as responses.
        """
        return answer.missing


@dataclass(frozen=True)
class RubricTask:
    """Task of asking a gold judge for the rubric of a prompt, the requirements on a good answer.

    Attributes:
        ask: Function that returns the messages for a prompt.
    """

    ask: Callable[[Prompt], Sequence[Message]]

    def messages(self, question: Question) -> Sequence[Message]:
        """Return the messages that ask for a rubric."""
        assert isinstance(question.item, Prompt)
        return self.ask(question.item)

    def record(self, question: Question, answer: Answer | None, reason: str = "") -> Prompt | None:
        """Return the prompt with the new rubric, or None if the rubric is cut off or empty."""
        if answer is None or self.explain_lack(question, answer):
            return None
        assert isinstance(question.item, Prompt)
        return replace(question.item, rubric=answer.text.strip())

    def inspect(self, question: Question, answer: Answer) -> str:
        """Return "without a rubric" or ""."""
        return "without a rubric" if self.explain_lack(question, answer) else ""

    def explain_lack(self, question: Question, answer: Answer) -> str:
        """Return the reason why there is no rubric, or ""."""
        if answer.problem or answer.finish == "length":
            return answer.problem or answer.cut_off
        return "" if answer.text.strip() else "the answer is empty"
