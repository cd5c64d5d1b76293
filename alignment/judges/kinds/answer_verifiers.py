"""Judge kinds that compare the answer of a response: "exact-answer", "numeric-answer", "pattern".

kind: numeric-answer
reference: answer     # a column of the prompts' metadata
"""

import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

import regex
from pydantic import Field, model_validator

from alignment.judges.kinds.judge_kind import MAY_CHANGE, JudgeContext
from alignment.judges.kinds.verifier import (
    CannotVerify,
    Column,
    Verification,
    VerifierConfig,
    read_column,
    read_references,
)
from alignment.judges.verifiers.extraction import Extract, extract_answer, without_marks
from alignment.judges.verifiers.numbers import Decimal, Number, find_numbers, read_number
from alignment.records import Prompt

if TYPE_CHECKING:
    from alignment.engines.protocol import AlignmentEngine

_EDGES = " \t\r\n.,;:!?\"'“”‘’`*_()[]{}$"


class ExactAnswerConfig(VerifierConfig):
    """Description of a verifier of answers that are text.

    Attributes:
        reference: Column with the right answer, or a list of answers of which each is right.
        extract: Where the answer is: "auto" (the last `boxed`, `#### ANSWER` in the last line, what
            follows "answer is", otherwise the whole response), "boxed", "hashes", "phrase",
            "last-line" or "whole".
        compare: "normalized" (Unicode NFC, without case, space as one blank, without punctuation at
            either end) or "exact" (every character except space at the ends).
    """

    kind: Literal["exact-answer"] = "exact-answer"
    reference: Column = "reference"
    extract: Extract = "auto"
    compare: Literal["normalized", "exact"] = "normalized"

    def read_prompt(self, prompt: Prompt) -> list[str]:
        """Return the right answers."""
        answers = []
        for value in read_references(prompt, self.reference):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            answer = self._form(text)
            if not answer:
                raise CannotVerify(
                    f"the column {self.reference!r} contains {value!r}, which is not an answer"
                )
            answers.append(answer)
        return answers

    def verify(self, expected: list[str], text: str) -> Verification:
        """Return whether the answer of a text is one of the right ones."""
        answer = extract_answer(text, self.extract)
        if answer is None and self.extract == "auto":
            answer = text.strip()
        if answer is None:
            return Verification(0.0, "no answer found")
        right = self._form(answer) in expected
        return Verification(float(right), f"answer {answer!r:.200}, expected {expected[0]!r:.200}")

    def _form(self, text: str) -> str:
        if self.compare == "exact":
            return text.strip()
        text = unicodedata.normalize("NFC", without_marks(text)).casefold()
        return " ".join(text.split()).strip(_EDGES)


class NumericAnswerConfig(VerifierConfig):
    """Description of a verifier of answers that are numbers.

    A number is right if its distance from the reference is at most the larger of `absolute` and
    `relative` times the size of the reference, in exact arithmetic.

    Attributes:
        reference: Column with the right number, as a number or text, or a list of such numbers.
        extract: Where the answer is: as for "exact-answer", but "auto" takes the last number of the
            text where no rule applies.
        absolute: Largest distance from the reference.
        relative: The same as a share of the reference.
        decimal: Whether a "point" or a "comma" begins the decimals.
        percent: Value of 50%: "hundredths" (0.5), "ignored" (50), or "either" of them.
    """

    kind: Literal["numeric-answer"] = "numeric-answer"
    reference: Column = "reference"
    extract: Extract = "auto"
    absolute: Annotated[float, Field(ge=0)] = 0.0
    relative: Annotated[float, Field(ge=0)] = 1e-6
    decimal: Decimal = "point"
    percent: Literal["either", "hundredths", "ignored"] = "either"

    def read_prompt(self, prompt: Prompt) -> list[set[Fraction]]:
        """Return the values of each right answer."""
        return [self._reference(value) for value in read_references(prompt, self.reference)]

    def verify(self, expected: list[set[Fraction]], text: str) -> Verification:
        """Return whether the number of a text is one of the right ones."""
        number, problem = self._find(text)
        if number is None:
            return Verification(0.0, problem)
        right = any(
            abs(value - target)
            <= max(Fraction(self.absolute), Fraction(self.relative) * abs(target))
            for targets in expected
            for target in targets
            for value in self._values(number)
        )
        targets_text = ", ".join(_format_number(min(targets)) for targets in expected[:3])
        return Verification(
            float(right), f"answer {_format_number(number.value)}, expected {targets_text}"
        )

    def _reference(self, value: Any) -> set[Fraction]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = repr(value)
            if self.decimal == "comma":
                value = value.replace(".", ",")
        number, _ = self._find(value) if isinstance(value, str) else (None, "")
        if number is None:
            raise CannotVerify(
                f"the column {self.reference!r} contains {value!r:.80}, which is not a number"
            )
        return self._values(number)

    def _find(self, text: str) -> tuple[Number | None, str]:
        """Return the number of a text, or None and the reason."""
        answer = extract_answer(text, self.extract)
        if answer is not None:
            return read_number(answer, self.decimal), f"answer {answer!r:.200} is not one number"
        numbers = find_numbers(text, self.decimal) if self.extract == "auto" else []
        if not numbers:
            return None, "no answer found"
        return numbers[-1], "the last number cannot be read"

    def _values(self, number: Number) -> set[Fraction]:
        """Return the values that a number may mean."""
        if not number.percent or self.percent == "hundredths":
            return {number.value}
        percentage = number.value * 100
        return {percentage} if self.percent == "ignored" else {number.value, percentage}


