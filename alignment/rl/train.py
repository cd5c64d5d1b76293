"""Training loop of reinforcement learning, for policies and for judges.

Each step samples responses to prompts, scores them, computes advantages, trains on them, logs its
metrics, and evaluates and saves the model when that is due. With the same responses, a step is the
same on every layout and number of ranks: only seeds decide which prompts belong to a step and which
responses to a mini-batch, and the loss is normalized over all ranks and micro-batches.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.ranks import all_gather_by_data_rank, all_reduce_max
from alignment.rl.async_rollouts import AsyncRollouts
from alignment.rl.critic import Critic
from alignment.rl.judge_costs import JudgeCosts
from alignment.rl.metrics import (
    StepTimes,
    failure_metrics,
    response_metrics,
    rewards_differ,
    rollout_gap,
    sample_text,
    update_metrics,
)
from alignment.rl.mini_batches import mini_batches
from alignment.rl.response_monitor import ResponseMonitor
from alignment.rl.rollouts import (
    Rollout,
    RolloutGroup,
    RolloutStore,
    remove_rollouts_before,
    step_folder,
)
from alignment.rl.served_log_probs import (
    check_served_log_probs,
    refuse_distant,
    refuse_sampling,
)
from alignment.rl.tasks import (
    PromptOrder,
    PromptTask,
    ReferenceLogProbs,
    RewardFunction,
    RLSettings,
    RolloutRequest,
)
from alignment.seeds import derive_seed
from alignment.training.loop import (
    Metrics,
    TrainingSchedule,
    record_evaluation,
    resume,
    stop_on_signal,
)
from alignment.training.run_console import RunConsole
from alignment.training.training_run import TrainingRun
from megatron_ext.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RLComponents:
    """Components of a run of reinforcement learning, the same on every rank.

    Attributes:
        run: Directory of the run.
        engine: Model that is trained.
        tasks: All prompts, the same on every rank. Prompts that leave no room for a response are
            left out of `prompts`.
        reward: Function that rewards responses.
        settings: Settings of reinforcement learning.
        seed: Seed of the order of the prompts and of the responses.
        reference: Function that returns the log-probabilities of the reference policy. Required if
            the loss has a divergence.
        critic: Model that computes the advantages, for an algorithm that requires one.
        generate: Function that samples responses with the weights of the engine. Default: that of
            the engine.
        async_rollouts: Sampler of the next step's responses, which works during this step.
        monitor: Monitor of the responses of every step.
        costs: Usage of the judges at endpoints, for the metrics of every step.
    """

    run: TrainingRun
    engine: AlignmentEngine
    tasks: Sequence[PromptTask]
    reward: RewardFunction
    settings: RLSettings
    seed: int
    reference: ReferenceLogProbs | None = None
    critic: Critic | None = None
    generate: Callable[..., Sequence[GeneratedResponse]] | None = None
    async_rollouts: AsyncRollouts | None = None
    monitor: ResponseMonitor | None = None
    costs: JudgeCosts | None = None
    prompts: PromptOrder = field(init=False)

    def __post_init__(self) -> None:
        """Check that the components fit together.

        Raises:
            UserError: No prompt leaves room for a response, there are too few prompts for a step,
                or servers sample from a part of the vocabulary.
        """
        sampling, algorithm = self.settings.sampling, self.settings.algorithm
        if self.generate is not None:
            refuse_sampling(sampling.temperature, sampling.top_k, sampling.top_p)
        if algorithm.uses_reference and self.reference is None:
            raise ValueError("The loss has a divergence, but there is no reference policy.")
        if (algorithm.advantages is None) != (self.critic is not None):
            raise ValueError("A critic is for an algorithm whose advantages it computes.")
        if self.async_rollouts is not None:
            assert not algorithm.dynamic, (
                "a step that may draw more prompts cannot be sampled in advance"
            )
            self.run.at_exit(self.async_rollouts.cancel)
        object.__setattr__(self, "prompts", PromptOrder(self.tasks, self.settings, self.seed))


def train(
    rl: RLComponents,
    schedule: TrainingSchedule,
    evaluate: Callable[[int], Metrics] | None = None,
) -> int:
    """Train a model on the rewards of its responses, from the current step of the run to the last.

    Args:
        rl: Components of the run.
        schedule: Number of steps, and when to evaluate and to save.
        evaluate: Function that returns metrics of the model after a number of steps. It is also
            called before the first step.

    Returns:
        The number of the signal that stopped the run, or 0.

    Raises:
        UserError: Too many responses have no reward, or servers report wrong log-probabilities.
    """
    run, engine, settings, critic = rl.run, rl.engine, rl.settings, rl.critic
    algorithm, rollout_root = settings.algorithm, run.folder / "rollouts"
    served_log_probs_checked = rl.generate is None
    lines = RunConsole(run, schedule.steps, schedule.report_every)
    with lines, stop_on_signal(run) as stop:
        resume(run, schedule, lines, evaluate)
        while run.step < schedule.steps and not run.ended:
            run.check_signals()
            step, times = run.step, StepTimes()
            remove_rollouts_before(rollout_root, run.saved)

            # Sample and score the responses that the store does not have yet.
            with times.measure("rollout"):
                if rl.async_rollouts is not None:
                    rl.async_rollouts.join(run.check_signals)
            with RolloutStore(step_folder(rollout_root, step), engine) as store:
                groups, all_groups, draws = collect_groups(rl, step, store, times)
                metrics = response_metrics(engine, groups) | {"draws": draws}
                failures, reasons = failure_metrics(engine, all_groups)
                metrics |= failures
                metrics |= rl.costs.metrics() if rl.costs is not None else {}
                if rl.monitor is not None:
                    metrics |= rl.monitor.check_step(step, groups)
                if step == 0 or schedule.evaluates_after(step + 1):
                    run.show_text("samples", sample_text(groups))
                refuse_failures(settings, failures, reasons)
                store.settle(all_groups)

            with times.measure("training"):
                # Compute advantages, and pack the responses of each optimizer step.
                batches = mini_batches(engine, settings, groups, (rl.seed, step))
                if not all_reduce_max(sum(batch.rows for batch in batches)):
                    batches, metrics["skipped"] = [], 1
                else:
                    metrics["skipped"] = 0
                trains_policy = critic is None or step >= critic.settings.warmup
                fresh = metrics["rollout_staleness"] == 0

                # Old log-probabilities. With a single optimizer step they are those of the
                # training pass itself, and the loss takes them from there.
                separate_pass = (
                    settings.mini_batches > 1
                    or not algorithm.derives_old_log_probs
                    or not trains_policy
                    or not served_log_probs_checked
                )
                if batches and separate_pass:
                    batches = [with_old_log_probs(rl, batch) for batch in batches]
                    metrics |= rollout_gap(engine, batches)
                    if rl.generate is not None:
                        check_served_log_probs(
                            engine, batches, settings.sampling.temperature, fresh=fresh,
                            thorough=not served_log_probs_checked,
                        )  # fmt: skip
                        served_log_probs_checked = True
                if rl.reference is not None and algorithm.uses_reference:
                    batches = [with_reference_log_probs(rl, batch) for batch in batches]
                if critic is not None and batches:
                    batches, critic_metrics = critic.compute_advantages(batches)
                    metrics |= critic_metrics

                # Train.
                policy_updates, critic_updates = [], []
                for batch in batches:
                    if not all_reduce_max(batch.rows):
                        continue
                    if critic is not None:
                        critic_updates.append(critic.train_step(batch))
                    if trains_policy:
                        policy_updates.append(
                            engine.train_step(
                                batch,
                                algorithm.loss,
                                temperature=settings.sampling.temperature,
                                entropy=algorithm.uses_entropy,
                            )
                        )
                metrics |= update_metrics(policy_updates)
                if rl.generate is not None and policy_updates and fresh and not separate_pass:
                    refuse_distant(metrics["rollout_kl"])
                metrics |= update_metrics(critic_updates, "value_")

            # Log.
            metrics |= times.metrics(metrics["tokens"])
            run.finish_step(metrics)
            lines.finish_step(run.step, metrics)

            # Evaluate and save.
            if schedule.evaluates_after(run.step):
                record_evaluation(run, schedule, lines, evaluate)
            if schedule.saves_after(run.step) or run.ended:
                run.save()
    return stop.signal


def collect_groups(
    rl: RLComponents, step: int, store: RolloutStore, times: StepTimes
) -> tuple[list[RolloutGroup], list[RolloutGroup], int]:
    """Sample and score responses to the prompts of a step.

    An algorithm with dynamic sampling draws further prompts while too few groups have rewards that
    differ. After the last draw, groups with equal rewards complete the step.

    Returns:
        This rank's groups of the step, all groups that were sampled for it, and the number of
        draws.
    """
    settings, engine = rl.settings, rl.engine
    dynamic = settings.algorithm.dynamic
    most_draws = settings.draws if dynamic else 1
    all_groups: list[RolloutGroup] = []
    candidates: list[tuple[tuple[bool, int, int], RolloutGroup]] = []
    for draw in range(most_draws):
        tasks = rl.prompts.draw(step, draw)
        share = tasks[engine.data_rank :: engine.data_size]
        with times.measure("rollout"):
            rollouts = sample_responses(rl, step, share, store)
            if rl.async_rollouts is not None:
                start_next_step(rl, step + 1, rl.async_rollouts)
        with times.measure("judging"):
            groups = score_responses(rl, share, rollouts, store)
        all_groups += groups
        places = {task.id: place for place, task in enumerate(tasks)}
        for group in groups:
            equal = dynamic and not rewards_differ(group)
            if not equal or draw == most_draws - 1:
                candidates.append(((equal, draw, places[group.task.id]), group))
        ranks = all_gather_by_data_rank(engine, [rank for rank, _ in candidates])
        chosen = sorted(rank for share in ranks for rank in share)[: settings.groups]
        if len(chosen) == settings.groups:
            break
    chosen_ranks = set(chosen)
    return [group for rank, group in candidates if rank in chosen_ranks], all_groups, draw + 1


def sample_responses(
    rl: RLComponents, step: int, tasks: Sequence[PromptTask], store: RolloutStore
) -> list[list[Rollout]]:
    """Sample the responses that the store lacks, and return those of each task."""
    size, settings = rl.settings.generation_batch_size, rl.settings
    generate = rl.generate or rl.engine.generate
    requests = rollout_requests(rl, step, tasks)
    missing = [one for one in requests if store.rollout(one.task, one.sample) is None]
    for begin in range(0, all_reduce_max(len(missing)), size):
        rl.run.check_signals()
        part = missing[begin : begin + size]
        responses = generate(
            [one.prompt for one in part], settings.sampling, [one.seed for one in part]
        )
        store.add_rollouts(
            [
                Rollout(
                    one.task, one.sample, r.tokens, r.log_probs, r.ended, version=rl.engine.step
                )
                for one, r in zip(part, responses)
            ]
        )
    samples = range(settings.group_size)
    stored = [[store.rollout(task.id, sample) for sample in samples] for task in tasks]
    rollouts = [[rollout for rollout in group if rollout is not None] for group in stored]
    refuse_stale(rl, step, rollouts)
    return rollouts


def rollout_requests(
    rl: RLComponents, step: int, tasks: Sequence[PromptTask]
) -> list[RolloutRequest]:
    """Return the requests for the responses of a step to some tasks."""
    return [
        RolloutRequest(task.id, sample, task.prompt, derive_seed(rl.seed, step, task.id, sample))
        for task in tasks
        for sample in range(rl.settings.group_size)
    ]


def start_next_step(rl: RLComponents, step: int, async_rollouts: AsyncRollouts) -> None:
    """Start the sampling of the next step's responses by the servers."""
    tasks = rl.prompts.draw(step, 0)[rl.engine.data_rank :: rl.engine.data_size]
    folder = step_folder(rl.run.folder / "rollouts", step)
    async_rollouts.start(step, folder, rollout_requests(rl, step, tasks), rl.settings.sampling)


