"""Reinforcement learning: prompts are sampled, rewarded, compared and trained on.

A step has groups of responses to the same prompts. It is the same on any layout and number of
ranks, given the same samples: what belongs to a step and to a mini-batch depends on seeds alone,
and the loss is normalised over all ranks and micro-batches together.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alignment.engines.batch import Batch, Sample
from alignment.engines.protocol import Engine, Generated, StepResult
from alignment.ranks import most_of_ranks, shares_of
from alignment.rl.advantages import group_advantages, informative, overlong_penalty
from alignment.rl.algorithms import Algorithm
from alignment.rl.critic import Critic
from alignment.rl.rollouts import Rewarded, Rollout, RolloutStore, folder_of, forget_before
from alignment.seeds import seed_of
from alignment.training.run import Run
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling


@dataclass(frozen=True)
class Task:
    """A prompt to be answered.

    Attributes:
        prompt: token ids.
        about: what the reward needs to know.
    """

    id: str
    prompt: Sequence[int]
    about: Any


class Reward(Protocol):
    """Rewards responses; a collective of all ranks, each with groups of its own."""

    def __call__(
        self, groups: Sequence[tuple[Task, Sequence[Rollout]]], check: Callable[[], None]
    ) -> Sequence[Sequence[Rewarded]]:
        """The rewards of each group's responses.

        Args:
            check: to be called on all ranks now and then; may raise.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """Of the learning.

    Attributes:
        algorithm: see `ALGORITHMS`.
        groups: prompts of a step, on all ranks.
        group_size: responses to each.
        mini_batches: optimizer steps of a step.
        length: of the rows that samples are packed into; a prompt with its response must fit.
        sampling: of the responses.
        rows: responses that are sampled at a time on a rank.
        overlong_margin: tokens before the limit in which a response is punished.
        max_unrewarded: share of a step's responses without a reward that ends the run.
        draws: with an algorithm that wants groups of unequal rewards: how often a step may draw.
    """

    algorithm: Algorithm
    groups: int
    group_size: int
    mini_batches: int
    length: int
    sampling: Sampling
    rows: int = 64
    overlong_margin: int = 1
    max_unrewarded: float = 0.2
    draws: int = 3

    def __post_init__(self) -> None:
        if self.group_size < 2 and self.algorithm.advantages is not None:
            raise UserError(f"--group-size {self.group_size} must be at least 2, to compare")
        if not 0 < self.mini_batches <= self.groups * self.group_size:
            raise UserError(
                f"--mini-batches {self.mini_batches} must be at least 1 and at most the "
                f"{self.groups * self.group_size} responses of a step"
            )


Group = tuple[Task, list[Rollout], list[Rewarded]]
Reference = Callable[[Batch, float], torch.Tensor]


