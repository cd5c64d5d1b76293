"""A small study with the files that policy runs write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STEPS = range(0, 201, 20)
HOSTILE = "</div><script>document.title='attacked'</script><img src=x onerror=\"document.title="
HOSTILE += "'attacked'\"> & $x^2 \u202e</details>"
# Changes of proxy and gold from start to end.
COURSES = {"label": (4.0, -2.0), "thinking": (2.0, 1.8)}


def write_run(
    folder: Path,
    judge: str,
    seed: int,
    steps: Any = STEPS,
    changes: tuple[float, float] = (0.0, 0.0),
    **more: Any,
) -> dict[int, dict[str, float]]:
    """Write one run, and return its gradings by step."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng([seed, len(judge)])
    about = {
        "command": "et-align train-policy", "versions": {"torch": "2.13"},
        "policy": "/models/start", "algorithm": "grpo", "seed": seed,
        "gold": {"name": "rule", "identity": "0a"},
        "judge": {"name": judge, "kind": judge, "identity": "0b",
                  "agreement": {"alpha_interval": 0.6 + 0.1 * len(judge) / 10}},
        "second_gold": {"name": "rule:no-copying", "identity": "0c"},
    } | more  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    gradings = {}
    for step in steps:
        done = step / max(STEPS)
        noise = draw.normal(0, 0.15, 3)
        proxy, gold, second = (
            4 + change * done + n for change, n in zip((*changes, changes[1] - 0.5), noise)
        )
        gradings[step] = {
            "grade/proxy": proxy, "grade/gold": gold, "grade/second_gold": second,
            "grade/gap": proxy - gold, "grade/gap_slope": (changes[0] - changes[1]) / 2,
            "grade/kl": 30 * done + abs(noise[0]), "grade/length": 40.0,
            "grade/alarm": float(proxy - gold > 4),
            "monitor_held_out/self_praise": done * max(0.0, -changes[1]) / 4,
        }  # fmt: skip
        rows.append({"step": step} | gradings[step])
        for number in range(7):
            samples.append({
                "step": step, "prompt": f"p{number}",
                "messages": [{"role": "user", "content": f"Write about {number}. {HOSTILE}"}],
                "response": f"At step {step}: {HOSTILE}" if number < 6 else "Half a letter: \ud83d",
                "scores": {"proxy": proxy + number / 10, "gold": gold, "second_gold": None},
                "flags": ["self_praise", "<i>"] if done > 0.5 else [],
            })  # fmt: skip
    for step in range(1, max(steps) + 1):
        rows.append({
            "step": step, "loss": 0.1, "reward": 4 + step / 100, "unrewarded": 0.02,
            "monitor/self_praise": step / 1000, "kl_from_reference": step / 10,
        })  # fmt: skip
    rows.sort(key=lambda row: row["step"])
    write(folder / "metrics.jsonl", rows)
    write(folder / "samples.jsonl", samples)
    return gradings


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_study(
    folder: Path, seeds: int = 3, courses: Mapping[str, tuple[float, float]] = COURSES
) -> dict[str, list[dict[int, dict[str, float]]]]:
    """Write a run for each judge and seed; return the gradings of each judge's seeds."""
    entries, result = [], {}
    for judge, changes in courses.items():
        result[judge] = [
            write_run(folder / f"start-{judge}-seed{seed}", judge, seed, changes=changes)
            for seed in range(seeds)
        ]
        entries += [entry(judge, seed) for seed in range(seeds)]
    write_index(folder, entries)
    return result


def entry(judge: str, seed: int) -> dict[str, Any]:
    return {"folder": f"start-{judge}-seed{seed}", "policy": "start", "judge": judge, "seed": seed}


def write_index(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "study.json").write_text(json.dumps({"runs": entries}))


def update_run(run: Path, **facts: Any) -> None:
    """Change entries of the run.json of a run."""
    about = json.loads((run / "run.json").read_text()) | facts
    (run / "run.json").write_text(json.dumps(about))