class PatternConfig(VerifierConfig):
    """Description of a verifier that searches a response for a regular expression.

    Attributes:
        pattern: The regular expression, in the syntax of Python's `re`. Either this or `column`.
        column: Column with the regular expression of each prompt.
        match: Whether the pattern is to match somewhere ("search"), the whole response without
            space around it ("full"), or nowhere ("none").
        ignore_case: Whether case is ignored.
        multiline: Whether ^ and $ match at every line, and the dot also a line break.
        timeout: Time limit of a search, in seconds; a search beyond it is a failed call.
    """

    kind: Literal["pattern"] = "pattern"
    pattern: str | None = None
    column: str | None = None
    match: Literal["search", "full", "none"] = "search"
    ignore_case: bool = False
    multiline: bool = False
    timeout: Annotated[float, Field(gt=0), MAY_CHANGE] = 1.0

    @model_validator(mode="after")
    def _check_pattern(self) -> "PatternConfig":
        if (self.pattern is None) == (self.column is None):
            raise ValueError("a judge of kind pattern needs either pattern or column. Add one.")
        if self.pattern is not None:
            try:
                self._compile(self.pattern)
            except CannotVerify as error:
                raise ValueError(f"{error}. Correct the pattern.") from None
        return self

    @classmethod
    def column_settings(cls, column: str) -> dict[str, Any]:
        """Return the settings for a column in the short form of --judge."""
        return {"column": column or "pattern"}

    def shared_engine(self, context: JudgeContext) -> "AlignmentEngine | None":
        """Return the engine, because whether a time limit is exceeded depends on the machine."""
        return context.engine

    def read_prompt(self, prompt: Prompt) -> "regex.Pattern[str]":
        """Return the compiled pattern."""
        pattern = self.pattern
        if pattern is None:
            assert self.column is not None, "checked by the validator"
            pattern = read_column(prompt, self.column)
        if not isinstance(pattern, str):
            raise CannotVerify(
                f"the column {self.column!r} contains {pattern!r:.80}, which is not text"
            )
        return self._compile(pattern)

    def verify(self, expected: "regex.Pattern[str]", text: str) -> Verification:
        """Return whether the pattern matches as required."""
        find = expected.fullmatch if self.match == "full" else expected.search
        try:
            match = find(text.strip() if self.match == "full" else text, timeout=self.timeout)
        except TimeoutError:
            raise CannotVerify(
                f"the pattern {expected.pattern!r:.80} took more than {self.timeout:g} seconds"
            ) from None
        right = (match is None) == (self.match == "none")
        note = "no match" if match is None else f"matched {match[0]!r:.200}"
        return Verification(float(right), note)

    def _compile(self, pattern: str) -> "regex.Pattern[str]":
        flags = regex.IGNORECASE if self.ignore_case else 0
        flags |= regex.MULTILINE | regex.DOTALL if self.multiline else 0
        try:
            return regex.compile(pattern, flags)
        except regex.error as error:
            raise CannotVerify(f"{pattern!r:.80} is not a regular expression: {error}") from None


def _format_number(value: Fraction) -> str:
    """Return a number for readers, as a fraction if no float represents it."""
    if value.denominator == 1 and abs(value) < 10**15:
        return str(value)
    try:
        return f"{float(value):.10g}"
    except OverflowError:
        return "a number beyond 1e308"
