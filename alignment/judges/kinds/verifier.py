"""Base of the judge kinds that verify a response against data of its prompt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from alignment.judges.formats.scale import HIGH
from alignment.judges.kinds.command_settings import JudgeFlags
from alignment.judges.kinds.judge_kind import JudgeConfig, JudgeContext
from alignment.judges.kinds.program_judge import ProgramJudge
from alignment.judges.kinds.score_pairs import prefer_higher, responses_of
from alignment.judges.verifiers.extraction import final_text
from alignment.records import Outcome, Pair, Prompt, Response, Verdict
from alignment.rounding import EXACT
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.engines.protocol import AlignmentEngine


@dataclass(frozen=True)
class Verification:
    """Result of verifying a response.

    Attributes:
        score: From 0 (wrong) to 1 (right).
        note: Sentence on the comparison, for readers.
    """

    score: float
    note: str


class CannotVerify(Exception):
    """Failure of the verification itself, which gives a failed verdict."""


class VerifierConfig(JudgeConfig):
    """Description of a verifier: a program that checks a response against data of its prompt.

    A right response scores 9; a wrong one, or one without an answer, scores 0. A response whose
    thinking does not end is wrong; thinking is not checked.
    """

    VERSION: ClassVar[int] = (
        1  # increase this when a rule changes, because the judge is then another one
    )

    @classmethod
    def from_flag(cls, argument: str, flags: JudgeFlags) -> Self:
        """Return the verifier that `--judge KIND:COLUMN` names, with its defaults."""
        kind = cls.model_fields["kind"].default
        return cls(name=f"{kind}:{argument}".rstrip(":"), **cls.column_settings(argument))

    @classmethod
    def column_settings(cls, column: str) -> dict[str, Any]:
        """Return the settings for a column in the short form of --judge."""
        return {"reference": column} if column else {}

    def read_prompt(self, prompt: Prompt) -> Any:
        """Return the data of a prompt that the verification needs.

        Raises:
            CannotVerify: The prompt has no usable data.
        """
        raise NotImplementedError

    def verify(self, expected: Any, text: str) -> Verification:
        """Return the result of verifying a text without its thinking.

        Args:
            expected: Result of `read_prompt`.
            text: The response.

        Raises:
            CannotVerify: The verification itself failed.
        """
        raise NotImplementedError

    @property
    def parallel(self) -> int:
        """Return the number of responses that a rank verifies concurrently."""
        return 1

    def open(self, context: JudgeContext) -> ProgramJudge:
        """Return the judge; every rank verifies its own responses."""
        return ProgramJudge(Verifier(self), self.shared_engine(context))

    def shared_engine(self, context: JudgeContext) -> "AlignmentEngine | None":
        """Return the engine if only one rank of each share of the data must verify, else None."""
        return None

    def check_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
        """Check that every prompt has the data for the comparison; see `JudgeConfig`."""
        problems = []
        for prompt in prompts:
            try:
                self.read_prompt(prompt)
            except CannotVerify as error:
                problems.append(f"prompt {prompt.id!r}: {error}")
        if problems:
            end = "" if problems[0].endswith("?") else "."
            raise UserError(
                f"The judge {self.name} ({self.kind}) cannot verify responses to "
                f"{len(problems):,} of the {len(prompts):,} prompts of {source}, first "
                f"{problems[0]}{end}"
            )


class Verifier:
    """Program that verifies responses as a `VerifierConfig` describes.

    Attributes:
        identity: A hash of the settings and the version of the rules.
    """

    def __init__(self, config: VerifierConfig) -> None:
        """Create the verifier."""
        self.config, self.parallel = config, config.parallel
        depends = json.dumps([config.VERSION, config.resume_settings()], sort_keys=True)
        self.identity = sha256(depends.encode()).hexdigest()

    def verdict(self, item: Response | Pair, swapped: bool = False, sample: int = 0) -> Verdict:
        """Return the verdict on a response, or on a pair by the higher score."""
        if isinstance(item, Pair):
            first, second = (self.verdict(response) for response in responses_of(item))
            return prefer_higher(item, first, second, swapped, sample, EXACT)
        text = final_text(item.text)
        try:
            expected = self.config.read_prompt(item.prompt)
            if text is None:
                result = Verification(0.0, "the thinking does not end")
            else:
                result = self.config.verify(expected, text)
        except CannotVerify as error:
            return Verdict(
                item.id, Outcome.FAILED, sample=sample, reason=str(error), judge=self.identity
            )
        score = HIGH * result.score
        return Verdict(
            item.id, Outcome.SCORE, score, sample=sample, answer=result.note, judge=self.identity
        )


Column = Annotated[str, Field(min_length=1)]


def read_column(prompt: Prompt, column: str) -> Any:
    """Return a value of a prompt's metadata.

    Raises:
        CannotVerify: If the prompt has no such value.
    """
    if column in prompt.metadata:
        return prompt.metadata[column]
    names = sorted(prompt.metadata)
    nearest = get_close_matches(column, names, n=1)
    advice = f" Did you mean {nearest[0]!r}?" if nearest else ""
    columns = f"its columns are {', '.join(names)}" if names else "it has no metadata"
    raise CannotVerify(
        f"there is no value in the column {column!r}; {columns}.{advice}".rstrip(".")
    )


def read_references(prompt: Prompt, column: str) -> list[Any]:
    """Return the reference answers of a prompt, of which any one makes a response right.

    Raises:
        CannotVerify: If there is none.
    """
    value = read_column(prompt, column)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or any(v is None or isinstance(v, dict | list) for v in values):
        raise CannotVerify(f"the column {column!r} contains {value!r:.60}, which is not an answer")
    return values
