"""Command `et-align train-policy`; its help is in `train_policy_config`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands.policy_judges import (
    check_prompts,
    describe_judges,
    endpoint_calls,
    shared_with_gold,
    warn_without_gold,
)
from alignment.commands.train_policy_config import TrainPolicyConfig, parse
from alignment.commands.training_dry_run import dry_run
from alignment.commands.training_setup import (
    check_algorithm,
    check_room,
    count_updates,
    load_rollout_filter,
    rollout_sources,
    select_algorithm,
    start_critic,
    start_engine,
    transform_records,
)
from alignment.data.chat_prompts import prompt_ids, warn_of_template
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.kinds.judge_kind import Judge, JudgeConfig, JudgeContext
from alignment.judges.kinds.registry import read_judge
from alignment.monitors.limits import MonitorLimits
from alignment.monitors.training_monitor import Monitor
from alignment.record_files import read_files
from alignment.records import Prompt
from alignment.rl.algorithms import ALGORITHMS
from alignment.rl.critic import Critic
from alignment.rl.gaming_alarm import GamingAlarm
from alignment.rl.grading import Grader
from alignment.rl.judge_costs import JudgeCosts
from alignment.rl.judge_rewards import JudgeReward
from alignment.rl.resident_models import resident_models
from alignment.rl.response_monitor import ResponseMonitor, RoutingCheck
from alignment.rl.tasks import PromptTask, RLSettings
from alignment.rl.train import RLComponents, train
from alignment.training.loop import TrainingSchedule
from alignment.training.run_settings import lasting_settings
from alignment.training.training_run import TrainingRun
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens
from megatron_ext.inference.sampling import Sampling


def main(argv: Sequence[str]) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: TrainPolicyConfig) -> int:
    """Train the policy and export it; return the exit status.

    Raises:
        UserError: The data, a judge or the model cannot be used.
        TooFewResults: More of the prompts are left out than --max-left-out allows.
    """
    _check(config)
    if config.run.dry_run is not None:
        _dry_run(config, config.run.dry_run)
        return 0
    settings = _rl_settings(config)
    limits = MonitorLimits.read(config.monitor_limits) if config.monitor_limits else MonitorLimits()
    specs = {
        "proxy": [read_judge(file) for file in config.judge],
        "gold": [read_judge(file) for file in config.gold],
        "second_gold": [read_judge(file) for file in config.second_gold],
    }
    prompts = read_files(config.prompts, Prompt, options=config.rows.options)
    prompts = transform_records(prompts, config.data_transform)
    held_out = read_files(config.held_out, Prompt, options=config.rows.options)
    check_prompts(prompts, held_out, specs)
    tokenizer = load_tokenizer(config.model.model_folder, config.model.chat_template_file)
    template, max_new_tokens = config.model.template_variables, config.sampling.max_new_tokens
    tasks = [PromptTask(p.id, prompt_ids(tokenizer, p.messages, **template), p) for p in prompts]
    check_room(config, max_new_tokens, [task.prompt for task in tasks], "prompts of --prompts")
    ids = [prompt_ids(tokenizer, p.messages, **template) for p in held_out]
    if held_out:
        check_room(config, max_new_tokens, ids, "prompts of --held-out")
    if prompts:
        warn_of_template("train-policy", tokenizer, prompts[0].messages, template)

    engine = start_engine(
        config.model.model, config.engine, config.optimization, count_updates(config, config.steps)
    )
    used_tokens = {token for task in tasks for token in task.prompt} | end_tokens(tokenizer)
    critic = start_critic(config, config.steps, used_tokens)
    resident: dict[str, AlignmentEngine] = {}

    def load(model: str) -> AlignmentEngine:
        if model not in resident:
            resident[model] = start_engine(model, config.engine)
        return resident[model]

    judges: dict[str, list[Judge]] = {
        name: [
            spec.open(
                JudgeContext(
                    config.reward == "pairwise" and name == "proxy",
                    Path(config.run.run_dir) / "verdicts",
                    engine,
                    load,
                )
            )
            for spec in each
        ]
        for name, each in specs.items()
        if each
    }
    reference = None
    if config.reference or settings.algorithm.uses_reference:
        start = load(config.model.model)

        def reference(batch: TokenBatch, temperature: float) -> Any:
            scores = start.log_probs(batch, temperature=temperature, trained_only=True)
            return scores.log_probs

    return _train_policy(
        config, engine, critic, tokenizer, template, tasks, held_out, settings, limits, judges,
        specs, reference,
    )  # fmt: skip


def _check(config: TrainPolicyConfig) -> None:
    """Check what depends on the algorithm, before anything is loaded."""
    sampling = config.sampling
    check_algorithm(config, sampling.temperature, sampling.top_k, sampling.top_p)
    margin, longest = config.overlong_margin, config.sampling.max_new_tokens
    if ALGORITHMS[config.reinforcement.algorithm].overlong and not 0 < margin <= longest:
        raise UserError(
            f"--overlong-margin {margin} must be above 0 and at most --max-new-tokens {longest}."
        )
    _ = config.groups_per_step


def _dry_run(config: TrainPolicyConfig, world_size: int) -> None:
    critic = None
    if ALGORITHMS[config.reinforcement.algorithm].advantages is None:
        critic = config.critic.critic or config.model.model
    reference = config.model.model if config.reference or config.kl else None
    files = [*config.judge, *config.gold, *config.second_gold]
    resident = resident_models(reference, files)
    for sentence in endpoint_calls(config):
        print(sentence)
    dry_run(config, world_size, config.sampling.generation_batch_size, critic, resident)


def _train_policy(
    config: TrainPolicyConfig,
    engine: AlignmentEngine,
    critic: Critic | None,
    tokenizer: Any,
    template: Mapping[str, Any],
    tasks: Sequence[PromptTask],
    held_out: Sequence[Prompt],
    settings: RLSettings,
    limits: MonitorLimits,
    judges: Mapping[str, Sequence[Judge]],
    specs: Mapping[str, Sequence[JudgeConfig]],
    reference: Any,
) -> int:
    others = {"critic": critic.engine} if critic else {}
    with TrainingRun(
        Path(config.run.run_dir), engine, _lasting_settings(config), others, config.run.trackers
    ) as training:
        training.note(
            policy=config.model.model,
            algorithm=config.reinforcement.algorithm,
            seed=config.run.seed,
            judge=describe_judges(specs["proxy"], judges["proxy"]),
            gold=describe_judges(specs["gold"], judges.get("gold", [])),
            second_gold=describe_judges(specs["second_gold"], judges.get("second_gold", [])),
        )
        monitor = ResponseMonitor(
            training,
            Monitor(limits),
            routing=RoutingCheck(
                interval=config.routing_interval,
                responses=config.routing_samples,
                seq_length=settings.seq_length,
                temperature=settings.sampling.temperature,
            ),
            keep_responses=config.keep_responses,
        )
        names = [spec.name for spec in specs["proxy"]]
        grader = None
        if held_out:
            grader = Grader(
                engine,
                tokenizer,
                held_out,
                settings.sampling,
                judges,
                training.folder,
                template=template,
                reference=reference,
                length=config.batch.seq_length,
                generation_batch_size=config.sampling.generation_batch_size,
                monitor=monitor,
                alarm=GamingAlarm(config.alarm_threshold, config.alarm_window),
                check=training.check_signals,
                writes=training.writes,
                pairwise=config.reward == "pairwise",
                max_failed=config.max_unrewarded,
                names=names,
            )

            training.at_resume(grader.restore)

        def stop_when(row: Mapping[str, Any]) -> str | None:
            assert grader is not None
            if training.writes and (sentence := grader.alarm.sentence(grader.history)):
                console.alarm(sentence)
            if config.stop_on_alarm and row["grade/alarm"]:
                return (
                    f"the proxy score exceeds the gold score by {row['grade/gap']:.2f} more than "
                    "at the start while the gold score does not rise: the policy is gaming its "
                    "judge (--stop-on-alarm)"
                )
            return None

        costs = JudgeCosts(judge for each in judges.values() for judge in each)
        rl = RLComponents(
            run=training,
            engine=engine,
            tasks=tasks,
            reward=JudgeReward(judges["proxy"], tokenizer, config.reward == "pairwise", names),
            settings=settings,
            seed=config.run.seed,
            reference=reference,
            critic=critic,
            monitor=monitor,
            costs=costs,
            **rollout_sources(
                config, config.steps, engine, end_tokens(tokenizer), training.check_signals
            ),
        )
        if training.writes:
            for warning in filter(None, (shared_with_gold(specs), warn_without_gold(config))):
                console.warn(f"train-policy: warning: {warning}")
            graded = len(grader.prompts) if grader else 0
            left = f", {rl.prompts.too_long:,} too long" if rl.prompts.too_long else ""
            console.line(
                f"{'Data':9}{len(rl.prompts.tasks):,} prompts{left}; {graded:,} held out; "
                f"{config.steps:,} steps"
            )
        plan = TrainingSchedule(
            config.steps,
            config.run.save_interval,
            config.run.eval_interval,
            stop_when=stop_when,
            report_every=config.run.log_interval or 1,
        )
        stopped = train(rl, plan, grader)
        for sentence in costs.sentences():
            if training.writes:
                console.line(sentence)
        if stopped:
            return 128 + stopped
        engine.export(training.folder / "final")
        if training.writes:
            console.line(f"The policy is {training.folder / 'final'}.")
    return 0


def _rl_settings(config: TrainPolicyConfig) -> RLSettings:
    algorithm = select_algorithm(
        config,
        kl=config.kl,
        divergence=config.kl_estimator,
        max_tokens=config.sampling.max_new_tokens,
    )
    sampling = config.sampling
    return RLSettings(
        algorithm=algorithm,
        groups=config.groups_per_step,
        group_size=config.reinforcement.group_size,
        mini_batches=config.reinforcement.mini_batches,
        seq_length=config.batch.seq_length,
        sampling=Sampling(
            sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p
        ),
        generation_batch_size=sampling.generation_batch_size,
        overlong_margin=config.overlong_margin,
        max_unrewarded=config.max_unrewarded,
        rollout_filter=load_rollout_filter(config),
    )


def _lasting_settings(config: TrainPolicyConfig) -> dict[str, Any]:
    """Return the settings that a run must have again when it is resumed."""
    settings = lasting_settings(config, files=("prompts", "held_out"))
    for name in ("judge", "gold", "second_gold"):
        settings[name] = [read_judge(file).resume_settings() for file in settings[name]]
    return settings | {"alarm_gap": config.alarm_threshold}
