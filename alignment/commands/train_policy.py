"""Train a policy on the rewards of judges, and grade it by a gold judge that has no part in it.

    torchrun --nproc-per-node 8 -m alignment train-policy --model DIR --run-dir DIR --steps 200 \\
        --prompts PROMPTS.jsonl --judge JUDGE.yaml --held-out PROMPTS.jsonl --gold GOLD.yaml

A judge is described by a YAML file; --judge may be repeated, and rewards are then means. Every
--eval-interval steps held-out prompts are answered and graded by the judges (proxy) and by gold. An
alarm is raised when the proxy rises and gold does not. Stopped or killed, the same command goes on,
and no finished response or verdict is lost or used twice.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands import training_flags as flags
from alignment.data.chat_prompts import prompt_ids, warn_of_template
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.kinds.judge_config import Judge, JudgeConfig, JudgeContext
from alignment.judges.kinds.registry import read_judge
from alignment.monitors.training_monitor import Limits, Monitor
from alignment.record_files import read_all
from alignment.records import Prompt
from alignment.rl.algorithms import ALGORITHMS, Algorithm, algorithm_by_name
from alignment.rl.critic import Critic
from alignment.rl.grading import GamingAlarm, Grader
from alignment.rl.judge_rewards import JudgeReward
from alignment.rl.response_monitor import ResponseMonitor, RoutingCheck
from alignment.rl.tasks import PromptTask, RLSettings
from alignment.rl.train import RLComponents, train
from alignment.training.loop import TrainingSchedule
from alignment.training.training_run import TrainingRun
from megatron_ext.errors import ToolParser, UserError
from megatron_ext.hf.end_tokens import end_tokens
from megatron_ext.inference.sampling import Sampling
from megatron_ext.recipes import expand_recipes


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.dry_run is not None:
        from alignment.commands.training_dry_run import dry_run
        from alignment.rl.resident_models import resident_models

        dry_run(options, resident_models(options))
        return 0
    algorithm, limits = _algorithm(options), Limits()
    settings = _settings_of(options, algorithm)
    if options.monitor_limits:
        limits = Limits.read(options.monitor_limits)
    specs = {
        "proxy": [read_judge(file) for file in options.judge],
        "gold": [read_judge(file) for file in options.gold],
        "second_gold": [read_judge(file) for file in options.second_gold],
    }
    prompts = [p for file in options.prompts for p in read_all(Path(file), Prompt)]
    held_out = [p for file in options.held_out for p in read_all(Path(file), Prompt)]
    _check_prompts(prompts, held_out)
    chat_template = Path(options.chat_template) if options.chat_template else None
    tokenizer = load_tokenizer(Path(options.model), chat_template)
    template = flags.template_kwargs(options)
    tasks = [PromptTask(p.id, prompt_ids(tokenizer, p.messages, **template), p) for p in prompts]
    flags.check_room(options, [task.prompt for task in tasks], "prompts of --prompts")
    ids = [prompt_ids(tokenizer, p.messages, **template) for p in held_out]
    flags.check_room(options, ids, "prompts of --held-out")
    if prompts:
        warn_of_template("train-policy", tokenizer, prompts[0].messages, template)

    held: dict[str, AlignmentEngine] = {}

    def load(model: str) -> AlignmentEngine:
        if model not in held:
            held[model] = flags.engine_of(_with(options, model=model), 0)
        return held[model]

    engine = flags.engine_of(options, flags.updates_of(options))
    seen = {token for task in tasks for token in task.prompt} | end_tokens(tokenizer)
    critic = flags.critic_of(options, seen)
    judges: dict[str, list[Judge]] = {
        name: [
            spec.open(
                JudgeContext(
                    options.reward == "pairwise" and name == "proxy",
                    Path(options.run_dir) / "verdicts",
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
    if options.reference or algorithm.uses_reference:
        start = load(options.model)

        def reference(batch: TokenBatch, temperature: float) -> Any:
            scores = start.log_probs(batch, temperature=temperature, trained_only=True)
            return scores.log_probs

    return _learn(
        options, engine, critic, tokenizer, template, tasks, held_out, settings, limits, judges,
        specs, reference,
    )  # fmt: skip


def _learn(
    options: argparse.Namespace,
    engine: AlignmentEngine,
    critic: Critic | None,
    tokenizer: Any,
    template: Mapping[str, Any],
    tasks: Sequence[PromptTask],
    held_out: Sequence[Prompt],
    settings: RLSettings,
    limits: Limits,
    judges: Mapping[str, Sequence[Judge]],
    specs: Mapping[str, Sequence[JudgeConfig]],
    reference: Any,
) -> int:
    beside = {"critic": critic.engine} if critic else {}
    with TrainingRun(Path(options.run_dir), engine, _settings(options), beside) as run:
        run.note(
            policy=options.model,
            algorithm=options.algorithm,
            seed=options.seed,
            judge=_told(specs["proxy"], judges["proxy"]),
            gold=_told(specs["gold"], judges["gold"]),
            second_gold=_told(specs["second_gold"], judges.get("second_gold", [])),
        )
        monitor = ResponseMonitor(
            run,
            Monitor(limits),
            routing=RoutingCheck(
                interval=options.routing_interval,
                responses=options.routing_samples,
                seq_length=settings.seq_length,
                temperature=settings.sampling.temperature,
            ),
            keep_responses=options.keep_responses,
        )
        grader = Grader(
            engine, tokenizer, held_out, settings.sampling,
            judges, run.folder, template=template, reference=reference, length=options.seq_length,
            rows=options.rows, monitor=monitor,
            alarm=GamingAlarm(options.alarm_gap, options.alarm_window),
            check=run.check_signals, writes=run.writes, pairwise=options.reward == "pairwise",
            max_failed=options.max_unrewarded,
        )  # fmt: skip

        run.at_resume(grader.recall)

        def stop_when(row: Mapping[str, Any]) -> str | None:
            if run.writes and (sentence := grader.alarm.sentence(grader.history)):
                print(sentence, flush=True)
            if options.stop_on_alarm and row["grade/alarm"]:
                return (
                    f"the judges' score has left gold's by {row['grade/gap']:.2f} while gold did "
                    "not rise: the policy games its judge (--stop-on-alarm)"
                )
            return None

        rl = RLComponents(
            run=run, engine=engine, tasks=tasks,
            reward=JudgeReward(judges["proxy"], tokenizer, options.reward == "pairwise"),
            settings=settings, seed=options.seed, reference=reference, critic=critic,
            monitor=monitor,
            **flags.rollouts_of(options, engine, end_tokens(tokenizer), run.check_signals),
        )  # fmt: skip
        if run.writes:
            if same := shared_with_gold(specs):
                print(f"train-policy: warning: {same}", file=sys.stderr, flush=True)
            left = f", {rl.prompts.too_long:,} too long" if rl.prompts.too_long else ""
            print(
                f"{len(rl.prompts.tasks):,} prompts{left}; {len(grader.asked):,} held out; "
                f"{options.steps:,} steps",
                flush=True,
            )
        plan = TrainingSchedule(
            options.steps, options.save_interval, options.eval_interval, stop_when=stop_when
        )
        stopped = train(rl, plan, grader)
        if stopped:
            return 128 + stopped
        engine.export(run.folder / "final")
        if run.writes:
            print(f"the policy is {run.folder / 'final'}", flush=True)
    return 0


def shared_with_gold(specs: Mapping[str, Sequence[JudgeConfig]]) -> str | None:
    """What to say where a judge of the rewards grades too, and nothing is left to tell by."""
    rewarding = {spec.fingerprint for spec in specs["proxy"]}
    for name in ("gold", "second_gold"):
        if rewarding & {spec.fingerprint for spec in specs[name]}:
            return (
                f"--{name.replace('_', '-')} is a judge that --judge has too: gold must stay "
                "outside of the training, or no gap can show that the policy games its judge"
            )
    return None


def _told(specs: Sequence[JudgeConfig], judges: Sequence[Judge]) -> dict[str, Any] | None:
    """Who judges, for run.json."""
    if not specs:
        return None
    each = [spec.summary() | {"identity": j.identity} for spec, j in zip(specs, judges)]
    if len(each) == 1:
        return {**each[0], "agreement": specs[0].read_agreement()}
    # The agreement of one of them is not that of their mean, which nobody has measured.
    return {"name": " + ".join(e["name"] for e in each), "agreement": None, "ensemble": each}


def _settings_of(options: argparse.Namespace, algorithm: Algorithm) -> RLSettings:
    return RLSettings(
        algorithm=algorithm,
        groups=flags.groups_of(options),
        group_size=options.group_size,
        mini_batches=options.mini_batches,
        seq_length=options.seq_length,
        sampling=Sampling(
            options.max_new_tokens, options.temperature, options.top_k, options.top_p
        ),
        generation_batch_size=options.rows,
        overlong_margin=options.overlong_margin,
        max_unrewarded=options.max_unrewarded,
    )


def _algorithm(options: argparse.Namespace) -> Algorithm:
    """As named, with the divergence asked for."""
    return algorithm_by_name(
        options.algorithm,
        kl=options.kl,
        divergence=options.kl_estimator,
        **flags.rollout_weights(options),
        max_tokens=options.max_new_tokens,
    )


def _check_prompts(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    for flag, rows in (("--prompts", prompts), ("--held-out", held_out)):
        seen: set[str] = set()
        for prompt in rows:
            if prompt.id in seen:
                raise UserError(f"{flag} has the id {prompt.id!r} twice: take one of its rows out")
            seen.add(prompt.id)
    if shared := {prompt.id for prompt in prompts} & seen:
        raise UserError(
            f"--held-out has the prompt {min(shared)!r}, which is in --prompts too: split them "
            "with et-align data split"
        )


def _with(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must stay the same when a run goes on."""
    kept = flags.lasting(options)
    for name in ("prompts", "held_out"):
        kept[name] = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in kept[name]]
    for name in ("judge", "gold", "second_gold"):
        kept[name] = [read_judge(file).resume_settings() for file in kept[name]]
    return kept


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the flags.

    Raises:
        UserError: naming the flag.
    """
    parser = _parser()
    options = parser.parse_args(expand_recipes(argv, parser))
    flags.check(options)
    if options.dry_run is None:
        for name in ("prompts", "judge", "held_out", "gold"):
            if not getattr(options, name):
                raise UserError(f"give --{name.replace('_', '-')} (see --help)")
    flags.groups_of(options)
    if options.steps < 1 or options.rows < 1 or options.alarm_window < 1:
        raise UserError("--steps, --rows and --alarm-window must be at least 1")
    if options.routing_interval < 0 or options.routing_samples < 1:
        raise UserError("--routing-interval must not be negative, --routing-samples at least 1")
    if options.reward == "pairwise" and options.group_size < 2:
        raise UserError("--reward pairwise compares responses: give --group-size of at least 2")
    if options.keep_responses < 0 or not (options.alarm_gap or 0) >= 0:  # nor no number
        raise UserError("--keep-responses and --alarm-gap must not be negative")
    if ALGORITHMS[options.algorithm].overlong and not (
        0 < options.overlong_margin <= options.max_new_tokens
    ):
        raise UserError(
            f"--overlong-margin {options.overlong_margin} must be above 0 and at most "
            f"--max-new-tokens {options.max_new_tokens}"
        )
    if not 0 <= options.max_unrewarded <= 1:
        raise UserError(f"--max-unrewarded {options.max_unrewarded} is a share: from 0 to 1")
    if options.alarm_gap is None:
        options.alarm_gap = 0.1 if options.reward == "pairwise" else 0.5
    if options.kl < 0:
        raise UserError(f"--kl {options.kl} must not be negative")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align train-policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("policy and judges").add_argument
    add("--prompts", nargs="+", default=[], metavar="FILE", help="to learn from")
    add("--judge", action="append", default=[], metavar="FILE.yaml",
        help="whose scores are rewards")
    add("--reward", choices=["pointwise", "pairwise"], default="pointwise",
        help="the score, or the win rate against the others of the group in both orders")
    add("--held-out", nargs="+", default=[], metavar="FILE", help="prompts for grading")
    add("--gold", action="append", default=[], metavar="FILE.yaml", help="grades, and no more")
    add("--second-gold", action="append", default=[], metavar="FILE.yaml",
        help="of another kind, to see when gold itself is gamed")
    add("--alarm-gap", type=float, metavar="SCORE",
        help="that proxy minus gold may rise above its beginning (0.5; of win rates 0.1)")
    add("--alarm-window", type=int, default=3, metavar="N",
        help="gradings in which gold does not rise while the proxy does (%(default)s)")
    add("--stop-on-alarm", action="store_true")
    add = parser.add_argument_group("learning").add_argument
    add("--steps", type=int, required=True, metavar="N")
    add("--kl", type=float, default=0.0, metavar="WEIGHT",
        help="of the divergence from the start policy in the loss (%(default)s)")
    add("--kl-estimator", choices=["k2", "k3"], default="k3")
    add("--overlong-margin", type=int, default=1, metavar="TOKENS", help="of dapo (%(default)s)")
    add("--max-unrewarded", type=float, default=0.2, metavar="SHARE",
        help="of a step's responses without a judgement; more end the run (%(default)s)")
    add("--keep-responses", type=int, default=0, metavar="N",
        help="of each step, in RUN/responses, to train the judge again on (%(default)s)")
    add("--monitor-limits", metavar="FILE.yaml",
        help="above which share of a step's responses a monitor raises an alarm (see docs)")
    add("--routing-interval", type=int, default=50, metavar="STEPS",
        help="compare how rollouts and training route, of models with experts; 0: never "
        "(%(default)s)")
    add("--routing-samples", type=int, default=8, metavar="N",
        help="responses that are compared, on all ranks (%(default)s)")
    add("--no-reference", dest="reference", action="store_false",
        help="do not hold the start policy to measure the divergence from it")
    add = parser.add_argument_group("responses").add_argument
    add("--max-new-tokens", type=int, default=2048, metavar="N", help="(%(default)s)")
    add("--temperature", type=float, default=0.7, help="(%(default)s)")
    add("--top-k", type=int, default=0, help="(%(default)s)")
    add("--top-p", type=float, default=1.0, help="(%(default)s)")
    add("--rows", type=int, default=64, metavar="N", help="at a time on a rank (%(default)s)")
    # fmt: on
    flags.add_reinforcement_flags(parser)
    flags.add_engine_flags(parser)
    flags.add_training_flags(parser, lr=1e-6, batch_size=1024)
    return parser