class ReinforcementStep:
    """A step of learning, for `alignment.training.loop.fit`."""

    def __init__(
        self,
        engine: Engine,
        run: Run,
        tasks: Sequence[Task],
        reward: Reward,
        settings: Settings,
        seed: int,
        reference: Reference | None = None,
        watch: Callable[[int, Sequence[Group]], Mapping[str, Any]] | None = None,
        generate: Callable[..., Sequence[Generated]] | None = None,
        critic: Critic | None = None,
    ) -> None:
        """See the class.

        Args:
            tasks: all, the same on every rank.
            reference: log-probabilities of a batch's tokens under another policy, at a temperature.
            watch: further figures of a step's groups, all of them, called on every rank.
            generate: draws the responses, with the engine's weights; the engine by default.
            critic: of an algorithm whose advantages one makes.

        Raises:
            UserError: no prompt leaves room for a response.
        """
        room = settings.length - settings.sampling.max_new_tokens
        self.tasks = [task for task in tasks if len(task.prompt) <= room]
        self.too_long = len(tasks) - len(self.tasks)
        if not self.tasks:
            raise UserError(
                f"no prompt leaves room for {settings.sampling.max_new_tokens} tokens in "
                f"--seq-length {settings.length}: raise it, or lower --max-new-tokens"
            )
        if settings.algorithm.loss.kl and reference is None:
            raise ValueError("the loss has a divergence and there is no reference")
        if (settings.algorithm.advantages is None) != (critic is not None):
            raise ValueError("a critic goes with an algorithm whose advantages it makes")
        scale = settings.sampling.temperature
        self.settings = replace(
            settings, sampling=replace(settings.sampling, score_temperature=scale)
        )
        self.engine, self.run, self.reward, self.seed = engine, run, reward, seed
        self.reference, self.watch, self.critic = reference, watch, critic
        self.generate = generate or engine.generate
        self._rollouts = run.folder / "rollouts"
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Mapping[str, Any]:
        forget_before(self._rollouts, self.run.saved)
        begin = time.perf_counter()
        groups, draws, times = self._gather(step, folder_of(self._rollouts, step))
        facts = self._facts(groups) | {"draws": draws}
        row = facts | (dict(self.watch(step, self._all(groups))) if self.watch else {})
        self._refuse_failures(facts)
        trained = time.perf_counter()
        row |= self._train(step, groups)
        done = time.perf_counter()
        times["training"] = done - trained
        tokens = facts["tokens"]
        row |= {f"time/{name}": value for name, value in times.items()}
        row |= {f"share/{name}": value / (done - begin) for name, value in times.items()}
        row |= {"tokens_per_s": tokens / (done - begin)}
        return row

    def _gather(self, step: int, folder: Path) -> tuple[list[Group], int, dict[str, float]]:
        """This rank's groups of the step, sampled and rewarded."""
        kept: list[tuple[tuple[int, int], Group]] = []
        times = {"rollout": 0.0, "judging": 0.0}
        last = self.settings.draws if self.settings.algorithm.dynamic else 1
        with RolloutStore(folder, self.engine) as store:
            for draw in range(last):
                drawn = self._draw(step, draw)
                mine = drawn[self.engine.data_rank :: self.engine.data_size]
                begin = time.perf_counter()
                sampled = self._sample(step, mine, store)
                between = time.perf_counter()
                groups = self._reward(mine, sampled, store)
                times["rollout"] += between - begin
                times["judging"] += time.perf_counter() - between
                if self.settings.algorithm.dynamic and draw < last - 1:
                    groups = [group for group in groups if _differ(group)]
                places = {task.id: place for place, task in enumerate(drawn)}
                kept += [((draw, places[group[0].id]), group) for group in groups]
                ranked = shares_of(self.engine, [place for place, _ in kept])
                first = sorted(place for share in ranked for place in share)[: self.settings.groups]
                if len(first) == self.settings.groups:
                    break
        wanted = set(first)
        return [group for place, group in kept if place in wanted], draw + 1, times

    def _draw(self, step: int, draw: int) -> list[Task]:
        """The prompts of a step; those of a further draw are drawn at random."""
        count, size = len(self.tasks), self.settings.groups
        if draw:
            chosen = np.random.default_rng((self.seed, step, draw)).choice(
                count, min(size, count), replace=False
            )
            seen = {t.id for d in range(draw) for t in self._draw(step, d)}
            return [self.tasks[i] for i in chosen if self.tasks[i].id not in seen]
        found: list[Task] = []
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, count)
            if epoch not in self._orders:
                order = np.random.default_rng((self.seed, epoch)).permutation(count)
                self._orders[epoch] = order
            found.append(self.tasks[self._orders[epoch][index]])
        if len({task.id for task in found}) < len(found):
            raise UserError(
                f"a step wants {size} different prompts, and there are {count}: give more prompts "
                "that fit, or a smaller --batch-size"
            )
        return found

    def _sample(self, step: int, tasks: Sequence[Task], store: RolloutStore) -> list[list[Rollout]]:
        size = self.settings.group_size
        wanted = [(task, sample) for task in tasks for sample in range(size)]
        missing = [pair for pair in wanted if store.rollout(pair[0].id, pair[1]) is None]
        for begin in range(0, most_of_ranks(len(missing)), self.settings.rows):
            self.run.check_signals()
            part = missing[begin : begin + self.settings.rows]
            seeds = [seed_of(self.seed, step, task.id, sample) for task, sample in part]
            prompts = [task.prompt for task, _ in part]
            found = self.generate(prompts, self.settings.sampling, seeds)
            store.keep_rollouts(
                [
                    Rollout(task.id, sample, g.tokens, g.log_probs, g.ended, self.engine.step)
                    for (task, sample), g in zip(part, found)
                ]
            )
        kept = [[store.rollout(task.id, sample) for sample in range(size)] for task in tasks]
        return [[rollout for rollout in group if rollout is not None] for group in kept]

    def _reward(
        self, tasks: Sequence[Task], sampled: Sequence[list[Rollout]], store: RolloutStore
    ) -> list[Group]:
        groups = list(zip(tasks, sampled))
        missing = [(t, rs) for t, rs in groups if any(store.reward(r) is None for r in rs)]
        each = max(1, self.settings.rows // self.settings.group_size)
        for begin in range(0, most_of_ranks(len(missing)), each):
            self.run.check_signals()
            part = missing[begin : begin + each]
            found = self.reward(part, self.run.check_signals)
            flat = [(r, w) for (_, rs), ws in zip(part, found) for r, w in zip(rs, ws)]
            store.keep_rewards(flat)
        return [
            (task, rollouts, [w for r in rollouts if (w := store.reward(r)) is not None])
            for task, rollouts in groups
        ]

    def _train(self, step: int, groups: Sequence[Group]) -> dict[str, Any]:
        batches = [
            Batch.packed(samples, self.settings.length)
            for samples in self._mini_batches(step, groups)
        ]
        if not most_of_ranks(sum(batch.rows for batch in batches)):
            return {"skipped": 1}
        temperature = self.settings.sampling.temperature
        batches = [self._with_log_probs(batch, temperature) for batch in batches]
        loss, critic = self.settings.algorithm.loss, self.critic
        shares = shares_of(self.engine, _gap(batches))
        weight = sum(count for _, count, _ in shares)
        row: dict[str, Any] = {
            "skipped": 0,
            "rollout_gap": sum(total for total, _, _ in shares) / max(weight, 1),
            "rollout_gap_max": max(most for _, _, most in shares),
        }
        if critic is not None:
            batches, told = critic.judge(batches)
            row |= told
        results, valued = [], []
        for batch in batches:
            if not most_of_ranks(batch.rows):
                continue
            if critic is not None:
                valued.append(critic.learn(batch))
            if critic is None or step >= critic.valuation.warmup:
                results.append(
                    self.engine.train_step(
                        batch, loss, temperature=temperature, entropy=bool(loss.entropy)
                    )
                )
        return row | _told(results) | _told(valued, "value_")

    def _mini_batches(self, step: int, groups: Sequence[Group]) -> Iterator[list[Sample]]:
        """This rank's samples of each mini-batch. Responses without a reward are in none."""
        of_group = self.settings.algorithm.advantages
        numbered = self._numbers(groups)
        count = self.settings.groups * self.settings.group_size
        order = np.random.default_rng((self.seed, step)).permutation(count)
        parts: list[list[Sample]] = [[] for _ in range(self.settings.mini_batches)]
        for (task, rollouts, rewards), number in zip(groups, numbered):
            values = self._shaped(rollouts, rewards)
            if of_group is None:  # the critic makes them of the rewards
                advantages: Any = [0.0 if value is None else value for value in values]
            else:
                advantages = group_advantages(values, [0] * len(values), of_group)
            for rollout, value, advantage in zip(rollouts, values, advantages):
                if value is None or not rollout.tokens:
                    continue
                tokens = [*task.prompt, *rollout.tokens]
                given = [0.0] * len(task.prompt)
                extras: dict[str, Any] = {
                    "advantage": float(advantage),
                    "rollout_log_probs": [*given, *rollout.log_probs],
                }
                place = order[number * self.settings.group_size + rollout.sample]
                parts[place % len(parts)].append(Sample(tokens, len(task.prompt), extras))
        yield from parts

    def _numbers(self, groups: Sequence[Group]) -> list[int]:
        """Of each group, its place among all ranks' groups, in an order that no layout changes."""
        ids = [task.id for task, _, _ in groups]
        everyones = sorted(i for share in shares_of(self.engine, ids) for i in share)
        places = {task: place for place, task in enumerate(everyones)}
        return [places[task] for task in ids]

    def _shaped(
        self, rollouts: Sequence[Rollout], rewards: Sequence[Rewarded]
    ) -> list[float | None]:
        values = [rewarded.reward for rewarded in rewards]
        if not self.settings.algorithm.overlong:
            return values
        limit = self.settings.sampling.max_new_tokens
        lengths = [len(rollout.tokens) for rollout in rollouts]
        penalties = overlong_penalty(lengths, limit, self.settings.overlong_margin)
        return [None if v is None else v + float(p) for v, p in zip(values, penalties)]

    def _with_log_probs(self, batch: Batch, temperature: float) -> Batch:
        # Of this very computation, so that the first step's ratios are 1.
        old = self.engine.log_probs(batch, temperature=temperature).log_probs.cpu()
        extras = {**batch.extras, "old_log_probs": old}
        if self.settings.algorithm.loss.kl and self.reference is not None:
            extras["reference_log_probs"] = self.reference(batch, temperature).cpu()
        return replace(batch, extras=extras)

    def _all(self, groups: Sequence[Group]) -> list[Group]:
        return [group for share in shares_of(self.engine, list(groups)) for group in share]

    def _facts(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Figures of the responses of all ranks."""
        flat = [
            (w.reward, w.outcome, len(rollout.tokens), rollout.ended, len(task.prompt))
            for task, rollouts, rewards in groups
            for rollout, w in zip(rollouts, rewards)
        ]
        rows = [row for share in shares_of(self.engine, flat) for row in share]
        differ = [d for share in shares_of(self.engine, list(map(_differ, groups))) for d in share]
        rewards_ = [row[0] for row in rows if row[0] is not None]
        count = max(1, len(rows))
        return {
            "reward": float(np.mean(rewards_)) if rewards_ else None,
            "reward_std": float(np.std(rewards_)) if rewards_ else None,
            "length": float(np.mean([row[2] for row in rows])) if rows else 0.0,
            "cut_off": sum(not row[3] for row in rows) / count,
            "unrewarded": 1 - len(rewards_) / count,
            "unparseable": sum(row[1] == "unparseable" for row in rows) / count,
            "failed": sum(row[1] == "failed" for row in rows) / count,
            "groups_that_differ": sum(differ) / max(1, len(differ)),
            "tokens": sum(row[2] + row[4] for row in rows),
        }

    def _refuse_failures(self, facts: Mapping[str, Any]) -> None:
        if facts["unrewarded"] > self.settings.max_unrewarded:
            raise UserError(
                f"{facts['unrewarded']:.0%} of the responses have no reward (unparseable "
                f"{facts['unparseable']:.0%}, failed {facts['failed']:.0%}), more than "
                f"--max-unrewarded {self.settings.max_unrewarded:.0%}: see what the judge answers "
                "in the newest folder of rollouts"
            )


def _differ(group: Group) -> bool:
    return bool(informative([w.reward for w in group[2]], [0] * len(group[2])).any())


def _told(results: Sequence[StepResult], prefix: str = "") -> dict[str, float]:
    """Figures of the optimizer steps of a step."""
    if not results:
        return {}
    means = {n: float(np.mean([r.metrics[n] for r in results])) for n in results[0].metrics}
    return {
        f"{prefix}loss": float(np.mean([r.loss for r in results])),
        f"{prefix}grad_norm": float(np.mean([r.grad_norm for r in results])),
        f"{prefix}lr": results[-1].lr,
        **means,
    }


def _gap(batches: Sequence[Batch]) -> tuple[float, int, float]:
    """Of a rank's trained tokens: sum of |training - rollout| log-probability, count, largest."""
    total, count, most = 0.0, 0, 0.0
    for batch in batches:
        difference = batch.extras["old_log_probs"] - batch.extras.get("rollout_log_probs", 0.0)
        values = difference[batch.loss_mask].abs()
        if len(values):
            total, count = total + float(values.sum()), count + len(values)
            most = max(most, float(values.max()))
    return total, count, most
