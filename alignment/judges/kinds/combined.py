"""Judge kinds that combine judges: "sum", a weighted sum with gates, and "route", one for each row.

kind: sum
components:
  correct: {kind: numeric-answer, reference: answer, weight: 2}
  style: {file: style.yaml, only_if: correct, otherwise: 0}
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from alignment.judges.formats.scale import HIGH
from alignment.judges.kinds.judge_kind import Judge, JudgeConfig, JudgeContext
from alignment.judges.questions import Question, prompt_of
from alignment.records import Prompt
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.judges.kinds.combined_judge import RouteJudge, SumJudge

_SETTINGS = ("weight", "only_if", "at_least", "otherwise")


class CombinedConfig(JudgeConfig):
    """Base of the judges that ask other judges."""

    @property
    def parts(self) -> Mapping[str, JudgeConfig]:
        """Return the judges that this one asks, by name."""
        raise NotImplementedError

    def questions_of(self, part: str, questions: Sequence[Question]) -> list[Question]:
        """Return the questions about responses that a judge may receive."""
        return list(questions)

    def is_gated(self, part: str) -> bool:
        """Return whether the scores of other judges decide how often a judge is called."""
        return False

    def open_parts(self, context: JudgeContext) -> dict[str, Judge]:
        """Return the judges, opened for scores: pairs are compared by their scores."""
        context = replace(context, pairwise=False)
        return {name: part.open(context) for name, part in self.parts.items()}

    @property
    def asks_endpoints(self) -> bool:
        """Return whether one of the judges is at an endpoint."""
        return any(part.asks_endpoints for part in self.parts.values())

    @property
    def own_settings(self) -> dict[str, Any]:
        """Return the settings other than those of the judges."""
        raise NotImplementedError

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings of this judge and of its judges that must not change on resume."""
        parts = {name: part.resume_settings() for name, part in self.parts.items()}
        return {"kind": self.kind, **self.own_settings, "parts": parts}


class Component(BaseModel):
    """Judge of a sum, with its weight and its gate.

    Attributes:
        judge: The judge.
        weight: Weight of its score; a component of negative weight lowers the sum.
        only_if: Earlier component whose score must reach `at_least` for this one to be called.
        at_least: Least score, from 0 to 9, that opens the gate.
        otherwise: Score of this component, from 0 to 9, if the gate is closed.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    judge: SerializeAsAny[JudgeConfig]
    weight: float = 1.0
    only_if: str | None = None
    at_least: Annotated[float, Field(ge=0, le=HIGH)] = HIGH
    otherwise: Annotated[float, Field(ge=0, le=HIGH)] = 0.0


class SumConfig(CombinedConfig):
    """Description of a weighted sum of judges.

    With normalization, the sum of weight times score is mapped linearly from its possible range to
    0 to 9. For weights that are not negative this is the weighted mean; a component of
    negative weight counts as 9 minus its score.

    Attributes:
        components: Judges by name, each a mapping with the keys of a judge, or with `file`, and
            with `weight`, `only_if`, `at_least` and `otherwise`.
        normalize: Whether the sum is mapped to 0 to 9. Otherwise the weights must keep it in this
        range.
    """

    kind: Literal["sum"] = "sum"
    components: dict[str, Component]
    normalize: bool = True

    @field_validator("components", mode="before")
    @classmethod
    def _read_components(cls, components: Any) -> Any:
        if not isinstance(components, dict) or not components:
            raise ValueError(
                "components must be a mapping from names to judges. Add at least one, such as "
                "correct: {kind: numeric-answer}."
            )
        return {str(name): _read_component(str(name), c) for name, c in components.items()}

    @model_validator(mode="after")
    def _check_components(self) -> "SumConfig":
        before: list[str] = []
        for name, component in self.components.items():
            if component.only_if is not None and component.only_if not in before:
                raise ValueError(
                    f"{name} has only_if: {component.only_if}, which is not a component before it. "
                    f"Choose one of {', '.join(before) or 'none, because it is the first'}."
                )
            before.append(name)
        low, high = self.range
        if low == high:
            raise ValueError("all weights are 0, so that no score counts. Give one a weight.")
        if not self.normalize and not (low >= 0 and high <= HIGH * (1 + 1e-9)):
            raise ValueError(
                f"normalize is false, and the sum can lie between {low:g} and {high:g}, outside of "
                "0 to 9. Choose weights of at least 0 that sum up to at most 1, or leave normalize "
                "out."
            )
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest sum that scores from 0 to 9 can have."""
        weights = [component.weight for component in self.components.values()]
        return HIGH * sum(min(w, 0.0) for w in weights), HIGH * sum(max(w, 0.0) for w in weights)

    @property
    def own_settings(self) -> dict[str, Any]:
        """Return weights and gates, and whether the sum is normalized."""
        components = {
            name: component.model_dump(exclude={"judge"}, exclude_none=True)
            for name, component in self.components.items()
        }
        return {"normalize": self.normalize, "components": components}

    @property
    def parts(self) -> Mapping[str, JudgeConfig]:
        """Return the judges of the components."""
        return {name: component.judge for name, component in self.components.items()}

    def is_gated(self, part: str) -> bool:
        """Return whether a component is called only where another one has a high score."""
        return self.components[part].only_if is not None

    def check_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
        """Check the prompts by every component; see `JudgeConfig`."""
        for part in self.parts.values():
            part.check_prompts(prompts, source)

    def open(self, context: JudgeContext) -> "SumJudge":
        """Return the judge, with all of its components opened.

        Raises:
            UserError: If a component cannot be opened.
        """
        from alignment.judges.kinds.combined_judge import SumJudge

        return SumJudge(self, self.open_parts(context))


