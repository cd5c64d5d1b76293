"""Evaluation of a policy on held-out prompts, by the judges of its reward and by a gold judge.

The gold judge takes no part in training. If the reward keeps rising but the gold score does not,
the policy exploits a weakness of its judge: it is gaming the judge.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alignment.data.chat_prompts import prompt_ids
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.kinds.judge_kind import Judge, rounding_error, score_size
from alignment.judges.questions import Question
from alignment.ranks import all_reduce_max, gather_by_data_rank, interleave, on_first_rank
from alignment.records import Outcome, Pair, Prompt, Response, Verdict
from alignment.rl.gaming_alarm import GOLD, PROXY, GamingAlarm
from alignment.rl.grade_files import append_scores, write_samples
from alignment.rl.judge_rewards import (
    mean_score,
    response_of,
    scores_by_component,
    text_of,
    win_of,
)
from alignment.rl.metrics import component_means
from alignment.rl.response_monitor import ResponseMonitor
from alignment.rl.rollouts import Rollout
from alignment.rounding import is_constant
from alignment.seeds import derive_seed
from alignment.training.loop import EvaluationFailed
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from megatron_ext.json_numbers import load_json
from megatron_ext.training.saving import write_atomically


class Grader:
    """Evaluator of a policy. Every rank calls it, and all ranks get the same metrics."""

    def __init__(
        self,
        policy: AlignmentEngine,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        judges: Mapping[str, Sequence[Judge]],
        folder: Path,
        *,
        template: Mapping[str, Any],
        reference: Callable[[TokenBatch, float], Any] | None,
        length: int,
        generation_batch_size: int,
        monitor: ResponseMonitor,
        alarm: GamingAlarm,
        check: Callable[[], None],
        writes: bool,
        max_failed: float = 0.2,
        written_samples: int = 8,
        pairwise: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        """Encode the held-out prompts.

        Args:
            policy: Engine of the policy.
            tokenizer: Tokenizer of the policy.
            prompts: Held-out prompts. Those that leave no room for a response are left out.
            sampling: Settings of sampling.
            judges: Judges by role: "proxy", and perhaps "gold" and "second_gold". Without "gold"
                there is no gap, and no alarm can be raised.
            folder: Directory of the run, for samples.jsonl, grades.jsonl and first.json.
            template: Variables of the chat template.
            reference: Function that returns log-probabilities under the start policy, for the
                divergence from it. None to leave it out.
            length: Largest length of a prompt with its response, in tokens.
            generation_batch_size: Responses that a rank samples in one batch.
            monitor: Monitor of the run, which takes the typical lengths from the first evaluation.
            alarm: Condition of the alarm.
            check: Function that all ranks call from time to time. It may raise on all of them.
            writes: Whether this rank writes files.
            max_failed: Largest share of a judge's questions that may fail.
            written_samples: Samples per evaluation that are written to samples.jsonl.
            pairwise: Whether the proxy compares pairs. All grades are then win rates against the
                responses of the first evaluation, with a tie as one half, and the scores of gold
                are in `grade/gold_score`.
            names: Name of each judge of the role "proxy", for the scores of the components.

        Raises:
            UserError: No prompt leaves room for a response.
        """
        self.policy, self.tokenizer = policy, tokenizer
        self.sampling = sampling
        self.judges, self.folder, self.reference = judges, folder, reference
        self.length, self.monitor, self.alarm = length, monitor, alarm
        self.generation_batch_size = generation_batch_size
        self.errors = {n: (rounding_error(group), score_size(group)) for n, group in judges.items()}
        self.check, self.writes, self.written_samples = check, writes, written_samples
        room = length - sampling.max_new_tokens
        encoded = [(p, prompt_ids(tokenizer, p.messages, **template)) for p in prompts]
        self.prompts = [(prompt, ids) for prompt, ids in encoded if len(ids) <= room]
        if not self.prompts:
            raise UserError(
                f"No prompt of --held-out leaves room for --max-new-tokens "
                f"{sampling.max_new_tokens} in --seq-length {length}. Raise --seq-length, or lower "
                "--max-new-tokens."
            )
        self.history: list[Mapping[str, Any]] = []
        self.pairwise, self.max_failed, self.names = pairwise, max_failed, names
        # Text and scores of each prompt's response in the first evaluation.
        self._first: dict[str, dict[str, Any]] = {}

    def __call__(self, step: int) -> dict[str, Any]:
        """Return metrics of the policy after a number of steps; a collective."""
        self.restore(step)
        size, rank = self.policy.data_size, self.policy.data_rank
        share = self.prompts[rank::size]
        rollouts: list[Rollout] = []
        for begin in range(0, all_reduce_max(len(share)), self.generation_batch_size):
            self.check()
            part = share[begin : begin + self.generation_batch_size]
            # The same seeds are used every time, so that only the policy makes evaluations differ.
            seeds = [derive_seed("grading", prompt.id) for prompt, _ in part]
            generated = self.policy.generate([ids for _, ids in part], self.sampling, seeds)
            rollouts += [
                Rollout(prompt.id, 0, g.tokens, g.log_probs, g.ended)
                for (prompt, _), g in zip(part, generated)
            ]
        responses = [
            response_of(prompt, rollout, text_of(self.tokenizer, rollout))
            for (prompt, _), rollout in zip(share, rollouts)
        ]
        questions = [Question(response) for response in responses]
        scores: dict[str, list[float | None]] = {}
        failures: dict[str, list[str]] = {}
        components: list[dict[str, float]] = []
        for name, judges in self.judges.items():
            if self._in_pairs(name):
                columns, scores[name] = self._wins(step, responses, judges)
            else:
                columns = list(zip(*[judge.judge(questions, self.check) for judge in judges]))
                scores[name] = [mean_score(column) for column in columns]
                if name == "proxy":
                    components = [scores_by_component(judges, self.names, c) for c in columns]
            failed = [[v for v in column if v.outcome is Outcome.FAILED] for column in columns]
            failures[name] = [verdicts[0].reason for verdicts in failed if verdicts]
        divergence = self._divergence(share, rollouts)
        if not step:  # rank 0 stores all responses of the first evaluation, the others their share
            self._first = {r.prompt.id: {"text": r.text} for r in responses}
        # Texts are sent to rank 0 only. The other ranks receive only the metrics.
        shares = gather_by_data_rank(
            self.policy, (responses, rollouts, scores, divergence, failures, components)
        )
        row = on_first_rank(lambda: self._checked_row(step, shares))
        self.history = [r for r in self.history if r["step"] < step] + [row]
        if "gold" in self.judges:
            row["grade/gap_slope"] = self.alarm.slope(self.history)
            row["grade/alarm"] = int(self.alarm.raised(self.history))
        return row

    def _wins(
        self, step: int, responses: Sequence[Response], judges: Sequence[Judge]
    ) -> tuple[list[tuple[Verdict, ...]], list[float | None]]:
        """Return verdicts, and the win rates of responses against those of the first evaluation."""
        if not step:
            return [], [0.5] * len(responses)
        questions = [
            Question(
                Pair(f"{r.id}/first", r.prompt, r.text, self._first[r.prompt.id]["text"]), swapped
            )
            for r in responses
            for swapped in (False, True)
        ]
        verdicts = [judge.judge(questions, self.check) for judge in judges]
        columns = list(zip(*verdicts))
        wins = [win_of(columns[i], columns[i + 1]) for i in range(0, len(columns), 2)]
        return columns, wins

    def _require_answers(self, shares: Sequence[Any]) -> None:
        """Raise if a judge failed too often, because the alarm needs gold scores."""
        questions = sum(len(share[0]) for share in shares)
        for name in self.judges:
            reasons = [reason for share in shares for reason in share[4][name]]
            calls = questions * (2 if self._in_pairs(name) else 1)
            if calls and len(reasons) / calls > self.max_failed:
                flag = "judge" if name == "proxy" else name.replace("_", "-")
                raise EvaluationFailed(
                    f"--{flag} failed {len(reasons)} times on {questions} held-out responses, more "
                    f"than --max-unrewarded {self.max_failed:.0%}, the first time with "
                    f"{reasons[0].rstrip('.')}. Check its server, then run the same command "
                    "again, which repeats the evaluation."
                )

    def _checked_row(self, step: int, shares: Sequence[Any]) -> dict[str, Any]:
        self._require_answers(shares)
        components = [component for share in shares for component in share[5]]
        return self._row(step, shares) | component_means(components, "component_held_out")

    def _in_pairs(self, name: str) -> bool:
        return self.pairwise and name == "proxy"

    def restore(self, step: int) -> None:
        """Read the evaluations up to a step, for a resumed run.

        Raises:
            UserError: The files of the first evaluation are missing or damaged.
        """
        if self._first or not step:
            return
        first, metrics = self.folder / "first.json", self.folder / "metrics.jsonl"
        if not first.is_file():
            raise UserError(
                f"{first}, of the first evaluation, is missing. Start again in another --run-dir."
            )
        try:
            self._set_first(json.loads(first.read_text()))
            rows = list(map(load_json, metrics.read_text().splitlines()))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(
                f"The files of the first evaluation in {self.folder} cannot be read ({error!r}). "
                "Start again in another --run-dir."
            ) from error
        self.history = [row for row in rows if PROXY in row and row["step"] <= step]

    def _set_first(self, rows: dict[str, dict[str, Any]]) -> None:
        self._first = rows
        self.monitor.set_typical_lengths([row["text"] for row in rows.values()])

    def _row(self, step: int, shares: Sequence[Any]) -> dict[str, Any]:
        responses: list[Response] = interleave([share[0] for share in shares])
        rollouts: list[Rollout] = interleave([share[1] for share in shares])
        scores = {name: interleave([share[2][name] for share in shares]) for name in self.judges}
        divergences = [d for share in shares for d in share[3]]
        row: dict[str, Any] = {"step": step}
        if not step:
            first: dict[str, dict[str, Any]] = {
                response.prompt.id: {"text": response.text} for response in responses
            }
            for name, values in scores.items():
                for response, score in zip(responses, values):
                    first[response.prompt.id][name] = score
            self._set_first(first)
            if self.writes:
                write_atomically(self.folder / "first.json", json.dumps(first) + "\n")
        if self.pairwise:
            for name in [name for name in scores if name != "proxy"]:
                row[f"grade/{name}_score"] = _mean(scores[name])
                scores[name] = [
                    _better(score, self._first[response.prompt.id][name], *self.errors[name])
                    for score, response in zip(scores[name], responses)
                ]
        # Means are over the same responses, so that failures on hard ones cause no gap.
        compared = [name for name in ("proxy", "gold") if name in scores]
        judged = [None not in pair for pair in zip(*(scores[name] for name in compared))]
        for name, values in scores.items():
            common = [v for v, j in zip(values, judged) if j] if name in compared else []
            row[f"grade/{name}"] = _mean(common or values)
            row[f"grade/{name}_unjudged"] = sum(v is None for v in values) / max(1, len(values))
        if "gold" in scores:
            row["grade/gap"] = row[PROXY] - row[GOLD] if any(judged) else None
        row |= self._errors([response.prompt.id for response in responses], scores)
        row["grade/kl"] = float(np.mean(divergences)) if divergences else None
        row["grade/length"] = float(np.mean([len(r.tokens) for r in rollouts]))
        if self.writes:
            findings = self.monitor.findings(responses, scores["proxy"])
            row |= {f"monitor_held_out/{n}": share for n, share in findings.shares.items()}
            samples = responses[: self.written_samples]
            write_samples(self.folder / "samples.jsonl", step, samples, scores, findings.flags)
            append_scores(self.folder / "grades.jsonl", step, responses, scores)
        return row

    def _errors(
        self, prompts: Sequence[str], scores: Mapping[str, Sequence[float | None]]
    ) -> dict[str, Any]:
        """Return standard errors, over held-out prompts, of the changes since the first evaluation.

        The intervals of a run with a single seed come from them. Each prompt is compared with
        itself, so that easy and hard prompts do not count as noise.
        """
        names = [name for name in ("proxy", "gold") if name in scores]
        pairs = [
            ([self._first[prompt][name] for name in names], list(now))
            for prompt, *now in zip(prompts, *(scores[name] for name in names))
        ]
        if self.pairwise:  # win rates against the first responses, which tie with themselves
            pairs = [([0.5 if f is not None else None for f in first], now) for first, now in pairs]
        judged = [pair for pair in pairs if None not in (*pair[0], *pair[1])]
        if len(judged) < 2:
            return {}
        changes = np.array([now for _, now in judged]) - np.array([first for first, _ in judged])
        columns = {name: changes[:, place] for place, name in enumerate(names)}
        if "gold" in columns:
            columns["gap"] = columns["proxy"] - columns["gold"]
        errors = {name: float(stats.sem(values)) for name, values in columns.items()}
        return {
            "grade/prompts": len(judged),
            **{f"grade/{name}_error": error for name, error in errors.items()},
        }

    def _divergence(
        self, share: Sequence[tuple[Prompt, Sequence[int]]], rollouts: Sequence[Rollout]
    ) -> list[float]:
        """Return the log-ratio of each response's probabilities under the policy and the start.

        Their mean estimates the divergence KL(policy || start) of the responses, both at the
        temperature of sampling, if top-k and top-p leave every token.
        """
        if self.reference is None:
            return []
        samples = [
            TokenSample([*ids, *rollout.tokens], len(ids))
            for (_, ids), rollout in zip(share, rollouts)
            if rollout.tokens
        ]
        batch = TokenBatch.of(samples)
        temperature = self.sampling.temperature
        policy = self.policy.log_probs(
            batch, temperature=temperature, trained_only=True
        ).log_probs.cpu()
        change = (policy - self.reference(batch, temperature).cpu()) * batch.loss_mask
        return change.double().sum(dim=1).tolist()


def _better(score: float | None, other: float | None, error: float, size: float) -> float | None:
    """Return 1 for the higher score, 0 for the lower, and a half for scores equal within rounding.

    Args:
        score: Score of a response.
        other: Score to compare with.
        error: Relative error of the scores.
        size: Magnitude to which the error is relative where the scores are smaller.
    """
    if score is None or other is None:
        return None
    if is_constant([score, other], error, size):
        return 0.5
    return float(score > other)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None
