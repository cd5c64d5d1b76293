"""Import, split, count and show prompts, responses and pairs.

    et-align data import --input FILE ... --output FILE
    et-align data split --input FILE ... --save DIR --split NAME=SIZE ...
    et-align data count --input FILE ...
    et-align data show FILE [--model DIR] [--template NAME]

Each subcommand has its own --help.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from alignment.commands.data_show_config import ShowConfig
from alignment.commands.rows_config import RowsConfig
from alignment.data.packages import PACKAGES
from alignment.judges.formats.scale import check_scale
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag, group, parse_config


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """Flags of `et-align data count`: count records by source."""

    input: tuple[str, ...] = flag(metavar="FILE")
    """Files, glob patterns or folders of .jsonl, .json, .csv, .tsv (also compressed) or
    .parquet."""
    max_malformed: int = flag(100, metavar="N", at_least=0)
    """Maximum number of unusable rows, which are left out and reported. If there are more, the
    command stops."""
    rows: RowsConfig = group()


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Flags of `et-align data import`: convert rows of files or of a package to records."""

    input: tuple[str, ...] = flag((), metavar="FILE")
    """Files, glob patterns or folders of .jsonl, .json, .csv, .tsv (also compressed) or .parquet.
    Default: none; --package is read."""
    package: str | None = flag(None, choices=sorted(PACKAGES))
    """Installed package to read in place of files. Default: none; --input is read."""
    archive: str | None = flag(None, metavar="FILE")
    """Source distribution of --package to read, .tar.gz. Default: none; the installed package is
    read."""
    output: str = flag(metavar="FILE")
    """File to write, .jsonl or .parquet."""
    kind: Literal["pairs", "prompts", "responses", "chosen"] | None = flag(None, name="as")
    """Kind of records to write. From pairs: their prompts, each of their responses, or the
    preferred responses only (chosen). From responses: their prompts. Default: the kind of the
    input."""
    verdicts: str | None = flag(None, metavar="FILE")
    """File to write the labels of people into, as verdicts, .jsonl or .parquet. Default: none."""
    scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest rating that people could give, which are mapped to 0 and 9. Default: none;
    required for --verdicts of ratings."""
    source: str = flag("", metavar="NAME")
    """Source of rows that have none. Default: the name of the file."""
    overwrite: bool = flag(False)
    """Replace --output."""
    max_malformed: int = flag(100, metavar="N", at_least=0)
    """Maximum number of unusable rows, which are left out and reported. If there are more, the
    command stops."""
    rows: RowsConfig = group()

    def __post_init__(self) -> None:
        if bool(self.input) == bool(self.package):
            raise UserError("Pass either files as --input or a --package.")
        if self.archive and not self.package:
            raise UserError("--archive requires --package, which defines how to read it.")
        if self.verdicts and self.kind in ("prompts", "chosen"):
            raise UserError(
                f"--verdicts labels the items of the input, and --as {self.kind} writes others. "
                "Remove one of the flags."
            )
        if self.scale:
            check_scale(self.scale, "--scale")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Flags of `et-align data split`: split records by prompt, without near-duplicates."""

    input: tuple[str, ...] = flag(metavar="FILE")
    """Files, glob patterns or folders of .jsonl, .json, .csv, .tsv (also compressed) or
    .parquet."""
    split: tuple[str, ...] = flag(metavar="NAME=SIZE")
    """Splits in order of precedence. A size is a number of prompts, a share below 1, or, for the
    last split, rest."""
    save: str = flag(metavar="DIR")
    """Folder to create, with NAME.jsonl for each split and split.json. If the input has records of
    several kinds, the files are NAME-pairs.jsonl, NAME-responses.jsonl and NAME-prompts.jsonl."""
    overwrite: bool = flag(False)
    """Replace --save."""
    format: Literal["jsonl", "parquet"] = flag("jsonl")
    """Format of the files."""
    near: float = flag(0.7, metavar="SIMILARITY", above=0, at_most=1)
    """Jaccard similarity, from 0 to 1, of the three-word sequences of two prompts, from which they
    are near-duplicates."""
    seed: int = flag(0, at_least=0, below=2**32)
    """Seed of the assignment of prompts to splits."""
    max_malformed: int = flag(100, metavar="N", at_least=0)
    """Maximum number of unusable rows, which are left out and reported. If there are more, the
    command stops."""
    rows: RowsConfig = group()


SUBCOMMANDS: dict[str, type] = {
    "import": ImportConfig,
    "split": SplitConfig,
    "count": CountConfig,
    "show": ShowConfig,
}


def parse(argv: Sequence[str] | None) -> ImportConfig | SplitConfig | CountConfig | ShowConfig:
    """Return the configuration that a command line describes."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    name, *rest = words
    if name not in SUBCOMMANDS:
        near = get_close_matches(name, SUBCOMMANDS, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(SUBCOMMANDS)}."
        raise UserError(f"{name} is not a subcommand of data. {advice}")
    purpose = (SUBCOMMANDS[name].__doc__ or "").partition("`: ")[2]
    description = purpose[:1].upper() + purpose[1:]
    config: ImportConfig | SplitConfig | CountConfig | ShowConfig
    config = parse_config(SUBCOMMANDS[name], rest, f"et-align data {name}", description)
    return config
