"""Measure how well one judge agrees with another on the same items, or which of two agrees better.

    et-align agreement GOLD.jsonl JUDGE.jsonl --items ITEMS.jsonl --output DIR
    et-align agreement GOLD.jsonl JUDGE.jsonl OTHER.jsonl

With a third file, the command also compares the second and third judge: the difference between
their agreements with the first, over the items that all judged, with a paired bootstrap interval
and the p-value of a permutation test that exchanges the two judges.

Prints every statistic with a bootstrap interval, and writes agreement.json and agreement.png to
--output. A statistic that these verdicts do not define is reported as undefined, with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.commands.rows_config import RowsConfig
from alignment.judges.formats.scale import check_scale
from megatron_ext.errors import UserError
from megatron_ext.new_folder import check_output_folder
from megatron_ext.typed_flags import flag, group, parse_config


@dataclass(frozen=True, kw_only=True)
class AgreementConfig:
    """Flags of `et-align agreement`."""

    first: str = flag(positional=True, metavar="FIRST")
    """Reference verdicts: those of the gold judge, or a file with labels of people."""
    second: str = flag(positional=True, metavar="SECOND")
    """Verdicts to compare with the reference."""
    third: str | None = flag(None, positional=True, metavar="THIRD")
    """Verdicts of another judge, whose agreement is compared with that of the second."""
    items: str | None = flag(None, metavar="FILE")
    """Responses or pairs that were judged; required for --slice and for --resample prompt. Default:
    none."""
    common: bool = flag(False)
    """Compare only the items that occur in both files, if the files differ."""
    first_scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest score of the first file, whose scores are mapped to 0 to 9. Default: 0
    9."""
    second_scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest score of the second file, whose scores are mapped to 0 to 9. Default: 0
    9."""
    third_scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest score of the third file, whose scores are mapped to 0 to 9. Default: 0
    9."""
    label: Literal["first", "mean"] = flag("first")
    """Label of an item that was judged several times: that of the first verdict, or the mean."""
    resample: Literal["item", "prompt"] = flag("item")
    """Unit of the bootstrap; choose prompt where prompts have several items."""
    slice: tuple[Literal["gold", "length", "prompt-source", "source"], ...] = flag((), repeat=True)
    """Property of the items. The statistics are also reported for the items of each of its values.
    Can be repeated. Default: none."""
    resamples: int = flag(1000, metavar="N", at_least=1)
    """Number of resamples of the bootstrap, and largest number of permutations of the test."""
    seed: int = flag(0, at_least=0, below=2**32)
    """Seed of the bootstrap."""
    output: str | None = flag(None, metavar="DIR")
    """Folder to write agreement.json and agreement.png into. Default: none."""
    rows: RowsConfig = group()

    def __post_init__(self) -> None:
        scales = {"first": self.first_scale, "second": self.second_scale, "third": self.third_scale}
        for name, scale in scales.items():
            if scale:
                check_scale(scale, f"--{name}-scale")
        if self.third_scale and self.third is None:
            raise UserError(
                "--third-scale requires a third file. Add the file, or remove the flag."
            )
        files = [self.first, self.second, *([self.third] if self.third else [])]
        for file in files:
            if files.count(file) > 1:
                raise UserError(f"{file} occurs twice. Name the verdicts of different judges.")
        if self.items is None and self.resample == "prompt":
            raise UserError(
                "--resample prompt requires --items, which has the prompt of each item."
            )
        for name in self.slice:
            if self.items is None and name != "gold":
                raise UserError(f"--slice {name} requires --items, which has this property.")
        if self.output:
            check_output_folder(self.output)


def parse(argv: Sequence[str] | None) -> AgreementConfig:
    """Return the configuration that a command line describes."""
    return parse_config(AgreementConfig, argv, "et-align agreement", __doc__)
