"""Command `et-align train-judge`; its help is in `train_judge_config`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands.judge_setup import load_judge_format, make_local_judge
from alignment.commands.train_judge_config import TrainJudgeConfig, parse
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
)
from alignment.data.chat_prompts import warn_of_template
from alignment.data.record_writer import RecordWriter
from alignment.engines.protocol import AlignmentEngine
from alignment.judges import training_examples as examples
from alignment.judges.kinds.local_judge import LocalJudge, TokenizedJudgeFormat
from alignment.judges.training_examples import LabeledQuestion
from alignment.judges.validation import BEST, agreement, is_sound, judge_all
from alignment.judges.verifiable_rewards import judge_reward
from alignment.ranks import all_reduce_max
from alignment.records import Pair
from alignment.rl.critic import Critic
from alignment.rl.rollouts import RewardResult, Rollout
from alignment.rl.tasks import PromptTask, RLSettings
from alignment.rl.train import RLComponents, train
from alignment.training.loop import Metrics, TrainingSchedule, fit
from alignment.training.run_settings import lasting_settings
from alignment.training.sft import SupervisedStep, steps_of
from alignment.training.training_run import TrainingRun
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens
from megatron_ext.inference.sampling import Sampling

# Flags whose files count by their content when a run is resumed.
_FILES = ("input", "gold", "validation_input", "validation_gold")


def main(argv: Sequence[str]) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: TrainJudgeConfig) -> int:
    """Train the judge and export the best one; return the exit status.

    Raises:
        UserError: The data or the model cannot be used.
        TooFewResults: More of the data is left out than --max-left-out allows.
    """
    check_algorithm(config, config.temperature)
    thinks = config.format.thinking != "none"
    if config.run.dry_run is not None:
        dry_run(config, config.run.dry_run, config.answers.generation_batch_size * thinks)
        return 0
    reading = (not thinks, config.gold_scale, config.batch.max_left_out, config.rows.options)
    gold = examples.read_labeled_questions(config.input, config.gold, *reading)
    validation = []
    if config.validation_input:
        validation = examples.read_labeled_questions(
            config.validation_input, config.validation_gold, *reading
        )
        if len({row.label for row in validation} - {"tie"}) < 2:
            raise UserError(
                f"All {len(validation):,} labels of --validation-gold are {validation[0].label}: "
                "agreement on a single label is not defined. Give verdicts of several labels."
            )
    judge_format = load_judge_format(
        config.model, config.format, isinstance(gold[0].question.item, Pair)
    )
    judge_format.label_tokens  # noqa: B018  (fails before anything is loaded)
    first = gold[0].question
    messages = judge_format.messages(first.item, first.swapped)
    warn_of_template(
        "train-judge", judge_format.tokenizer, messages, judge_format.chat_template_kwargs
    )
    _check_validation_room(config, judge_format, validation)
    if config.stage == "sft":
        return _train_supervised(config, judge_format, gold, validation)
    return _train_on_rewards(config, judge_format, gold, validation)


def _check_validation_room(
    config: TrainJudgeConfig,
    judge_format: TokenizedJudgeFormat,
    validation: Sequence[LabeledQuestion],
) -> None:
    """Check that a question of the validation leaves room for an answer.

    Raises:
        UserError: None does, so that the validation could only fail.
    """
    room = config.batch.seq_length - (
        config.answers.max_new_tokens if judge_format.parser.thinks else 1
    )
    lengths = [len(judge_format.prompt_ids(row.question)) for row in validation]
    if lengths and min(lengths) > room:
        raise UserError(
            f"Every question of --validation-input has more than the {max(room, 0):,} tokens that "
            f"--seq-length {config.batch.seq_length} leaves for it; the shortest has "
            f"{min(lengths):,}. Raise --seq-length or lower --max-new-tokens."
        )


def _train_supervised(
    config: TrainJudgeConfig,
    judge_format: TokenizedJudgeFormat,
    gold: Sequence[LabeledQuestion],
    validation: Sequence[LabeledQuestion],
) -> int:
    encoded = examples.encode(
        gold,
        judge_format,
        config.batch.seq_length,
        config.max_thinking_tokens,
        config.batch.max_left_out,
    )
    steps = config.steps or steps_of(len(encoded.samples), config.batch.batch_size, config.epochs)
    engine = start_engine(config.model.model, config.engine, config.optimization, steps)
    step = SupervisedStep(
        engine, encoded.samples, config.batch.batch_size, config.batch.seq_length, config.run.seed
    )

    def run_steps(
        training: TrainingRun,
        schedule: TrainingSchedule,
        evaluate: Callable[[int], Metrics] | None,
    ) -> int:
        return fit(training, schedule, step, evaluate)

    data = encoded.summary()
    return _run(config, engine, judge_format, validation, steps, run_steps, data)


def _train_on_rewards(
    config: TrainJudgeConfig,
    judge_format: TokenizedJudgeFormat,
    gold: Sequence[LabeledQuestion],
    validation: Sequence[LabeledQuestion],
) -> int:
    max_new_tokens = config.answers.max_new_tokens
    steps = config.steps
    assert steps is not None, "checked by the configuration"
    settings = RLSettings(
        algorithm=select_algorithm(config, max_tokens=max_new_tokens),
        groups=config.groups_per_step,
        group_size=config.reinforcement.group_size,
        mini_batches=config.reinforcement.mini_batches,
        seq_length=config.batch.seq_length,
        sampling=Sampling(config.answers.max_new_tokens, config.temperature),
        generation_batch_size=config.answers.generation_batch_size,
        rollout_filter=load_rollout_filter(config),
    )
    tasks = [
        PromptTask(
            json.dumps([r.gold.item, r.gold.swapped, r.gold.sample]),
            judge_format.prompt_ids(r.question),
            r,
        )
        for r in gold
    ]
    check_room(config, max_new_tokens, [task.prompt for task in tasks], "questions of --input")
    engine = start_engine(
        config.model.model, config.engine, config.optimization, count_updates(config, steps)
    )
    used_tokens = {token for task in tasks for token in task.prompt} | end_tokens(
        judge_format.tokenizer
    )
    critic = start_critic(config, steps, used_tokens)
    judge = _make_judge(config, engine, judge_format)

    def reward(
        groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], check: Callable[[], None]
    ) -> list[list[RewardResult]]:
        return [
            [_reward_answer(judge, task.metadata, r) for r in rollouts] for task, rollouts in groups
        ]

    def run_steps(
        training: TrainingRun,
        schedule: TrainingSchedule,
        evaluate: Callable[[int], Metrics] | None,
    ) -> int:
        ends = end_tokens(judge_format.tokenizer)
        rl = RLComponents(
            run=training,
            engine=engine,
            tasks=tasks,
            reward=reward,
            settings=settings,
            seed=config.run.seed,
            critic=critic,
            **rollout_sources(config, steps, engine, ends, training.check_signals),
        )
        return train(rl, schedule, evaluate)

    data = f"{len(tasks):,} questions"
    return _run(config, engine, judge_format, validation, steps, run_steps, data, critic)


def _reward_answer(judge: LocalJudge, row: LabeledQuestion, rollout: Rollout) -> RewardResult:
    answer = judge.answer(rollout.tokens, rollout.ended)
    fields = judge.read(row.question, answer)
    reward = judge_reward(fields, row.gold)
    return RewardResult(reward, str(fields["outcome"]), fields["answer"])


def _make_judge(
    config: TrainJudgeConfig, engine: AlignmentEngine, judge_format: TokenizedJudgeFormat
) -> LocalJudge:
    """Return the judge in training."""
    return make_local_judge(
        config.model.model,
        config.answers,
        engine,
        judge_format,
        config.batch.seq_length,
        judge_format.identity,
    )


def _run(
    config: TrainJudgeConfig,
    engine: AlignmentEngine,
    judge_format: TokenizedJudgeFormat,
    validation: Sequence[LabeledQuestion],
    steps: int,
    run_steps: Callable[[TrainingRun, TrainingSchedule, Callable[[int], Metrics] | None], int],
    data: str,
    critic: Critic | None = None,
) -> int:
    judge = _make_judge(config, engine, judge_format)
    others = {"critic": critic.engine} if critic else {}
    settings = lasting_settings(config, _FILES)
    with TrainingRun(
        Path(config.run.run_dir), engine, settings, others, config.run.trackers
    ) as training:
        training.note(
            judge={"identity": judge_format.identity, "template": judge_format.prompt.identity}
        )

        def evaluate(step: int) -> Mapping[str, Any]:
            verdicts = judge_all(judge, validation, training.check_signals)
            if training.writes:
                file = training.folder / "validation" / f"step_{step:06d}.jsonl"
                with RecordWriter(file, overwrite=True) as writer:
                    for verdict in verdicts:
                        writer.write(verdict)
            return agreement([row.gold for row in validation], verdicts)

        if training.writes:
            console.line(f"{'Data':9}{data}; {len(validation):,} for validation; {steps:,} steps")
        best = BEST[judge_format.parser.pairwise] if validation else None
        plan = TrainingSchedule(
            steps,
            config.run.save_interval,
            config.run.eval_interval,
            best,
            is_sound,
            report_every=config.run.log_interval or (10 if config.stage == "sft" else 1),
        )
        stopped = run_steps(training, plan, evaluate if validation else None)
        if stopped:
            return 128 + stopped
        # Rank 0 decides for all: another rank may look after rank 0 has begun to export.
        if not all_reduce_max(int(training.writes and (training.folder / "best").is_dir())):
            engine.export(training.folder / "best")
        if training.writes:
            console.line(f"The best judge is {training.folder / 'best'}.")
    return 0
