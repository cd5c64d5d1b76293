"""Write a Parquet shard with the columns of FineWeb-Edu from the quickstart's news articles.

It replaces a shard of the real dataset where there is no space or network for it. The columns,
their types and the row groups of 1,000 rows are those of FineWeb-Edu. The texts are news
articles from a package that `make environment` installs, and the scores are computed from a hash of
the text.

    python -m examples.fineweb_shard --output 000_00000.parquet [--documents 500] [--skip 0]
"""

import argparse
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from examples.quickstart.prepare_text import LEAST_CHARACTERS, clean_news, news
from megatron_ext.errors import ToolParser, UserError, run_tool

SCHEMA = pyarrow.schema(
    {
        "text": pyarrow.string(),
        "id": pyarrow.string(),
        "dump": pyarrow.string(),
        "url": pyarrow.string(),
        "file_path": pyarrow.string(),
        "language": pyarrow.string(),
        "language_score": pyarrow.float64(),
        "token_count": pyarrow.int64(),
        "score": pyarrow.float64(),
        "int_score": pyarrow.int64(),
    }
)


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row per article, in the order of the package."""
    for text in map(clean_news, news()):
        if len(text) < LEAST_CHARACTERS:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        score = 2.5 + 2.5 * digest[0] / 255  # FineWeb-Edu's scores round to 3, 4 or 5
        yield {
            "text": text,
            "id": f"<urn:uuid:{digest[:16].hex()}>",
            "dump": "none",
            "url": f"https://example.org/{digest[:4].hex()}",
            "file_path": "none",
            "language": "en",
            "language_score": 1.0,
            "token_count": len(text) // 4,
            "score": score,
            "int_score": round(score),
        }


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = ToolParser(
        prog="python -m examples.fineweb_shard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FILE",
        help="Parquet file to write, with the suffix .parquet.")  # fmt: skip
    add("--documents", type=int, default=500, metavar="N",
        help="Number of articles. Default: %(default)s.")  # fmt: skip
    add("--skip", type=int, default=0, metavar="N",
        help="Number of articles to skip at the beginning. Default: %(default)s.")  # fmt: skip
    options = parser.parse_args(argv)
    if options.documents < 1:
        raise UserError(f"--documents {options.documents} is below 1. Set it to 1 or more.")
    if options.skip < 0:
        raise UserError(f"--skip {options.skip} is negative. Set it to 0 or more.")
    chosen = list(itertools.islice(rows(), options.skip, options.skip + options.documents))
    if len(chosen) < options.documents:
        raise UserError(
            f"--skip {options.skip} leaves {len(chosen)} articles, fewer than --documents "
            f"{options.documents}. Lower one of them."
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(chosen, SCHEMA)
    temporary = options.output.with_name(options.output.name + ".tmp")
    pyarrow.parquet.write_table(table, temporary, row_group_size=1000)
    temporary.replace(options.output)
    print(f"wrote {options.output}: {len(chosen):,} documents")


if __name__ == "__main__":
    run_tool(main)
