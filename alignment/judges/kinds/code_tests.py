"""Judge kind "code-tests": tests of the Python program in a response.

kind: code-tests
tests: test_list      # a column of the prompts' metadata
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from alignment.judges.kinds.judge_kind import MAY_CHANGE, JudgeContext
from alignment.judges.kinds.program_judge import ProgramJudge
from alignment.judges.kinds.verifier import (
    CannotVerify,
    Column,
    Verification,
    VerifierConfig,
    read_column,
)
from alignment.judges.verifiers.code_tests import (
    CannotConfine,
    InputTest,
    Limits,
    extract_code,
    read_tests,
    run_tests,
)
from alignment.records import Prompt
from megatron_ext.console import console
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.engines.protocol import AlignmentEngine


class CodeTestsConfig(VerifierConfig):
    """Description of a verifier that runs the program in a response against tests.

    The program is the last block between fences that names Python or no language. A response
    without one is wrong, and so is a program that exceeds a limit.

    Attributes:
        tests: Column with the tests: Python code, a list of it, or inputs with outputs; see the
            page on rewards.
        entry_point: Column with the name of the function that is passed to `check`, if the tests
            define `check`.
        partial: Whether the score is the share of the tests that pass. Default: all must pass.
        timeout: Time limit of all tests of a response, in seconds.
        memory: Limit of the address space, in MiB.
        parallel_programs: Number of programs that one rank runs at a time.
    """

    kind: Literal["code-tests"] = "code-tests"
    tests: Column = "tests"
    entry_point: Column = "entry_point"
    partial: bool = False
    timeout: Annotated[float, Field(gt=0)] = 10.0
    memory: Annotated[int, Field(ge=64)] = 1024
    parallel_programs: Annotated[int, Field(ge=1), MAY_CHANGE] = 2

    @classmethod
    def column_settings(cls, column: str) -> dict[str, Any]:
        """Return the settings for a column in the short form of --judge."""
        return {"tests": column} if column else {}

    @property
    def parallel(self) -> int:
        """Return the number of programs at a time."""
        return self.parallel_programs

    def open(self, context: JudgeContext) -> ProgramJudge:
        """Return the judge, after running a program that must pass.

        Raises:
            UserError: If this machine cannot confine programs.
        """
        if warning := _try_confinement(self.name):
            console.warn(warning)
        return super().open(context)

    def shared_engine(self, context: JudgeContext) -> "AlignmentEngine | None":
        """Return the engine, because the result of a slow program depends on the machine."""
        return context.engine

    def read_prompt(self, prompt: Prompt) -> list[str] | list[InputTest]:
        """Return the tests of a prompt."""
        value = read_column(prompt, self.tests)
        try:
            return read_tests(value, prompt.metadata.get(self.entry_point))
        except (ValueError, TypeError) as error:
            raise CannotVerify(f"the column {self.tests!r} cannot be used: {error}") from None

    def verify(self, expected: list[str] | list[InputTest], text: str) -> Verification:
        """Return the share of the tests that the program of a text passes, or whether all do."""
        program = extract_code(text)
        if program is None:
            return Verification(0.0, "no block of Python between fences")
        try:
            result = run_tests(program, expected, Limits(self.timeout, self.memory))
        except (CannotConfine, OSError) as error:
            raise CannotVerify(f"the program could not be run: {error}") from None
        passed, total = sum(result.passed), len(result.passed)
        note = f"{passed} of {total} tests passed" + f"; {result.problem}" * bool(result.problem)
        return Verification(passed / total if self.partial else float(passed == total), note)


@lru_cache(maxsize=1)
def _try_confinement(name: str) -> str:
    """Run a program with the limits; return a warning about missing protection on this machine."""
    try:
        result = run_tests("x = 1", ["assert x == 1"], Limits(timeout=60.0))
    except (CannotConfine, OSError) as error:
        raise UserError(
            f"The judge {name} runs programs that a model wrote, and this machine cannot confine "
            f"them: {error}. Run the command on Linux (x86-64 or arm64) with seccomp."
        ) from None
    if not all(result.passed):
        raise UserError(
            f"The judge {name} cannot run programs on this machine: {result.problem}. Check the "
            "memory that is left."
        )
    if not result.lacking:
        return ""
    return (
        f"warning: the judge {name} runs programs that a model wrote, and this kernel has no "
        f"Landlock: a program can {result.lacking}. Run the training in a container whose files "
        "may be lost."
    )
