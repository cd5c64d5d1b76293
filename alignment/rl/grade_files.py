"""Files of the evaluations of a policy: sample responses and the scores of every prompt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.records import Response


def write_samples(
    file: Path,
    step: int,
    responses: Sequence[Response],
    scores: Mapping[str, Sequence[float | None]],
    flags: Sequence[Mapping[str, Any]],
) -> None:
    """Write sample responses of a step, and remove earlier entries of this and later steps.

    Args:
        file: File of samples, JSON Lines.
        step: Number of finished training steps.
        responses: Responses to write.
        scores: Score of each response, by role of the judge.
        flags: Evidence of the detectors that fire on each response, by detector.
    """
    before = file.read_text().splitlines() if file.is_file() else []
    rows = [line for line in before if json.loads(line)["step"] < step]
    for index, response in enumerate(responses):
        row = {
            "step": step,
            "prompt": response.prompt.id,
            "messages": response.prompt.to_row()["messages"],
            "response": response.text,
            "scores": {name: values[index] for name, values in scores.items()},
            "flags": sorted(flags[index]),
        }
        rows.append(json.dumps(row))
    temporary = file.with_name(".samples.tmp")
    temporary.write_text("".join(row + "\n" for row in rows))
    temporary.replace(file)


def append_scores(
    file: Path,
    step: int,
    responses: Sequence[Response],
    scores: Mapping[str, Sequence[float | None]],
) -> None:
    """Append the scores of every held-out prompt, for intervals over prompts in reports.

    A resumed run appends a step again; the last row of a step counts.

    Args:
        file: File of scores, JSON Lines.
        step: Number of finished training steps.
        responses: Responses to all held-out prompts.
        scores: Score of each response, by role of the judge.
    """
    row = {"step": step, "prompts": [r.prompt.id for r in responses], "scores": dict(scores)}
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")
