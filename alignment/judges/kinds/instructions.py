"""Judge kind "instructions": checks of instructions as in IFEval and IFBench.

kind: instructions
names: instruction_id_list      # columns of the prompts' metadata, which are the defaults
arguments: kwargs
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from alignment.judges.kinds.verifier import (
    CannotVerify,
    Column,
    Verification,
    VerifierConfig,
    read_column,
)
from alignment.judges.verifiers.instructions import CHECKS, check_instructions, follows
from alignment.records import Prompt

Instruction = tuple[str, Mapping[str, Any]]


class InstructionsConfig(VerifierConfig):
    """Description of a verifier of instructions such as a number of words or a format.

    Attributes:
        names: Column with the list of the names of the instructions.
        arguments: Column with the list of their arguments, each a mapping.
        partial: Whether the score is the share of the instructions that are followed. Default: all
            must be.
        unknown: Treatment of an instruction without a check: "refuse" the prompt, or "skip" the
            instruction; a prompt without another instruction is refused.
    """

    VERSION: ClassVar[int] = 2

    kind: Literal["instructions"] = "instructions"
    names: Column = "instruction_id_list"
    arguments: Column = "kwargs"
    partial: bool = False
    unknown: Literal["refuse", "skip"] = "refuse"

    @classmethod
    def column_settings(cls, column: str) -> dict[str, Any]:
        """Return the settings for a column in the short form of --judge."""
        return {"names": column} if column else {}

    def read_prompt(self, prompt: Prompt) -> list[Instruction]:
        """Return the instructions of a prompt."""
        names = _list(read_column(prompt, self.names), self.names)
        if self.arguments in prompt.metadata:
            arguments = _list(prompt.metadata[self.arguments], self.arguments)
        else:
            arguments = [{}] * len(names)
        arguments = [{} if settings is None else settings for settings in arguments]
        if problem := check_instructions(names, arguments):
            raise CannotVerify(problem)
        unknown = [name for name in names if name not in CHECKS]
        if unknown and (self.unknown == "refuse" or len(unknown) == len(names)):
            nearest = get_close_matches(str(unknown[0]), list(CHECKS), n=1)
            advice = f" Did you mean {nearest[0]}?" if nearest else ""
            raise CannotVerify(
                f"the instruction {unknown[0]!r} has no check; unknown: skip leaves such "
                f"instructions out where a prompt has others.{advice}".rstrip(".")
            )
        if not names:
            raise CannotVerify(f"the column {self.names!r} names no instruction")
        return [(n, settings) for n, settings in zip(names, arguments) if n in CHECKS]

    def verify(self, expected: list[Instruction], text: str) -> Verification:
        """Return the share of the instructions that a text follows, or whether it follows all."""
        results = [follows(text, name, settings) for name, settings in expected]
        missed = [name for (name, _), followed in zip(expected, results) if not followed]
        note = f"{sum(results)} of {len(results)} instructions followed" + (
            f"; not {', '.join(missed)}" if missed else ""
        )
        return Verification(
            sum(results) / len(results) if self.partial else float(all(results)), note
        )


def _list(value: Any, column: str) -> list[Any]:
    """Return the list in a column, which may be written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise CannotVerify(
                f"the column {column!r} contains {value!r:.60}, which is not JSON"
            ) from None
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, list | tuple):
        raise CannotVerify(f"the column {column!r} contains {value!r:.60}, which is not a list")
    return list(value)
