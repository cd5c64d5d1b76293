"""Generate responses to prompts with a model that runs on the ranks of this command.

    et-align generate --model DIR --input PROMPTS.jsonl --output RESPONSES.jsonl [--samples N]

Under torchrun the model is laid out over the ranks as in training; the responses are the same on
any number of ranks. For a model behind an address use `et-align annotate --generate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from alignment.commands.config_groups import (
    EngineConfig,
    ModelConfig,
    OutputConfig,
    SamplingConfig,
)
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag, group, parse_config


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Flags of `et-align generate`."""

    files: OutputConfig = group()
    rows: RowsConfig = group()
    samples: int = flag(1, metavar="N", at_least=1)
    """Number of responses to each prompt."""
    source: str | None = flag(None, metavar="NAME")
    """Name that is recorded in each response as its source. Default: --model."""
    seed: int = flag(0, at_least=0, below=2**32)
    """Seed of the sampling."""
    sampling: SamplingConfig = group()
    model: ModelConfig = group()
    engine: EngineConfig = group()

    def __post_init__(self) -> None:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"--samples {self.samples} at --temperature 0 would repeat the same responses. "
                "Choose a temperature above 0."
            )


def parse(argv: Sequence[str]) -> GenerateConfig:
    """Return the configuration that a command line describes."""
    return parse_config(GenerateConfig, argv, "et-align generate", __doc__)
