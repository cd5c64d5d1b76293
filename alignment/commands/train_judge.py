"""Train a judge to say what a gold judge says.

    torchrun --nproc-per-node 8 -m alignment train-judge --stage sft --model DIR --run-dir DIR \\
        --input ITEMS.jsonl --gold VERDICTS.jsonl \\
        --validation-input ITEMS.jsonl --validation-gold VERDICTS.jsonl

Stage sft imitates gold's labels, or with --thinking its thinking and labels. Stage grpo lets a
judge that thinks answer, and rewards answers close to gold's. The best model by agreement on the
validation items is RUN/best, a Hugging Face folder. Stopped or killed, the same command goes on.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands import training_flags as flags
from alignment.commands.judge_format_flags import (
    add_answer_flags,
    add_form_flags,
    form_of,
    judge_of,
)
from alignment.commands.training_dry_run import dry_run
from alignment.data.chat_prompts import warn_of_template
from alignment.data.source_rows import RecordWriter
from alignment.engines.protocol import AlignmentEngine
from alignment.judges import training_examples as examples
from alignment.judges.formats.scale import check_scale
from alignment.judges.kinds.local_judge import LocalJudge, TokenizedJudgeFormat
from alignment.judges.training_examples import Labelled
from alignment.judges.validation import BEST, agreement, is_sound, judge_all
from alignment.judges.verifiable_rewards import judge_reward
from alignment.ranks import all_reduce_max
from alignment.records import Pair
from alignment.rl.algorithms import algorithm_by_name
from alignment.rl.critic import Critic
from alignment.rl.rollouts import RewardResult, Rollout
from alignment.rl.tasks import PromptTask, RLSettings
from alignment.rl.train import RLComponents, train
from alignment.training.loop import Metrics, TrainingSchedule, fit
from alignment.training.sft import SupervisedStep, steps_of
from alignment.training.training_run import TrainingRun
from megatron_ext.errors import ToolParser, UserError
from megatron_ext.hf.end_tokens import end_tokens
from megatron_ext.inference.sampling import Sampling
from megatron_ext.recipes import expand_recipes


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.dry_run is not None:
        dry_run(options)
        return 0
    reading = (options.thinking == "none", options.gold_scale, options.max_left_out)
    gold = examples.read_labelled(options.input, options.gold, *reading)
    held_out = []
    if options.validation_input:
        held_out = examples.read_labelled(
            options.validation_input, options.validation_gold, *reading
        )
        if len({row.label for row in held_out} - {"tie"}) < 2:
            raise UserError(
                f"all {len(held_out):,} labels of --validation-gold are {held_out[0].label}: "
                "agreement with one label has no meaning"
            )
    judge_format = form_of(options, isinstance(gold[0].question.item, Pair))
    judge_format.label_tokens  # noqa: B018  (fails before anything is loaded)
    first = gold[0].question
    messages = judge_format.messages(first.item, first.swapped)
    warn_of_template(
        "train-judge", judge_format.tokenizer, messages, judge_format.chat_template_kwargs
    )
    _check_room(options, judge_format, held_out)
    if options.stage == "sft":
        return _imitate(options, judge_format, gold, held_out)
    return _reinforce(options, judge_format, gold, held_out)


def _check_room(
    options: argparse.Namespace, judge_format: TokenizedJudgeFormat, held_out: Sequence[Labelled]
) -> None:
    """Refuse validation that can only fail: a question without room for an answer is not asked."""
    room = options.seq_length - (options.max_new_tokens if judge_format.parser.thinks else 1)
    lengths = [len(judge_format.prompt_ids(row.question)) for row in held_out]
    if lengths and min(lengths) > room:
        raise UserError(
            f"every question of --validation-input has more than the {max(room, 0):,} tokens that "
            f"--seq-length {options.seq_length} leaves beside an answer (the shortest "
            f"{min(lengths):,}): raise it, or lower --max-new-tokens"
        )


def _imitate(
    options: argparse.Namespace,
    judge_format: TokenizedJudgeFormat,
    gold: Sequence[Labelled],
    held_out: Sequence[Labelled],
) -> int:
    encoded = examples.encode(
        gold, judge_format, options.seq_length, options.max_thinking_tokens, options.max_left_out
    )
    steps = options.steps or steps_of(len(encoded.samples), options.batch_size, options.epochs)
    engine = flags.engine_of(options, steps)
    step = SupervisedStep(
        engine, encoded.samples, options.batch_size, options.seq_length, options.seed
    )

    def run_steps(
        run: TrainingRun, schedule: TrainingSchedule, evaluate: Callable[[int], Metrics] | None
    ) -> int:
        return fit(run, schedule, step, evaluate)

    return _run(options, engine, judge_format, held_out, steps, run_steps, encoded.told())


def _reinforce(
    options: argparse.Namespace,
    judge_format: TokenizedJudgeFormat,
    gold: Sequence[Labelled],
    held_out: Sequence[Labelled],
) -> int:
    algorithm = algorithm_by_name(
        options.algorithm, max_tokens=options.max_new_tokens, **flags.rollout_weights(options)
    )
    if options.steps is None:
        raise UserError("--stage grpo needs --steps")
    settings = RLSettings(
        algorithm=algorithm,
        groups=flags.groups_of(options),
        group_size=options.group_size,
        mini_batches=options.mini_batches,
        seq_length=options.seq_length,
        sampling=Sampling(options.max_new_tokens, options.temperature),
        generation_batch_size=options.rows,
    )
    tasks = [
        PromptTask(
            json.dumps([r.gold.item, r.gold.swapped, r.gold.sample]),
            judge_format.prompt_ids(r.question),
            r,
        )
        for r in gold
    ]
    flags.check_room(options, [task.prompt for task in tasks], "questions of --input")
    engine = flags.engine_of(options, flags.updates_of(options))
    seen = {token for task in tasks for token in task.prompt} | end_tokens(judge_format.tokenizer)
    critic = flags.critic_of(options, seen)
    judge = judge_of(options, engine, judge_format, judge_format.identity)

    def reward(
        groups: Sequence[tuple[PromptTask, Sequence[Rollout]]], check: Callable[[], None]
    ) -> list[list[RewardResult]]:
        return [[_rewarded(judge, task.metadata, r) for r in rollouts] for task, rollouts in groups]

    def run_steps(
        run: TrainingRun, schedule: TrainingSchedule, evaluate: Callable[[int], Metrics] | None
    ) -> int:
        ends = end_tokens(judge_format.tokenizer)
        rl = RLComponents(
            run=run, engine=engine, tasks=tasks, reward=reward, settings=settings,
            seed=options.seed, critic=critic,
            **flags.rollouts_of(options, engine, ends, run.check_signals),
        )  # fmt: skip
        return train(rl, schedule, evaluate)

    told = f"{len(tasks):,} questions"
    return _run(options, engine, judge_format, held_out, options.steps, run_steps, told, critic)


def _rewarded(judge: LocalJudge, row: Labelled, rollout: Rollout) -> RewardResult:
    answer = judge.answer(rollout.tokens, rollout.ended)
    fields = judge.read(row.question, answer)
    reward = judge_reward(fields, row.gold)
    return RewardResult(reward, str(fields["outcome"]), fields["answer"])


def _run(
    options: argparse.Namespace,
    engine: AlignmentEngine,
    judge_format: TokenizedJudgeFormat,
    held_out: Sequence[Labelled],
    steps: int,
    run_steps: Callable[[TrainingRun, TrainingSchedule, Callable[[int], Metrics] | None], int],
    told: str,
    critic: Critic | None = None,
) -> int:
    judge = judge_of(options, engine, judge_format, judge_format.identity)
    beside = {"critic": critic.engine} if critic else {}
    with TrainingRun(Path(options.run_dir), engine, _settings(options), beside) as run:
        run.note(
            judge={"identity": judge_format.identity, "template": judge_format.prompt.identity}
        )

        def evaluate(step: int) -> Mapping[str, Any]:
            found = judge_all(judge, held_out, run.check_signals)
            if run.writes:
                file = run.folder / "validation" / f"step_{step:06d}.jsonl"
                with RecordWriter(file, overwrite=True) as writer:
                    for verdict in found:
                        writer.write(verdict)
            return agreement([row.gold for row in held_out], found)

        if run.writes:
            print(f"{told}; {len(held_out):,} for validation; {steps:,} steps", flush=True)
        best = BEST[judge_format.parser.pairwise] if held_out else None
        plan = TrainingSchedule(steps, options.save_interval, options.eval_interval, best, is_sound)
        stopped = run_steps(run, plan, evaluate if held_out else None)
        if stopped:
            return 128 + stopped
        # Rank 0 says so for all: another may look when rank 0 has begun to export already.
        if not all_reduce_max(int(run.writes and (run.folder / "best").is_dir())):
            engine.export(run.folder / "best")
        if run.writes:
            print(f"the best judge is {run.folder / 'best'}", flush=True)
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must stay the same when a run goes on."""
    kept = flags.lasting(options)
    for name in ("input", "gold", "validation_input", "validation_gold"):
        kept[name] = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in kept[name]]
    return kept


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the flags.

    Raises:
        UserError: naming the flag.
    """
    parser = _parser()
    options = parser.parse_args(expand_recipes(argv, parser))
    flags.check(options)
    if len(options.input) != len(options.gold):
        raise UserError("--input and --gold go together: give one of verdicts for each of items")
    if len(options.validation_input) != len(options.validation_gold):
        raise UserError("--validation-input and --validation-gold go together")
    if options.dry_run is None and not options.input:
        raise UserError("give --input with items to learn from, and --gold with verdicts on them")
    if options.stage == "grpo" and options.thinking == "none":
        raise UserError("--stage grpo is for a judge that thinks: give --thinking asked or opened")
    if options.gold_scale:
        check_scale(options.gold_scale, "--gold-scale")
    if options.epochs <= 0:
        raise UserError(f"--epochs {options.epochs} must be above 0")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps} must be at least 1")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align train-judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("judge").add_argument
    add("--stage", choices=["sft", "grpo"], required=True)
    add("--input", nargs="+", default=[], metavar="FILE", help="responses or pairs to learn from")
    add("--gold", nargs="+", default=[], metavar="FILE", help="verdicts on them, of a gold judge")
    add("--gold-scale", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="Scale of gold's scores, which are mapped to the labels 0 to 9. Default: 0 9.")
    add("--validation-input", nargs="+", default=[], metavar="FILE", help="held-out items")
    add("--validation-gold", nargs="+", default=[], metavar="FILE", help="verdicts on them")
    add = parser.add_argument_group("stage sft").add_argument
    add("--epochs", type=float, default=2.0, metavar="N", help="(%(default)s)")
    add("--max-thinking-tokens", type=int, metavar="N",
        help="leave longer answers of gold out: a judge of less effort")
    add = parser.add_argument_group("stage grpo").add_argument
    add("--steps", type=int, metavar="N", help="(sft: by --epochs)")
    add("--temperature", type=float, default=1.0, help="of answers in training (%(default)s)")
    # fmt: on
    add_form_flags(parser)
    add_answer_flags(parser)
    flags.add_reinforcement_flags(parser)
    flags.add_engine_flags(parser)
    flags.add_training_flags(parser, lr=1e-5, batch_size=128)
    return parser
