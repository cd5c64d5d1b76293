"""The small YAML file that describes a judge of a policy in training."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

from alignment.commands.annotate import rule_judge
from alignment.endpoints.client import MAX_WAIT
from alignment.judges.formats.scale import check_scale
from alignment.judges.kinds.function_judge import FUNCTION_TIMEOUT
from alignment.judges.kinds.local_judge import model_digest
from megatron_ext.errors import UserError

_KINDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false",
    dict: "a mapping", list: "a list",
}  # fmt: skip
# What a file may say of a judge of each kind, beside what it may say of all.
_OF_ALL = ("name", "kind", "agreement")
_ASKED = ("template", "thinking", "temperature", "top_k", "top_p", "max_new_tokens", "rows")
_OF_KIND = {
    "local": ("model", *_ASKED, "length", "chat_template", "chat_template_kwargs"),
    "endpoint": (
        "model", "url", "revision", *_ASKED, "reasoning_effort", "expected_score", "timeout",
        "tries", "first_wait", "max_wait",
    ),
    "rule": ("rule", "rule_text"),
    "function": ("function", "scale", "timeout"),
}  # fmt: skip
# Defaults of some kinds that differ from those of all: the defaults of `et-align annotate`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "endpoint": {"temperature": 0.0, "top_k": None, "top_p": None, "max_new_tokens": 8192},
    "function": {"timeout": FUNCTION_TIMEOUT},
}


@dataclass(frozen=True)
class JudgeSpec:
    """What a file says of a judge.

    Attributes:
        kind: "local", "endpoint", "rule" or "function".
        model: local: a folder; endpoint: the name that it serves.
        url: of an endpoint, up to and with /v1.
        rule, rule_text: see `et-align annotate`.
        function: FILE.py:NAME, which takes a Response and gives a score, or None where it has none.
        template, thinking: what it is asked, and whether it thinks.
        temperature, top_k, top_p, max_new_tokens: of a judge that thinks, or of an endpoint, which
            has other defaults and is not sent a top_k or top_p that is None.
        reasoning_effort: of an endpoint that has it: low, medium or high.
        expected_score: of an endpoint: the mean over the labels' probabilities.
        length: the most tokens of a question and its answer, of a local judge.
        rows: questions asked at a time: local, of a rank; endpoint, calls at a time of a rank.
        timeout: seconds of a call of an endpoint or a function.
        tries, first_wait: of a call of an endpoint; waits double up to a minute.
        max_wait: the longest wait, in seconds, that an endpoint may ask for.
        scale: the lowest and the highest score of a function, which are mapped to 0 to 9.
        agreement: agreement.json of the judge with gold, for the report of a study.
    """

    name: str
    kind: str
    model: str = ""
    url: str = ""
    revision: str = ""
    rule: str = "gold"
    rule_text: str | None = None
    function: str = ""
    template: str | None = None
    thinking: str = "none"
    temperature: float = 0.7
    top_k: int | None = 20  # None is an endpoint's alone
    top_p: float | None = 0.95
    max_new_tokens: int = 4096
    reasoning_effort: str | None = None
    expected_score: bool = True
    length: int = 8192
    rows: int = 32
    timeout: float = 600.0
    tries: int = 12
    first_wait: float = 1.0
    max_wait: float = MAX_WAIT
    scale: list[float] | None = None
    agreement: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str) -> "JudgeSpec":
        """What a file says.

        Raises:
            UserError: it cannot be read, or says something unknown or impossible.
        """
        try:
            given = yaml.safe_load(Path(file).read_text())
        except OSError as error:
            raise UserError(f"the judge {file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"the judge {file} is not YAML: {error}") from error
        known = [f.name for f in fields(cls)]
        if not isinstance(given, dict) or "kind" not in given:
            raise UserError(f"the judge {file} must be a mapping with a kind, such as kind: local")
        if unknown := sorted(set(given) - set(known), key=str):
            raise UserError(f"{file}: {unknown[0]} is not of a judge: known are {', '.join(known)}")
        kind = given["kind"]
        defaults = _DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
        values: dict[str, Any] = {"name": Path(file).stem, **defaults, **given}
        spec = cls(**values)
        for one in fields(cls):
            value = getattr(spec, one.name)
            if wanted := _wanted(value, one.type):
                raise UserError(f"{file}: {one.name} must be {wanted}, not {value!r}")
        for name in ("rows", "tries", "max_new_tokens", "length"):
            if getattr(spec, name) < 1:
                raise UserError(f"{file}: {name} must be at least 1, not {getattr(spec, name)}")
        if spec.timeout <= 0:
            raise UserError(f"{file}: timeout must be above 0, not {spec.timeout}")
        for name in ("first_wait", "max_wait"):
            if getattr(spec, name) < 0:
                raise UserError(f"{file}: {name} must not be negative, not {getattr(spec, name)}")
        if spec.scale is not None:
            if any(_wanted(end, float) for end in spec.scale):
                raise UserError(f"{file}: scale must be two numbers, not {spec.scale!r}")
            check_scale(spec.scale, f"{file}: scale")
        needs = {
            "local": ["model"],
            "endpoint": ["model", "url"],
            "rule": ["rule_text"],
            "function": ["function"],
        }
        if spec.kind not in needs:
            raise UserError(f"{file}: kind is one of {', '.join(needs)}, not {spec.kind!r}")
        used = (*_OF_ALL, *_OF_KIND[spec.kind])
        if unused := [name for name in given if name not in used]:
            raise UserError(
                f"{file}: {unused[0]} is not of a judge of kind {spec.kind}, whose are "
                f"{', '.join(used)}"
            )
        for name in needs[spec.kind]:
            if not getattr(spec, name):
                raise UserError(f"{file}: a judge of kind {spec.kind} needs {name}")
        for name, none in (("top_k", "0"), ("top_p", "1.0")):
            if spec.kind == "local" and getattr(spec, name) is None:
                raise UserError(f"{file}: {name} may be null of an endpoint alone: write {none}")
        if spec.thinking not in ("none", "asked", "opened"):
            raise UserError(f"{file}: thinking is none, asked or opened, not {spec.thinking!r}")
        return spec

    def lasting(self) -> dict[str, Any]:
        """What verdicts depend on: not where a server or a file is, nor how it is asked. Hashes of
        what is in files stand for their names.

        Raises:
            UserError: a file cannot be read.
        """
        free = ("name", "url", "rows", "timeout", "tries", "first_wait", "max_wait", "agreement")
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        if self.scale is None:
            del kept["scale"]  # runs begun before there were scales resume
        if self.template and self.template.endswith(".txt"):
            kept["template"] = self._hash(self.template)
        if self.kind == "local":
            own = Path(self.model, "chat_template.jinja")
            chat_template = self.chat_template or (own if own.is_file() else None)
            kept["model"] = model_digest(self.model)
            kept["chat_template"] = chat_template and self._hash(chat_template)
        elif self.kind == "rule":
            kept["rule_text"] = rule_judge(f"rule:{self.rule}", self.rule_text).fluency.digest
        elif self.kind == "function":
            file, _, name = self.function.rpartition(":")
            kept["function"] = f"{self._hash(file)}:{name}"
        return kept

    @property
    def who(self) -> str:
        """A hash that two judges share who differ in no more than the template: of the same files,
        one may be asked about responses, for gold, and the other about pairs, for rewards."""
        depends = {**self.lasting(), "template": None}
        return sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _hash(self, file: str | Path) -> str:
        try:
            return sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"the judge {self.name} names {file}, which cannot be read: {error.strerror}"
            ) from error

    def agreed(self) -> dict[str, float | None] | None:
        """Its figures of agreement with gold, by name.

        Raises:
            UserError: the file that they are in cannot be used.
        """
        if self.agreement is None:
            return None
        try:
            figures = json.loads(Path(self.agreement).read_text())["all"]["agreement"]
            return {name: figure["value"] for name, figure in figures.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the judge {self.name} names {self.agreement} as its agreement, which is no "
                f"agreement.json of et-align agreement: {error}"
            ) from error

    def told(self) -> dict[str, Any]:
        """What a reader of a run wants to know."""
        kinds = {"local": "thinking" if self.thinking != "none" else "label", "endpoint": "http"}
        return {"name": self.name, "kind": kinds.get(self.kind, self.kind), **self._provenance()}

    def _provenance(self) -> dict[str, Any]:
        return {"settings": {k: v for k, v in asdict(self).items() if k not in ("name", "kind")}}


def _wanted(value: Any, kind: Any) -> str:
    """What a value of YAML should be by the type of its field, or nothing where it is; a whole
    number is a number too."""
    if isinstance(kind, UnionType):
        if value is None:
            return ""
        kind = get_args(kind)[0]
    kind = get_origin(kind) or kind
    fits = isinstance(value, (int, float) if kind is float else kind)
    if isinstance(value, bool):
        fits = kind is bool
    if kind is float and fits:
        fits = math.isfinite(value)
    return "" if fits else _KINDS[kind]