def refuse_stale(rl: RLComponents, step: int, rollouts: Sequence[Sequence[Rollout]]) -> None:
    """Refuse responses that are older than the weights before the last step.

    Raises:
        UserError: The responses belong to another run, or to an earlier state of this one.
    """
    behind = [abs(rl.engine.step - r.version) for group in rollouts for r in group]
    oldest = all_reduce_max(max(behind, default=0))
    if oldest > (0 if rl.async_rollouts is None else rl.settings.mini_batches):
        raise UserError(
            f"Responses in {step_folder(rl.run.folder / 'rollouts', step)} were sampled {oldest} "
            "optimizer steps before the current policy. Remove that folder to sample them again."
        )


def score_responses(
    rl: RLComponents,
    tasks: Sequence[PromptTask],
    rollouts: Sequence[list[Rollout]],
    store: RolloutStore,
) -> list[RolloutGroup]:
    """Reward the responses whose rewards the store lacks, and return all groups."""
    groups = list(zip(tasks, rollouts))
    missing = [(t, rs) for t, rs in groups if any(store.reward(r) is None for r in rs)]
    size = max(1, rl.settings.generation_batch_size // rl.settings.group_size)
    for begin in range(0, all_reduce_max(len(missing)), size):
        rl.run.check_signals()
        part = missing[begin : begin + size]
        rewards = rl.reward(part, rl.run.check_signals)
        # A group may be scored again because of one response. The other rewards stay unchanged.
        store.add_rewards(
            [
                (rollout, reward)
                for (_, group), group_rewards in zip(part, rewards)
                for rollout, reward in zip(group, group_rewards)
                if store.reward(rollout) is None
            ]
        )
    return [
        RolloutGroup(task, group, [w for r in group if (w := store.reward(r)) is not None])
        for task, group in groups
    ]


def refuse_failures(
    settings: RLSettings, failures: Mapping[str, float], reasons: Counter[str]
) -> None:
    """Refuse to train if too many responses have no reward.

    Raises:
        UserError: More than `settings.max_unrewarded` have none.
    """
    if failures["unrewarded"] > settings.max_unrewarded:
        common = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise UserError(
            f"{failures['unrewarded']:.0%} of the responses have no reward (unparseable "
            f"{failures['unparseable']:.0%}, failed {failures['failed']:.0%}), which is more than "
            f"--max-unrewarded {settings.max_unrewarded:.0%}. The most frequent reasons: "
            f"{common or 'none reported'}."
        )


def with_old_log_probs(rl: RLComponents, batch: TokenBatch) -> TokenBatch:
    """Add the log-probabilities of the policy before this step's optimizer steps."""
    temperature = rl.settings.sampling.temperature
    scores = rl.engine.log_probs(batch, temperature=temperature, trained_only=True)
    return replace(batch, extras={**batch.extras, "old_log_probs": scores.log_probs.cpu()})


def with_reference_log_probs(rl: RLComponents, batch: TokenBatch) -> TokenBatch:
    """Add the log-probabilities of the reference policy."""
    assert rl.reference is not None
    values = rl.reference(batch, rl.settings.sampling.temperature).cpu()
    return replace(batch, extras={**batch.extras, "reference_log_probs": values})
