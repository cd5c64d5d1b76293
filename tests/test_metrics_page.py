"""Tests that the page of metrics lists the metrics that the code writes."""

import ast
import re
from pathlib import Path

import pytest

from tests.documented_metrics import documented_names, undocumented

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *(ROOT / "megatron_ext" / "training").glob("*.py"),
    ROOT / "megatron_ext" / "moe" / "routing_metrics.py",
    *(ROOT / "alignment" / "rl").glob("*.py"),
    *(ROOT / "alignment" / "training").glob("*.py"),
    *(ROOT / "alignment" / "engines").glob("*.py"),
    *(ROOT / "alignment" / "judges").glob("*.py"),
    *(ROOT / "alignment" / "monitors").glob("*.py"),
    *(ROOT / "alignment" / "commands").glob("train_*.py"),
]


@pytest.fixture(scope="module")
def literals() -> set[str]:
    """Return the strings of the sources, also those in formatted strings."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    return {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("name", documented_names())
def test_every_documented_metric_is_in_the_code(name: str, literals: set[str]) -> None:
    words = {word for literal in literals for word in (literal, *literal.split("/"))}
    parts = [part for part in name.split("/") if not part.isupper() and "_NN" not in part]
    pieces = re.split(r"[A-Z]{3,}", parts[-1].removeprefix("value_"))
    for piece in filter(None, pieces):  # a name in the middle is put in by the code
        assert piece in words, f"no module writes {name}"


def test_undocumented_metric_is_detected() -> None:
    documented = {"loss": 1.0, "moe/layer_01/fan_out": 1.0, "routing/margin_0.1%": 0.1}
    assert undocumented([documented | {"grade/proxy_error": 0.1}]) == set()
    unknown = {"losses", "moe/layer_01/fan_in", "moe/layer_1"}
    assert undocumented([documented, dict.fromkeys(unknown, 1.0)]) == unknown
