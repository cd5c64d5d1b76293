"""Flags of every command that reads prompts, responses, conversations or preferences."""

from dataclasses import dataclass

from alignment.data.read_options import ReadOptions
from megatron_ext.typed_flags import must_match


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Rows."""

    columns: tuple[str, ...] = must_match((), metavar="OURS=THEIRS", repeat=True, several=True)
    """Names of columns in files of other projects, such as prompt=question. OURS is prompt,
    response, chosen, rejected, messages, system, first, second, label, score, annotator, rubric, id
    or source. Further columns become metadata of the prompt. Default: the known names."""
    labels: tuple[str, ...] = must_match((), metavar="LABEL=VALUE", repeat=True, several=True)
    """Meaning of the values of labels by people, such as first=model_a tie=both,neither. LABEL is
    first, second, tie or a score. Default: the known values."""
    limit: int | None = must_match(None, short="-n", metavar="N", at_least=1)
    """Read only the first N records of each flag that names files, in the order of the files.
    Default: all."""

    def __post_init__(self) -> None:
        _ = self.options

    @property
    def options(self) -> ReadOptions:
        """How files are read.

        Raises:
            UserError: A value has another form.
        """
        return ReadOptions.parse(self.columns, self.labels, self.limit)
