"""Names of metrics on the page of the documentation."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "metrics.md"

# What words in capitals stand for: a number of two digits in moe/layer_NN, otherwise any name.
_PLACEHOLDER = re.compile(r"NN|[A-Z]{3,}")


def documented_names() -> list[str]:
    """Return the names in the first columns of the tables."""
    columns = [line.split(" | ")[0] for line in PAGE.read_text().splitlines() if line[:3] == "| `"]
    return [name for column in columns for name in re.findall("`([^`]+)`", column)]


def undocumented(rows: Iterable[Mapping[str, object]]) -> set[str]:
    """Return the names in rows of metrics that the page does not list."""
    patterns = []
    for name in documented_names():
        literal = _PLACEHOLDER.sub("\0", name)
        parts = [re.escape(part) for part in literal.split("\0")]
        patterns.append(re.compile(r"[\w.%+-]+".join(parts)))
    names = {name for row in rows for name in row}
    return {name for name in names if not any(p.fullmatch(name) for p in patterns)}
