"""Registry of the judge kinds, and the reader of the files that describe judges.

    kind: local          # a model on the ranks of the policy, with its layout
    model: runs/judge/best
    template: pointwise
    thinking: asked

To add a kind, write a subclass of `JudgeConfig` and register it here; annotation, evaluation and
training then accept its files.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alignment.judges.kinds.answer_verifiers import (
    ExactAnswerConfig,
    NumericAnswerConfig,
    PatternConfig,
)
from alignment.judges.kinds.code_tests import CodeTestsConfig
from alignment.judges.kinds.combined import RouteConfig, SumConfig
from alignment.judges.kinds.command_settings import JudgeFlags
from alignment.judges.kinds.endpoint import EndpointJudgeConfig
from alignment.judges.kinds.function import FunctionJudgeConfig
from alignment.judges.kinds.instructions import InstructionsConfig
from alignment.judges.kinds.judge_kind import JudgeConfig
from alignment.judges.kinds.local import LocalJudgeConfig
from alignment.judges.kinds.rule import RuleJudgeConfig
from megatron_ext.errors import UserError

JUDGE_KINDS: dict[str, type[JudgeConfig]] = {
    "local": LocalJudgeConfig,
    "endpoint": EndpointJudgeConfig,
    "rule": RuleJudgeConfig,
    "function": FunctionJudgeConfig,
    "exact-answer": ExactAnswerConfig,
    "numeric-answer": NumericAnswerConfig,
    "pattern": PatternConfig,
    "instructions": InstructionsConfig,
    "code-tests": CodeTestsConfig,
    "sum": SumConfig,
    "route": RouteConfig,
}

_OPEN_FILES: ContextVar[tuple[str, ...]] = ContextVar("files of judges being read", default=())

_RECORDS = {".jsonl", ".csv", ".tsv", ".parquet"}
"""Endings of files of records, which may be given in the place of a judge."""

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "list_type": "a list",
}


def read_judge(file: str) -> JudgeConfig:
    """Return the judge that a YAML file describes.

    Raises:
        UserError: If the file cannot be read, or a key or value is invalid.
    """
    if _RECORDS & {*Path(file).suffixes}:
        raise UserError(
            f"The judge {file} holds verdicts or labels of people on existing responses, and "
            "a policy will write other ones. Train a judge on them with et-align "
            "train-judge --gold, and name a YAML file that describes it."
        )
    try:
        values = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise UserError(f"The judge {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The judge {file} is not YAML: {error}") from error
    if not isinstance(values, dict) or "kind" not in values:
        raise UserError(f"The judge {file} must be a mapping with a kind, such as kind: local.")
    if file in (files := _OPEN_FILES.get()):
        raise UserError(f"The judge {file} contains itself. Remove it from its components.")
    token = _OPEN_FILES.set((*files, file))
    try:
        return judge_from_values({"name": Path(file).stem, **values}, file)
    finally:
        _OPEN_FILES.reset(token)


def judge_from_values(values: Mapping[Any, Any], source: str) -> JudgeConfig:
    """Return the judge that the keys of a file, or of a part of one, describe.

    Args:
        values: The keys and values, with the name of the judge.
        source: The file or the name of the part, for error messages.

    Raises:
        UserError: If a key or value is invalid.
    """
    kind = values.get("kind")
    if kind is None:
        raise UserError(f"{source} needs kind or file. Add kind, such as kind: numeric-answer.")
    if not isinstance(kind, str):
        raise UserError(f"{source}: kind must be text, not {kind!r}.")
    if kind not in JUDGE_KINDS:
        names = ", ".join(JUDGE_KINDS)
        raise UserError(
            f"{source}: kind is one of {names}, not {kind!r}.{_nearest(kind, JUDGE_KINDS)}"
        )
    return _validate(JUDGE_KINDS[kind], values, source)


def judge_from_flag(judge: str, flags: JudgeFlags) -> JudgeConfig:
    """Return the judge that a command names with --judge.

    Args:
        judge: A YAML file, the address of an endpoint, KIND or KIND:ARGUMENT.
        flags: The values of the other flags that describe a judge.

    Raises:
        UserError: If there is no such judge.
    """
    if is_judge_file(judge):
        return read_judge(judge)
    if judge.startswith(("http://", "https://")):
        return EndpointJudgeConfig.from_flag(judge, flags)
    kind, _, argument = judge.partition(":")
    if kind not in JUDGE_KINDS:
        raise UserError(
            f"--judge {judge} is neither http://HOST:PORT/v1, nor a YAML file, nor a judge kind "
            f"({', '.join(JUDGE_KINDS)}).{_nearest(kind, JUDGE_KINDS)}"
        )
    return JUDGE_KINDS[kind].from_flag(argument, flags)


def is_judge_file(judge: str) -> bool:
    """Return whether the value of --judge is the name of a YAML file."""
    return judge.endswith((".yaml", ".yml"))


def _validate(config: type[JudgeConfig], values: Mapping[Any, Any], file: str) -> JudgeConfig:
    """Return the configuration with these values.

    Raises:
        UserError: A key or value is invalid; the message is one sentence.
    """
    try:
        return config.model_validate(values)
    except ValidationError as error:
        # Report an unknown key before a missing one: it is often the missing key, misspelled.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(f"{file}: {_sentence(errors[0], values['kind'], config)}") from None


def _sentence(error: ErrorDetails, kind: str, config: type[JudgeConfig]) -> str:
    """Return a sentence on the error in a key and its fix."""
    key = str(next(iter(error["loc"]), ""))  # an error of several keys has no location
    value, name = error["input"], error["type"]
    context = error.get("ctx", {})
    if name == "extra_forbidden":
        keys = list(config.model_fields)
        return (
            f"{key} is not a key of a judge of kind {kind}, whose keys are "
            f"{', '.join(keys)}.{_nearest(key, keys)}"
        )
    if name == "missing" or name == "string_too_short":
        return f"a judge of kind {kind} needs {key}. Add the key {key}."
    if name == "value_error":
        return str(context["error"])
    if len(error["loc"]) > 1 and name in _EXPECTED:
        return f"{key} must be a list whose elements are each {_EXPECTED[name]}, not {value!r}."
    if name in _EXPECTED:
        text = "null. Leave the key out to use its default" if value is None else repr(value)
        return f"{key} must be {_EXPECTED[name]}, not {text}."
    if name == "greater_than_equal" and context["ge"] == 0:
        return f"{key} must not be negative, not {value}."
    if name == "greater_than_equal":
        return f"{key} must be at least {context['ge']:g}, not {value}."
    if name == "greater_than":
        return f"{key} must be above {context['gt']:g}, not {value}."
    if name == "literal_error":
        return f"{key} is one of {context['expected']}, not {value!r}."
    return f"{key}: {error['msg']}."


def _nearest(word: str, words: Any) -> str:
    matches = get_close_matches(word, list(words), n=1)
    return f" Did you mean {matches[0]}?" if matches else ""
