"""Monitor of the responses of every step: detectors, alarms, routing and stored responses."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignment.data.record_writer import RecordWriter
from alignment.engines.batch import TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.text_features import printable, words_of
from alignment.monitors.training_monitor import BatchFindings, Monitor
from alignment.ranks import all_gather_by_data_rank, gather_by_data_rank
from alignment.records import Response
from alignment.rl.rollouts import RolloutGroup
from alignment.training.training_run import TrainingRun
from megatron_ext.console import console
from megatron_ext.training.saving import write_atomically

ROLLOUTS_PER_STEP = 8
"""Number of responses of each step in `RUN/rollouts.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class RoutingCheck:
    """Settings of the comparison between the routing of generation and that of training.

    Attributes:
        interval: Steps between comparisons. 0 for none.
        responses: Number of responses to compare, on all ranks together.
        seq_length: Length in tokens of the rows into which responses are packed.
        temperature: Temperature of sampling.
    """

    interval: int
    responses: int
    seq_length: int
    temperature: float


class ResponseMonitor:
    """Monitor of a run's responses, with its detectors and the typical lengths.

    An alarm is printed when it begins. The alarms of each step are written to `RUN/alarms`, with
    examples, and some responses of each step to `RUN/rollouts.jsonl`, which reports show.
    """

    def __init__(
        self,
        run: TrainingRun,
        monitor: Monitor,
        *,
        routing: RoutingCheck | None = None,
        keep_responses: int = 0,
    ) -> None:
        """Create the monitor.

        Args:
            run: Run to whose directory alarms and responses are written.
            monitor: Detectors with their limits.
            routing: Comparison of the routing of generation and training. None for none.
            keep_responses: Number of responses of each step to write to `RUN/responses`.
        """
        self.run, self.monitor = run, monitor
        self._routing, self._keep_responses = routing, keep_responses
        self._active: set[str] = set()

    def set_typical_lengths(self, texts: Sequence[str]) -> None:
        """Set the typical lengths to those of these responses of the first evaluation."""
        lengths = ReferenceLengths.from_words([len(words_of(text)) for text in texts])
        self.monitor = replace(self.monitor, reference_lengths=lengths)

    def findings(
        self, responses: Sequence[Response], scores: Sequence[float | None]
    ) -> BatchFindings:
        """Return the findings of the detectors in responses, such as those of an evaluation."""
        return self.monitor.check_batch(responses, scores)

    def check_step(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
        """Return metrics of a step's responses, those of detectors on rank 0 only; a collective.

        Args:
            step: Number of the step, from 0.
            groups: This rank's groups.
        """
        metrics: dict[str, Any] = {}
        routing = self._routing
        if routing is not None and routing.interval and step % routing.interval == 0:
            begin = time.perf_counter()
            if gap := routing_metrics(self.run.engine, groups, routing):
                metrics |= {**gap, "time/routing": time.perf_counter() - begin}
        local_rows = [
            (
                rollout.sample,
                task.id,
                Response(rollout.key, task.metadata, reward.text),
                reward.reward,
            )
            for task, rollouts, rewards in groups
            for rollout, reward in zip(rollouts, rewards)
        ]
        shares = gather_by_data_rank(self.run.engine, local_rows)
        # One response of every prompt before a second one of any; the same on every layout.
        rows = sorted((row for share in shares for row in share), key=lambda row: row[:2])
        if self.run.writes and rows:
            responses, rewards = [row[2] for row in rows], [row[3] for row in rows]
            if self._keep_responses:
                write_responses(self.run.folder, step + 1, responses[: self._keep_responses])
            findings = self.findings(responses, rewards)
            append_rollouts(self.run.folder, step + 1, responses, rewards, findings)
            self._report(step + 1, findings)
            metrics |= {**findings.metrics(), "monitor_alarms": len(findings.alarms)}
        return metrics

    def _report(self, step: int, findings: BatchFindings) -> None:
        for name in sorted(findings.alarms.keys() - self._active):
            alarm = findings.alarms[name]
            examples = [
                printable(example.evidence[0]) for example in findings.examples.get(name, ())
            ]
            example_list = f": {', '.join(examples)}" if examples else ""
            console.alarm(
                f"ALARM at step {step}: monitor {name} is at {alarm.value:.2f}, above its limit "
                f"{alarm.limit:g}{example_list}"
            )
        self._active = set(findings.alarms)
        if findings.alarms:
            record = {
                name: asdict(alarm)
                | {"examples": [asdict(e) for e in findings.examples.get(name, ())]}
                for name, alarm in findings.alarms.items()
            }
            file = self.run.folder / "alarms" / f"step_{step:06d}.json"
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def append_rollouts(
    folder: Path,
    step: int,
    responses: Sequence[Response],
    rewards: Sequence[float | None],
    findings: BatchFindings,
) -> None:
    """Append some responses of a step to `rollouts.jsonl`, flagged ones first, for reports.

    A resumed run appends a step again; the last row of a response counts.
    """
    # The sort is stable: after the flagged responses, one of every prompt comes first.
    order = sorted(range(len(responses)), key=lambda place: not findings.flags[place])
    with open(folder / "rollouts.jsonl", "a") as file:
        for place in order[:ROLLOUTS_PER_STEP]:
            response = responses[place]
            row = {
                "step": step,
                "id": response.id,
                "prompt": response.prompt.id,
                "messages": response.prompt.to_row()["messages"],
                "response": response.text,
                "scores": {"reward": rewards[place]},
                "flags": sorted(findings.flags[place]),
            }
            file.write(json.dumps(row) + "\n")


def write_responses(folder: Path, step: int, responses: Sequence[Response]) -> None:
    """Write some responses of a step, for labeling by a gold judge and retraining of a judge."""
    with RecordWriter(folder / "responses" / f"step_{step:06d}.jsonl", overwrite=True) as writer:
        for response in responses:
            name = f"step-{step}-{response.id}"
            writer.write(replace(response, id=name, source=f"policy at step {step}"))


def routing_metrics(
    engine: AlignmentEngine, groups: Sequence[RolloutGroup], routing: RoutingCheck
) -> Mapping[str, float]:
    """Compare the routing of some responses of a step in generation and training; a collective.

    Args:
        engine: Engine of the policy.
        groups: This rank's groups. The same responses are compared on every layout, one of every
            prompt before a second one of any.
        routing: Number of the responses, and how they are sampled and packed.
    """
    local_rows = [
        (rollout.sample, task.id, TokenSample([*task.prompt, *rollout.tokens], len(task.prompt)))
        for task, rollouts, _ in groups
        for rollout in rollouts
        if rollout.tokens
    ]
    # The first responses of all ranks together are among the first ones of each rank.
    first = sorted(local_rows, key=lambda row: row[:2])[: routing.responses]
    shares = all_gather_by_data_rank(engine, first)
    rows = sorted((row for share in shares for row in share), key=lambda row: row[:2])
    samples = [sample for _, _, sample in rows[: routing.responses]]
    share = samples[engine.data_rank :: engine.data_size]
    return engine.routing_gap(share, routing.seq_length, routing.temperature)
