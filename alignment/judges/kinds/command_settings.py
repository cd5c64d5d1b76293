"""Settings of commands for judges: the flags of a judge, costs of an endpoint, and annotation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class JudgeFlags:
    """Values of the command-line flags that describe a judge; see `et-align annotate --help`."""

    rule_text: str | None = None
    scale: Sequence[float] | None = None
    model: str = ""
    revision: str = ""
    api_key_variable: str | None = None
    template: str | None = None
    thinking: str = "none"
    expected_score: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 8192
    reasoning_effort: str | None = None
    seed: int | None = None
    timeout: float | None = None
    tries: int = 7
    first_wait: float = 1.0
    max_wait: float | None = None


@dataclass(frozen=True)
class CostSettings:
    """Settings of an endpoint that affect cost and speed, but no verdict.

    They replace those of the judge's file, see `EndpointJudgeConfig`; None keeps the value of the
    file.
    """

    concurrency: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    price_cached: float | None = None
    max_cost: float | None = None
    replicas: int | None = None
    tokens_per_second: float | None = None
    answer_tokens: float | None = None
    tokenizer: str | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Return the settings that have a value, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class AnnotationSettings:
    """Settings of an annotation that do not belong to the judge.

    Attributes:
        task: What to request: verdicts, responses to prompts, or rubrics of prompts.
        max_failed: Share of the questions that may end without a result.
        cache: File in which answers are stored. Default: next to the output.
        dry_run: Whether to print only the estimate of the cost.
        counted: Further files of answers whose cost counts against the budget.
        cost: Settings of cost and speed.
    """

    task: Literal["judge", "generate", "rubrics"] = "judge"
    max_failed: float = 0.05
    cache: str | None = None
    dry_run: bool = False
    counted: Sequence[Path] = ()
    cost: CostSettings = CostSettings()
