"""Judge kind "function": a Python function that scores responses."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from alignment.judges.formats.scale import check_scale
from alignment.judges.kinds.command_settings import JudgeFlags
from alignment.judges.kinds.function_judge import FUNCTION_TIMEOUT, FunctionJudge
from alignment.judges.kinds.judge_kind import MAY_CHANGE, JudgeConfig, JudgeContext
from alignment.judges.kinds.program_judge import ProgramJudge
from megatron_ext.errors import UserError


class FunctionJudgeConfig(JudgeConfig):
    """Description of a judge that is a function.

    Attributes:
        function: FILE.py:NAME of a function that takes a `Response` and returns a score or None.
        scale: The lowest and the highest score of the function. Default: 0 and 9.
        timeout: Time limit of one call, in seconds.
    """

    kind: Literal["function"] = "function"
    function: Annotated[str, Field(min_length=1)]
    scale: list[float] | None = None
    timeout: Annotated[float, Field(gt=0), MAY_CHANGE] = FUNCTION_TIMEOUT

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: list[float] | None) -> list[float] | None:
        if scale is not None:
            try:
                check_scale(scale, "scale")
            except UserError as error:
                raise ValueError(str(error)) from None
        return scale

    @classmethod
    def from_flag(cls, argument: str, flags: JudgeFlags) -> Self:
        """Return the function that `--judge function:FILE.py:NAME` names."""
        scale = None if flags.scale is None else list(flags.scale)
        timeout = FUNCTION_TIMEOUT if flags.timeout is None else flags.timeout
        return cls(name=f"function:{argument}", function=argument, scale=scale, timeout=timeout)

    def open(self, context: JudgeContext) -> ProgramJudge:
        """Return the judge, whose function runs in another process.

        Raises:
            UserError: If the function cannot be loaded, or is to compare pairs.
        """
        if context.pairwise and context.engine is not None:
            raise UserError(
                f"The judge {self.name} is a function, which scores responses and cannot give a "
                "pairwise reward. Choose --reward pointwise or another judge."
            )
        function = FunctionJudge(self.function, self.scale, self.timeout)
        return ProgramJudge(function, context.engine)

    def provenance(self) -> dict[str, Any]:
        """Return the function and its scale."""
        scale = {"scale": self.scale} if self.scale else {}
        return {"function": f"function:{self.function}", **scale}

    def content_hashes(self) -> dict[str, Any]:
        """Return a hash of the file of the function, with the name of the function."""
        file, _, name = self.function.rpartition(":")
        return {"function": f"{self.hash_file(file)}:{name}"}
