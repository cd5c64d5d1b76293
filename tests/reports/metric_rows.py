"""Rows of metrics.jsonl as the trainer writes them."""

import json
import math
from pathlib import Path
from typing import Any

EXPERTS = 4


def training_row(step: int, warmup: int = 5, layers: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Return a row as the trainer writes it; every tenth step also has lists."""
    row: dict[str, Any] = {"step": step, "loss": 7 - math.log(step), "lr": 1e-3, "grad_norm": 1.0}
    row |= {"skipped": False, "tokens_per_s": 1000.0 + step, "mfu": 0.3}
    even = step <= warmup
    for layer in layers:
        prefix = f"moe/layer_{layer:02d}/"
        figures = {
            "fan_out": 1.0, "no_expert_share": 0.3, "load_max_over_mean": 1.0 if even else 1.2,
            "dead_experts": 0, "saturation": 0.01 * layer, "starvation": 0.02,
        }  # fmt: skip
        if step > 1:
            figures |= {"raw_usage": 0.25, "threshold": -1.0}
        figures["cutoff"] = -1.1
        row |= {prefix + name: value for name, value in figures.items()}
        if step % 10 == 0:
            row[prefix + "experts/load"] = [
                0.25 if even else 0.2 + 0.04 * e for e in range(EXPERTS)
            ]
            row[prefix + "fan_out_histogram"] = [30, 50, 15, 5, 0]
            row[prefix + "experts/threshold"] = [-1.0 - 0.1 * e for e in range(EXPERTS)]
            row[prefix + "experts/cutoff"] = [-1.1 - 0.1 * e for e in range(EXPERTS)]
    return row


def write_run(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder
