"""Flags of every command that reads prompts, responses, conversations or preferences."""

from dataclasses import dataclass

from alignment.data.read_options import ReadOptions
from megatron_ext.typed_flags import must_match


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Rows."""

    columns: tuple[str, ...] = must_match((), metavar="OURS=THEIRS", repeat=True, several=True)
    """Columns of files of other projects by the role that they play: prompt, response, chosen,
    rejected, messages, system, first, second, label, score, annotator, rubric, id or source, such
    as prompt=question. Further columns become metadata of the prompt. Default: the names that
    are known."""
    labels: tuple[str, ...] = must_match((), metavar="LABEL=VALUE", repeat=True, several=True)
    """Values of labels by people: first, second, tie or a score, and the values that mean it, such
    as first=model_a tie=both,neither. Default: the values that are known."""
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
