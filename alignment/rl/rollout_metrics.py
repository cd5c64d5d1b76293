"""A look at the responses of every step: routing, monitors, and some kept to train judges on."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignment.data.source_rows import RecordWriter
from alignment.engines.batch import TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.monitors.text_features import shown
from alignment.monitors.training_monitor import BatchFindings
from alignment.ranks import all_gather_by_data_rank, gather_by_data_rank
from alignment.records import Response
from alignment.rl.grading import Grader
from alignment.rl.judge_rewards import text_of
from alignment.rl.tasks import Group, RLSettings
from alignment.training.training_run import TrainingRun
from megatron_ext.training.saving import write_atomically


class Watch:
    """Figures of a step's responses, for `ReinforcementStep`; a collective.

    An alarm of the monitors is told when it begins, and each step that has any leaves them, with
    examples, in `RUN/alarms`.
    """

    def __init__(
        self,
        run: TrainingRun,
        grader: Grader,
        settings: RLSettings,
        *,
        routing_interval: int,
        routing_samples: int,
        keep: int,
    ) -> None:
        """See the class.

        Args:
            grader: knows the monitor, and from the first grading what lengths are usual.
            routing_interval: steps between comparisons of routing; 0 for none.
            routing_samples: responses that are compared, on all ranks.
            keep: responses of each step that are left in `RUN/responses`.
        """
        self.run, self.grader, self.settings = run, grader, settings
        self.routing_interval, self.routing_samples = routing_interval, routing_samples
        self.keep = keep
        self._alarmed: set[str] = set()

    def __call__(self, step: int, groups: Sequence[Group]) -> dict[str, Any]:
        self.grader.recall(step)
        figures: dict[str, Any] = {}
        if self.routing_interval and step % self.routing_interval == 0:
            begin = time.perf_counter()
            if gap := routing_of(self.run.engine, groups, self.routing_samples, self.settings):
                figures |= {**gap, "time/routing": time.perf_counter() - begin}
        own = [
            (rollout.sample, task.id, Response(rollout.key, task.about, text), rewarded.reward)
            for task, rollouts, rewards in groups
            for rollout, rewarded in zip(rollouts, rewards)
            for text in [text_of(self.grader.tokenizer, rollout)]
        ]
        shares = gather_by_data_rank(self.run.engine, own)
        # One response of every prompt before a second one of any; the same on every layout.
        rows = sorted((row for share in shares for row in share), key=lambda row: row[:2])
        if self.run.writes and rows:
            responses, rewards = [row[2] for row in rows], [row[3] for row in rows]
            if self.keep:
                keep_responses(self.run.folder, step + 1, responses[: self.keep])
            found = self.grader.monitor.of_batch(responses, rewards)
            self._tell(step + 1, found)
            figures |= {**found.metrics(), "monitor_alarms": len(found.alarms)}
        return figures

    def _tell(self, step: int, found: BatchFindings) -> None:
        for name in sorted(found.alarms.keys() - self._alarmed):
            alarm = found.alarms[name]
            examples = [shown(example.evidence[0]) for example in found.examples.get(name, ())]
            as_in = f": {', '.join(examples)}" if examples else ""
            print(
                f"step {step}: monitor {name} is at {alarm.figure:.2f}, above its limit "
                f"{alarm.limit:g}{as_in}",
                flush=True,
            )
        self._alarmed = set(found.alarms)
        if found.alarms:
            row = {
                name: asdict(alarm)
                | {"examples": [asdict(e) for e in found.examples.get(name, ())]}
                for name, alarm in found.alarms.items()
            }
            file = self.run.folder / "alarms" / f"step_{step:06d}.json"
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, json.dumps(row, ensure_ascii=False, indent=1) + "\n")


def keep_responses(folder: Path, step: int, responses: Sequence[Response]) -> None:
    """Leave some of a step's responses for gold to label, and a judge to be trained on."""
    with RecordWriter(folder / "responses" / f"step_{step:06d}.jsonl", overwrite=True) as writer:
        for response in responses:
            name = f"step-{step}-{response.id}"
            writer.write(replace(response, id=name, source=f"policy at step {step}"))


def routing_of(
    engine: AlignmentEngine, groups: Sequence[Group], most: int, settings: RLSettings
) -> Mapping[str, float]:
    """How far apart generation and training route some of a step's responses; a collective.

    Args:
        groups: This rank's groups. On every layout the same responses are taken, one of every
            prompt before a second one of any.
        most: Number of responses of all ranks together.
    """
    own = [
        (rollout.sample, task.id, TokenSample([*task.prompt, *rollout.tokens], len(task.prompt)))
        for task, rollouts, _ in groups
        for rollout in rollouts
        if rollout.tokens
    ]
    # The first of all ranks are among the first of each rank.
    shares = all_gather_by_data_rank(engine, sorted(own, key=lambda row: row[:2])[:most])
    everyones = sorted((row for share in shares for row in share), key=lambda row: row[:2])
    mine = [sample for _, _, sample in everyones[:most]][engine.data_rank :: engine.data_size]
    return engine.routing_gap(mine, settings.length, settings.sampling.temperature)