class RouteConfig(CombinedConfig):
    """Description of a judge that asks another judge for each row, by a column.

    Attributes:
        column: Column of the prompts' metadata that chooses the judge.
        routes: Judges by the value of the column, each a mapping with the keys of a judge, or with
            `file`.
        default: Judge of the rows with another value or none. Without a default, such rows are
        refused.
    """

    kind: Literal["route"] = "route"
    column: Annotated[str, Field(min_length=1)]
    routes: dict[str, SerializeAsAny[JudgeConfig]]
    default: SerializeAsAny[JudgeConfig] | None = None

    @field_validator("routes", mode="before")
    @classmethod
    def _read_routes(cls, routes: Any) -> Any:
        if not isinstance(routes, dict) or not routes:
            raise ValueError(
                "routes must be a mapping from values of the column to judges. Add at least one, "
                "such as math: {kind: numeric-answer}."
            )
        return {value_name(value): _read_part(value_name(value), r) for value, r in routes.items()}

    @field_validator("default", mode="before")
    @classmethod
    def _read_default(cls, default: Any) -> Any:
        return None if default is None else _read_part("default", default)

    @property
    def own_settings(self) -> dict[str, Any]:
        """Return the column."""
        return {"column": self.column}

    @property
    def parts(self) -> Mapping[str, JudgeConfig]:
        """Return the judges of the routes, and the default one as "default"."""
        default = {} if self.default is None else {"default": self.default}
        return self.routes | default

    def questions_of(self, part: str, questions: Sequence[Question]) -> list[Question]:
        """Return the questions about the rows of a route."""
        return [question for question in questions if self.route_of(prompt_of(question)) == part]

    def route_of(self, prompt: Prompt) -> str | None:
        """Return the name of the judge for a prompt, or None if no route leads to one."""
        value = prompt.metadata.get(self.column)
        name = None if value is None else value_name(value)
        if name is not None and name in self.routes:
            return name
        return None if self.default is None else "default"

    def check_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
        """Check that every prompt has a route, and the prompts of each by its judge.

        Raises:
            UserError: If a prompt has no route.
        """
        by_route: dict[str | None, list[Prompt]] = {}
        for prompt in prompts:
            by_route.setdefault(self.route_of(prompt), []).append(prompt)
        if lost := by_route.pop(None, []):
            value = lost[0].metadata.get(self.column)
            text = "no value" if value is None else repr(value)
            raise UserError(
                f"The judge {self.name} has no route for {len(lost):,} of the {len(prompts):,} "
                f"prompts of {source}, the first being {lost[0].id!r} with {text} in the column "
                f"{self.column!r}; its routes are {', '.join(self.routes)}. Add a route or default."
            )
        for name, routed in by_route.items():
            assert name is not None
            self.parts[name].check_prompts(routed, source)

    def open(self, context: JudgeContext) -> "RouteJudge":
        """Return the judge, with the judges of all routes opened.

        Raises:
            UserError: If a judge cannot be opened.
        """
        from alignment.judges.kinds.combined_judge import RouteJudge

        return RouteJudge(self, self.open_parts(context))


def value_name(value: Any) -> str:
    """Return the value of a column, or the key of a route, as text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _read_component(name: str, values: Any) -> Component:
    """Return the component that a mapping describes.

    Raises:
        ValueError: The mapping is invalid; the message is a sentence.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a mapping with kind or file, not {values!r:.60}.")
    settings = {key: value for key, value in values.items() if key in _SETTINGS}
    for key, value in settings.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "only_if" and not isinstance(value, str):
            raise ValueError(f"{name}: only_if must be the name of a component, not {value!r}.")
        if key != "only_if" and not (is_number and abs(value) < float("inf")):
            raise ValueError(f"{name}: {key} must be a number, not {value!r}.")
        if key in ("at_least", "otherwise") and not 0 <= value <= HIGH:
            raise ValueError(f"{name}: {key} must be a score from 0 to 9, not {value}.")
    if {"at_least", "otherwise"} & set(settings) and "only_if" not in settings:
        raise ValueError(f"{name}: at_least and otherwise require only_if. Name a component.")
    rest = {key: value for key, value in values.items() if key not in _SETTINGS}
    for key in map(str, rest):
        nearest = get_close_matches(key, _SETTINGS, n=1, cutoff=0.75)
        if nearest and key not in _keys_of(rest.get("kind")):
            raise ValueError(
                f"{name}: {key} is not a key of a component. Did you mean {nearest[0]}?"
            )
    return Component(judge=_read_part(name, rest), **settings)


def _keys_of(kind: Any) -> Collection[str]:
    """Return the keys of a judge kind, or none if the kind does not exist."""
    from alignment.judges.kinds.registry import JUDGE_KINDS

    return JUDGE_KINDS[kind].model_fields if kind in JUDGE_KINDS else ()


def _read_part(name: str, values: Any) -> JudgeConfig:
    """Return the judge that a mapping describes.

    Raises:
        ValueError: The mapping is invalid; the message is a sentence.
    """
    from alignment.judges.kinds.registry import judge_from_values, read_judge

    if isinstance(values, JudgeConfig):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a mapping with kind or file, not {values!r:.60}.")
    try:
        if "file" not in values:
            return judge_from_values({"name": name, **values}, name)
        if other_keys := sorted(map(str, set(values) - {"file"})):
            raise ValueError(
                f"{name} names a file, which describes the judge, so that {other_keys[0]} must be "
                "in the file."
            )
        return read_judge(str(values["file"])).model_copy(update={"name": name})
    except UserError as error:
        raise ValueError(str(error)) from None
