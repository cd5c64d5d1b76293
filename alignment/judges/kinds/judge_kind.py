"""Configuration of a judge, the base class of every judge kind, and the judge that it opens."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BaseModel, ConfigDict

from alignment.judges.formats.prompts import judge_prompt
from alignment.judges.kinds.command_settings import AnnotationSettings, JudgeFlags
from alignment.judges.questions import Question, prompts_of
from alignment.judges.results import reasons_of, require_results
from alignment.output_file import OutputFile, format_outcomes
from alignment.records import Pair, Prompt, Verdict
from alignment.rounding import SINGLE
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

if TYPE_CHECKING:
    from alignment.engines.protocol import AlignmentEngine


class Judge(Protocol):
    """Source of verdicts; in training, every call is a collective of all ranks.

    Each rank asks its own questions. A judge may have an attribute `rounding_error`, the relative
    error of its scores (see `alignment.rounding`); without it the judge counts as a model in fp32.
    If it subtracts scores, it has an attribute `score_size`, see the function of that name.
    It may have a method `component_scores`, see the function of that name, and an attribute
    `batch_size`, the number of questions that one process asks in one batch.

    Attributes:
        identity: A hash of everything that a verdict depends on.
    """

    identity: str

    def judge(
        self, questions: Sequence[Question], check: Callable[[], None] = ...
    ) -> list[Verdict]:
        """Return the verdicts on questions, in their order.

        Args:
            questions: The questions of this rank.
            check: Function that is called on all ranks from time to time and may raise an error.
        """
        ...


def rounding_error(judges: Sequence[Judge]) -> float:
    """Return the relative error of the scores that judges give, or of the mean of their scores."""
    return max((getattr(judge, "rounding_error", SINGLE) for judge in judges), default=SINGLE)


def score_size(judges: Sequence[Judge]) -> float:
    """Return the magnitude of the numbers that judges subtract to give their scores, else 0.

    The error of a score is relative to this magnitude where the score itself is smaller.
    """
    return max((getattr(judge, "score_size", 0.0) for judge in judges), default=0.0)


def component_scores(judge: Judge, verdict: Verdict) -> Mapping[str, float]:
    """Return the scores that a judge combined into a verdict, by component.

    The result is empty for most judges.
    """
    read = getattr(judge, "component_scores", None)
    scores: Mapping[str, float] = read(verdict) if read else {}
    return scores


@dataclass(frozen=True)
class JudgeContext:
    """Resources of a command that a judge may use.

    Attributes:
        pairwise: Whether the judge compares pairs instead of scoring responses.
        store: The folder for paid answers.
        engine: The engine whose ranks ask the judge together, or None in a command of one process.
        load_engine: Function that loads the model of a folder into an engine without an optimizer.
    """

    pairwise: bool
    store: Path
    engine: "AlignmentEngine | None" = None
    load_engine: "Callable[[str], AlignmentEngine] | None" = None


class _MayChange:
    """Type of `MAY_CHANGE`."""


MAY_CHANGE = _MayChange()
"""Metadata of a field that does not affect verdicts, so that it may change on resume."""


class JudgeConfig(BaseModel):
    """Description of a judge, as a YAML file states it.

    A judge kind is a subclass: its fields are the keys of the file, and `open` creates the judge.

    Attributes:
        name: Name of the judge in logs and reports. Default: the name of its file.
        kind: Name of the judge kind.
        agreement: File agreement.json with the agreement of the judge with gold, for reports.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    name: Annotated[str, MAY_CHANGE]
    kind: str
    agreement: Annotated[str | None, MAY_CHANGE] = None

    @classmethod
    def from_flag(cls, argument: str, flags: JudgeFlags) -> Self:
        """Return the judge that a command names as `--judge KIND:ARGUMENT`.

        Raises:
            UserError: If judges of this kind can only be described in a file.
        """
        kind = cls.model_fields["kind"].default
        raise UserError(
            f"A judge of kind {kind} has no short form for --judge. Describe it in a YAML file "
            f"with kind: {kind}, and pass --judge FILE.yaml."
        )

    def open(self, context: JudgeContext) -> Judge:
        """Return the judge, ready for questions.

        Raises:
            UserError: If the judge cannot be created.
        """
        raise NotImplementedError

    def check_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
        """Check that the prompts have the data that this judge requires.

        Args:
            prompts: The prompts whose responses will be judged.
            source: The flag or file with the prompts, for the message.

        Raises:
            UserError: If a prompt has no such data, or data that cannot be used.
        """
        if template := getattr(self, "template", None):
            judge_prompt(template).check_prompts(prompts, source)

    def annotate(
        self, questions: Sequence[Question], output: OutputFile, settings: AnnotationSettings
    ) -> int:
        """Ask all questions, write the verdicts, and return the exit status.

        Raises:
            UserError: If the judge cannot be created, or the task is not judging.
            TooFewResults: If too many questions have no verdict.
        """
        if settings.task != "judge":
            raise UserError(
                f"--{settings.task} requires a judge at an endpoint, and {self.name} is a judge of "
                f"kind {self.kind}."
            )
        for name in settings.cost.overrides:
            why = "whose files state it" if self.asks_endpoints else "which costs no tokens"
            raise UserError(
                f"--{name.replace('_', '-')} requires a judge at an endpoint, and {self.name} is a "
                f"judge of kind {self.kind}, {why}. Leave the flag out."
            )
        self.check_prompts(prompts_of(questions), "--input")
        if settings.dry_run:
            from alignment.judges.annotation_cost import print_costs

            print_costs(self, questions, output.path.parent)
            return 0
        pairwise = isinstance(questions[0].item, Pair)
        judge = self.open(JudgeContext(pairwise, output.path.parent))
        try:
            output.check_or_create(judge.identity)
            verdicts: list[Verdict] = []
            with Progress("judging", len(questions), "items") as progress:
                size = getattr(judge, "batch_size", 1)
                for begin in range(0, len(questions), size):
                    verdicts += judge.judge(questions[begin : begin + size])
                    progress.update(len(verdicts))
        finally:
            if close := getattr(judge, "close", None):
                close()
        output.write(verdicts, {"judge": self.provenance()})
        print(f"{format_outcomes(verdicts)}; wrote {output.path}")
        require_results(reasons_of(verdicts), len(verdicts), settings.max_failed)
        return 0

    @property
    def asks_endpoints(self) -> bool:
        """Return whether verdicts may cost money."""
        return False

    def provenance(self) -> dict[str, Any]:
        """Return the description of the judge for the file next to an output."""
        return self.model_dump(exclude={"name", "agreement"}, exclude_none=True)

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that must not change when a run resumes.

        These are the settings that affect verdicts, but not the address of a server, the path of a
        file or the speed. Hashes of the content of files replace their names.

        Raises:
            UserError: If a file cannot be read.
        """
        fields = type(self).model_fields
        fixed = {name for name, field in fields.items() if MAY_CHANGE not in field.metadata}
        return self.model_dump(include=fixed, exclude_none=True) | self.content_hashes()

    def content_hashes(self) -> dict[str, Any]:
        """Return hashes of the files that settings name, by the names of the settings."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Return a hash that is the same for judges that differ at most in their template.

        The same model may score responses as gold and compare pairs for rewards.
        """
        depends = {**self.resume_settings(), "template": None}
        return sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    @property
    def report_kind(self) -> str:
        """Return the word for this judge in reports."""
        return self.kind

    def summary(self) -> dict[str, Any]:
        """Return the description of the judge in the record of a run."""
        settings = self.model_dump(exclude={"name", "kind"})
        return {"name": self.name, "kind": self.report_kind, "settings": settings}

    def read_agreement(self) -> dict[str, float | None] | None:
        """Return the measures of agreement with gold, by name, or None without a file.

        Raises:
            UserError: If the file is not an agreement.json.
        """
        if self.agreement is None:
            return None
        try:
            measures = json.loads(Path(self.agreement).read_text())["all"]["agreement"]
            return {name: measure["value"] for name, measure in measures.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"The judge {self.name} names {self.agreement} as its agreement, which is not "
                f"an agreement.json of et-align agreement: {error}"
            ) from error

    def hash_file(self, file: str | Path) -> str:
        """Return a hash of the content of a file that a setting names.

        Raises:
            UserError: If the file cannot be read.
        """
        try:
            return sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"The judge {self.name} names {file}, which cannot be read: {error.strerror}."
            ) from error

    def hash_template(self, template: str | None) -> dict[str, str]:
        """Return the hash of a prompt template that is a file, by the name of its setting."""
        if template is None or not template.endswith(".txt"):
            return {}
        return {"template": self.hash_file(template)}
