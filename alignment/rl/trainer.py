"""Reinforcement learning: prompts are sampled, rewarded, compared and trained on.

A step has groups of responses to the same prompts. It is the same on any layout and number of
ranks, given the same samples: what belongs to a step and to a mini-batch depends on seeds alone,
and the loss is normalised over all ranks and micro-batches together.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.ranks import all_gather_by_data_rank, all_reduce_max
from alignment.rl.advantages import group_advantages, overlong_penalty
from alignment.rl.async_rollouts import AsyncRollouts
from alignment.rl.critic import Critic
from alignment.rl.rollouts import (
    RewardResult,
    Rollout,
    RolloutStore,
    remove_rollouts_before,
    step_folder,
)
from alignment.rl.step_metrics import (
    failure_metrics,
    response_metrics,
    rewards_differ,
    rollout_gap,
    update_metrics,
)
from alignment.rl.supports import check_served_log_probs, refuse_truncation
from alignment.rl.tasks import Group, PromptTask, ReferenceLogProbs, RewardFunction, RLSettings
from alignment.seeds import derive_seed
from alignment.training.training_run import TrainingRun
from megatron_ext.errors import UserError


class ReinforcementStep:
    """A step of learning, for `alignment.training.loop.fit`."""

    def __init__(
        self,
        engine: AlignmentEngine,
        run: TrainingRun,
        tasks: Sequence[PromptTask],
        reward: RewardFunction,
        settings: RLSettings,
        seed: int,
        reference: ReferenceLogProbs | None = None,
        watch: Callable[[int, Sequence[Group]], Mapping[str, Any]] | None = None,
        generate: Callable[..., Sequence[GeneratedResponse]] | None = None,
        critic: Critic | None = None,
        ahead: AsyncRollouts | None = None,
    ) -> None:
        """See the class.

        Args:
            tasks: all, the same on every rank.
            reference: log-probabilities of a batch's tokens under another policy, at a temperature.
            watch: further figures of a step; called on every rank with its groups.
            generate: draws the responses, with the engine's weights; the engine by default.
            critic: of an algorithm whose advantages one makes.
            ahead: draws the next step's responses meanwhile; not where a step may draw again.

        Raises:
            UserError: no prompt leaves room for a response, or there are too few for a step.
        """
        room = settings.length - settings.sampling.max_new_tokens
        self.tasks = [task for task in tasks if len(task.prompt) <= room]
        self.too_long = len(tasks) - len(self.tasks)
        if not self.tasks:
            raise UserError(
                f"no prompt leaves room for {settings.sampling.max_new_tokens} tokens in "
                f"--seq-length {settings.length}: raise it, or lower --max-new-tokens"
            )
        if (count := len({task.id for task in self.tasks})) < settings.groups:
            raise UserError(
                f"a step wants {settings.groups} different prompts, and there are {count}: give "
                "more prompts that fit, or a smaller --batch-size"
            )
        if generate is not None:
            refuse_truncation(settings.sampling.top_k, settings.sampling.top_p)
        if settings.algorithm.loss.kl and reference is None:
            raise ValueError("the loss has a divergence and there is no reference")
        if (settings.algorithm.advantages is None) != (critic is not None):
            raise ValueError("a critic goes with an algorithm whose advantages it makes")
        if ahead is not None:
            assert not settings.algorithm.dynamic
            run.at_exit(ahead.cancel)
        scale = settings.sampling.temperature
        self.settings = replace(
            settings, sampling=replace(settings.sampling, score_temperature=scale)
        )
        self.engine, self.run, self.reward, self.seed = engine, run, reward, seed
        self.reference, self.watch, self.critic, self.ahead = reference, watch, critic, ahead
        self.generate, self.served = generate or engine.generate, generate is not None
        self._compared = False
        self._rollouts = run.folder / "rollouts"
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Mapping[str, Any]:
        remove_rollouts_before(self._rollouts, self.run.saved)
        begin = time.perf_counter()
        times = self._wait_for_ahead()
        with RolloutStore(step_folder(self._rollouts, step), self.engine) as store:
            groups, asked, draws = self._gather(step, store, times)
            failures, reasons = failure_metrics(self.engine, asked)
            facts = response_metrics(self.engine, groups) | failures | {"draws": draws}
            row = facts | (dict(self.watch(step, groups)) if self.watch else {})
            self._refuse_failures(facts, reasons)
            store.settle([one for _, sampled, given in asked for one in zip(sampled, given)])
        trained = time.perf_counter()
        row |= self._train(step, groups, facts["rollout_staleness"] == 0)
        done = time.perf_counter()
        times["training"] = done - trained
        tokens = facts["tokens"]
        row |= {f"time/{name}": value for name, value in times.items()}
        row |= {f"share/{name}": value / (done - begin) for name, value in times.items()}
        row |= {"tokens_per_s": tokens / (done - begin)}
        return row

    def _wait_for_ahead(self) -> dict[str, float]:
        """Wait for rollouts that were begun in the step before; return the seconds of each part."""
        begin = time.perf_counter()
        if self.ahead is not None:
            self.ahead.join(self.run.check_signals)
        return {"rollout": time.perf_counter() - begin, "judging": 0.0}

    def _gather(
        self, step: int, store: RolloutStore, times: dict[str, float]
    ) -> tuple[list[Group], list[Group], int]:
        """Return this rank's groups of the step, sampled and rewarded, all that were drawn for
        them, and the number of draws; add the seconds that it took to `times`."""
        asked: list[Group] = []
        kept: list[tuple[tuple[bool, int, int], Group]] = []
        dynamic = self.settings.algorithm.dynamic
        last = self.settings.draws if dynamic else 1
        for draw in range(last):
            drawn = self._draw(step, draw)
            mine = drawn[self.engine.data_rank :: self.engine.data_size]
            begin = time.perf_counter()
            sampled = self._sample(step, mine, store)
            self._look_ahead(step + 1)
            between = time.perf_counter()
            groups = self._reward(mine, sampled, store)
            times["rollout"] += between - begin
            times["judging"] += time.perf_counter() - between
            asked += groups
            places = {task.id: place for place, task in enumerate(drawn)}
            for group in groups:
                equal = dynamic and not rewards_differ(group)
                if not equal or draw == last - 1:  # at the last, equal ones fill what is left
                    kept.append(((equal, draw, places[group[0].id]), group))
            ranked = all_gather_by_data_rank(self.engine, [place for place, _ in kept])
            first = sorted(place for share in ranked for place in share)[: self.settings.groups]
            if len(first) == self.settings.groups:
                break
        wanted = set(first)
        return [group for place, group in kept if place in wanted], asked, draw + 1

    def _draw(self, step: int, draw: int) -> list[PromptTask]:
        """The prompts of a step; those of a further draw are drawn at random."""
        count, size = len(self.tasks), self.settings.groups
        if draw:
            seen = {t.id for d in range(draw) for t in self._draw(step, d)}
            others = [task for task in self.tasks if task.id not in seen]
            chosen = np.random.default_rng((self.seed, step, draw)).choice(
                len(others), min(size, len(others)), replace=False
            )
            return [others[i] for i in chosen]
        # A step is within one epoch, so that its prompts differ: what is left of the epoch's order
        # is not used.
        epoch, part = divmod(step, count // size)
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(count)
        return [self.tasks[i] for i in self._orders[epoch][part * size : (part + 1) * size]]

    def _sample(
        self, step: int, tasks: Sequence[PromptTask], store: RolloutStore
    ) -> list[list[Rollout]]:
        size = self.settings.group_size
        wanted = self._wanted(step, tasks)
        missing = [one for one in wanted if store.rollout(one[0], one[1]) is None]
        for begin in range(0, all_reduce_max(len(missing)), self.settings.rows):
            self.run.check_signals()
            part = missing[begin : begin + self.settings.rows]
            prompts, seeds = [one[2] for one in part], [one[3] for one in part]
            found = self.generate(prompts, self.settings.sampling, seeds)
            store.keep_rollouts(
                [
                    Rollout(task, sample, g.tokens, g.log_probs, g.ended, self.engine.step)
                    for (task, sample, *_), g in zip(part, found)
                ]
            )
        kept = [[store.rollout(task.id, sample) for sample in range(size)] for task in tasks]
        sampled = [[rollout for rollout in group if rollout is not None] for group in kept]
        self._refuse_stale(step, sampled)
        return sampled

    def _wanted(
        self, step: int, tasks: Sequence[PromptTask]
    ) -> list[tuple[str, int, Sequence[int], int]]:
        """Of each response to draw: task, sample of it, prompt and seed."""
        return [
            (task.id, sample, task.prompt, derive_seed(self.seed, step, task.id, sample))
            for task in tasks
            for sample in range(self.settings.group_size)
        ]

    def _look_ahead(self, step: int) -> None:
        if self.ahead is None:
            return
        mine = self._draw(step, 0)[self.engine.data_rank :: self.engine.data_size]
        folder = step_folder(self._rollouts, step)
        self.ahead.start(step, folder, self._wanted(step, mine), self.settings.sampling)

    def _refuse_stale(self, step: int, sampled: Sequence[Sequence[Rollout]]) -> None:
        """Responses are of the present weights, or of those before the last step at most."""
        behind = [abs(self.engine.step - r.version) for group in sampled for r in group]
        most = all_reduce_max(max(behind, default=0))
        if most > (0 if self.ahead is None else self.settings.mini_batches):
            raise UserError(
                f"responses in {step_folder(self._rollouts, step)} were drawn {most} optimizer "
                "steps before the policy: remove that folder, and they are drawn anew"
            )

    def _reward(
        self, tasks: Sequence[PromptTask], sampled: Sequence[list[Rollout]], store: RolloutStore
    ) -> list[Group]:
        groups = list(zip(tasks, sampled))
        missing = [(t, rs) for t, rs in groups if any(store.reward(r) is None for r in rs)]
        each = max(1, self.settings.rows // self.settings.group_size)
        for begin in range(0, all_reduce_max(len(missing)), each):
            self.run.check_signals()
            part = missing[begin : begin + each]
            found = self.reward(part, self.run.check_signals)
            # Of a group that is asked about again for one of its responses the others keep theirs.
            store.keep_rewards(
                [
                    (rollout, rewarded)
                    for (_, rollouts), rewards in zip(part, found)
                    for rollout, rewarded in zip(rollouts, rewards)
                    if store.reward(rollout) is None
                ]
            )
        return [
            (task, rollouts, [w for r in rollouts if (w := store.reward(r)) is not None])
            for task, rollouts in groups
        ]

    def _train(self, step: int, groups: Sequence[Group], fresh: bool) -> dict[str, Any]:
        """Optimizer steps on the groups.

        Args:
            fresh: all ranks' responses were drawn with the present weights.
        """
        batches = [
            TokenBatch.packed(samples, self.settings.length)
            for samples in self._mini_batches(step, groups)
        ]
        if not all_reduce_max(sum(batch.rows for batch in batches)):
            return {"skipped": 1}
        temperature = self.settings.sampling.temperature
        batches = [self._with_log_probs(batch, temperature) for batch in batches]
        loss, critic = self.settings.algorithm.loss, self.critic
        row = {"skipped": 0, **rollout_gap(self.engine, batches)}
        if self.served:
            check_served_log_probs(
                self.engine, batches, temperature, fresh=fresh, thorough=not self._compared
            )
            self._compared = True
        if critic is not None:
            batches, told = critic.compute_advantages(batches)
            row |= told
        results, valued = [], []
        for batch in batches:
            if not all_reduce_max(batch.rows):
                continue
            if critic is not None:
                valued.append(critic.train_step(batch))
            if critic is None or step >= critic.settings.warmup:
                results.append(
                    self.engine.train_step(
                        batch, loss, temperature=temperature, entropy=bool(loss.entropy)
                    )
                )
        return row | update_metrics(results) | update_metrics(valued, "value_")

    def _mini_batches(self, step: int, groups: Sequence[Group]) -> Iterator[list[TokenSample]]:
        """This rank's samples of each mini-batch. Responses without a reward are in none."""
        of_group = self.settings.algorithm.advantages
        numbered = self._numbers(groups)
        count = self.settings.groups * self.settings.group_size
        order = np.random.default_rng((self.seed, step)).permutation(count)
        parts: list[list[TokenSample]] = [[] for _ in range(self.settings.mini_batches)]
        for (task, rollouts, rewards), number in zip(groups, numbered):
            values = self._shaped(rollouts, rewards)
            if of_group is None:  # the critic makes them of the rewards
                advantages: Any = [0.0 if value is None else value for value in values]
            else:
                errors = [rewarded.error for rewarded in rewards]
                advantages = group_advantages(values, [0] * len(values), of_group, errors)
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
                parts[place % len(parts)].append(TokenSample(tokens, len(task.prompt), extras))
        yield from parts

    def _numbers(self, groups: Sequence[Group]) -> list[int]:
        """Of each group, its place among all ranks' groups, in an order that no layout changes."""
        ids = [task.id for task, _, _ in groups]
        everyones = sorted(i for share in all_gather_by_data_rank(self.engine, ids) for i in share)
        places = {task: place for place, task in enumerate(everyones)}
        return [places[task] for task in ids]

    def _shaped(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]
    ) -> list[float | None]:
        values = [rewarded.reward for rewarded in rewards]
        if not self.settings.algorithm.overlong:
            return values
        limit = self.settings.sampling.max_new_tokens
        lengths = [len(rollout.tokens) for rollout in rollouts]
        penalties = overlong_penalty(lengths, limit, self.settings.overlong_margin)
        return [None if v is None else v + float(p) for v, p in zip(values, penalties)]

    def _with_log_probs(self, batch: TokenBatch, temperature: float) -> TokenBatch:
        # Of this very computation, so that the first step's ratios are 1.
        old = self.engine.log_probs(batch, temperature=temperature).log_probs.cpu()
        extras = {**batch.extras, "old_log_probs": old}
        if self.settings.algorithm.loss.kl and self.reference is not None:
            extras["reference_log_probs"] = self.reference(batch, temperature).cpu()
        return replace(batch, extras=extras)

    def _refuse_failures(self, facts: Mapping[str, Any], reasons: Counter[str]) -> None:
        if facts["unrewarded"] > self.settings.max_unrewarded:
            told = [f"{reason} ({count})" for reason, count in reasons.most_common(3)]
            most_often = "; ".join(told) or "no reason told"
            raise UserError(
                f"{facts['unrewarded']:.0%} of the responses have no reward (unparseable "
                f"{facts['unparseable']:.0%}, failed {facts['failed']:.0%}), more than "
                f"--max-unrewarded {self.settings.max_unrewarded:.0%}; most often: {most_often}"
            )
