"""Teach a model to answer: supervised fine-tuning of a policy on responses.

    torchrun --nproc-per-node 8 -m alignment train-sft --model DIR --run-dir DIR \\
        --input RESPONSES.jsonl --validation-input RESPONSES.jsonl

The loss is on the responses alone. The model of the lowest validation loss is RUN/best, a Hugging
Face folder, from which `train-policy` can start. Stopped or killed, the same command goes on.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands import training_flags as flags
from alignment.data.chat_prompts import example, warn_of_template
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.results import require_usable
from alignment.ranks import all_gather_by_data_rank, all_reduce_max
from alignment.record_files import read_all
from alignment.records import Response
from alignment.training.loop import TrainingSchedule, fit
from alignment.training.sft import SupervisedStep, steps_of
from alignment.training.training_run import TrainingRun
from megatron_ext.errors import ToolParser, UserError
from megatron_ext.recipes import expand_recipes

BEST = "validation/log_prob"  # nats a token, the highest is best


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if options.dry_run is not None:
        from alignment.commands.training_dry_run import dry_run

        dry_run(options)
        return 0
    samples, too_long = _samples(options, options.input, warn=True)
    held_out, left_out = _samples(options, options.validation_input)
    steps = steps_of(len(samples), options.batch_size, options.epochs)
    engine = flags.engine_of(options, steps)
    step = SupervisedStep(engine, samples, options.batch_size, options.seq_length, options.seed)
    with TrainingRun(Path(options.run_dir), engine, _settings(options)) as run:
        if run.writes:
            left = f" ({too_long + left_out:,} too long)" if too_long + left_out else ""
            told = f"{len(samples):,} responses; {len(held_out):,} for validation{left}"
            print(f"{told}; {steps:,} steps", flush=True)
        best = BEST if held_out else None
        plan = TrainingSchedule(steps, options.save_interval, options.eval_interval, best)

        def evaluate(step: int) -> Mapping[str, Any]:
            return {BEST: mean_log_prob(engine, held_out, options.seq_length)}

        stopped = fit(run, plan, step, evaluate if held_out else None)
        if stopped:
            return 128 + stopped
        folder = run.folder / "best"
        # Rank 0 says so for all: another may look when rank 0 has begun to export already.
        if not all_reduce_max(int(run.writes and folder.is_dir())):
            engine.export(folder)
        if run.writes:
            print(f"the best policy is {folder}", flush=True)
    return 0


def mean_log_prob(engine: AlignmentEngine, samples: Sequence[TokenSample], length: int) -> float:
    """Of the trained tokens of all samples, nats; each sample is scored on one share of the ranks.

    Args:
        length: of the rows that samples are packed into.
    """
    batch = TokenBatch.packed(samples[engine.data_rank :: engine.data_size], length)
    scores = engine.log_probs(batch, trained_only=True).log_probs.cpu()
    mine = (float((scores * batch.loss_mask).double().sum()), int(batch.loss_mask.sum()))
    sums, counts = zip(*all_gather_by_data_rank(engine, mine))
    return sum(sums) / sum(counts)


def _samples(
    options: argparse.Namespace, files: Sequence[str], warn: bool = False
) -> tuple[list[TokenSample], int]:
    """Return responses of files as token ids, and how many are too long and left out.

    Args:
        options: the command's flags.
        files: of responses.
        warn: print what is doubtful about the chat template.

    Raises:
        UserError: nothing is left.
        TooFewResults: more than --max-left-out are too long.
    """
    chat_template = Path(options.chat_template) if options.chat_template else None
    tokenizer = load_tokenizer(Path(options.model), chat_template)
    template = flags.template_kwargs(options)
    rows = [row for file in files for row in read_all(Path(file), Response)]
    if warn and rows:
        warn_of_template("train-sft", tokenizer, rows[0].prompt.messages, template)
    made = [example(tokenizer, row.prompt.messages, row.text, **template) for row in rows]
    samples = [TokenSample([*m.prompt, *m.completion], len(m.prompt)) for m in made]
    fits = [sample for sample in samples if len(sample.tokens) <= options.seq_length]
    if rows and not fits:
        raise UserError(
            f"all {len(rows):,} responses of {files[0]} are longer with their prompts than "
            f"--seq-length {options.seq_length}: raise it"
        )
    long = [f"longer than --seq-length {options.seq_length}: raise it"] * (len(rows) - len(fits))
    require_usable(long, len(rows), options.max_left_out, "responses of --input")
    return fits, len(long)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must stay the same when a run goes on."""
    kept = flags.lasting(options)
    for name in ("input", "validation_input"):
        kept[name] = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in kept[name]]
    return kept


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="et-align train-sft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("responses").add_argument
    add("--input", nargs="+", default=[], metavar="FILE", help="responses to learn from")
    add("--validation-input", nargs="+", default=[], metavar="FILE", help="held-out responses")
    add("--epochs", type=float, default=2.0, metavar="N", help="(%(default)s)")
    # fmt: on
    flags.add_engine_flags(parser)
    flags.add_training_flags(parser, lr=1e-5, batch_size=128)
    # Recipes of model sizes are shared with commands that generate, `rows` at a time.
    options = parser.parse_args(expand_recipes(argv, parser, unused=("rows",)))
    flags.check(options)
    if options.dry_run is None and not options.input:
        raise UserError("give --input with responses to learn from")
    if options.epochs <= 0:
        raise UserError(f"--epochs {options.epochs} must be above 0")
    return options
