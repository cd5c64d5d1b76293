"""Command `et-align train-sft`; its help is in `train_sft_config`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands.train_sft_config import TrainSFTConfig, parse
from alignment.commands.training_dry_run import dry_run
from alignment.commands.training_setup import start_engine, transform_records
from alignment.data.chat_prompts import example, warn_of_template
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.results import require_usable
from alignment.ranks import all_gather_by_data_rank, all_reduce_max
from alignment.record_files import read_files
from alignment.records import Response
from alignment.training.loop import TrainingSchedule, fit
from alignment.training.run_settings import lasting_settings
from alignment.training.sft import SupervisedStep, steps_of
from alignment.training.training_run import TrainingRun
from megatron_ext.console import console
from megatron_ext.errors import UserError

BEST = "validation/log_prob"  # nats per token; the highest is best


def main(argv: Sequence[str]) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: TrainSFTConfig) -> int:
    """Train the model and export the best one; return the exit status.

    Raises:
        UserError: The data or the model cannot be used.
    """
    if config.run.dry_run is not None:
        dry_run(config, config.run.dry_run)
        return 0
    samples, too_long = _read_samples(config, config.input, warn=True)
    validation, left_out = _read_samples(config, config.validation_input)
    steps = steps_of(len(samples), config.batch.batch_size, config.epochs)
    engine = start_engine(config.model.model, config.engine, config.optimization, steps)
    step = SupervisedStep(
        engine, samples, config.batch.batch_size, config.batch.seq_length, config.run.seed
    )
    settings = lasting_settings(config, files=("input", "validation_input"))
    with TrainingRun(
        Path(config.run.run_dir), engine, settings, trackers=config.run.trackers
    ) as training:
        if training.writes:
            left = f" ({too_long + left_out:,} too long)" if too_long + left_out else ""
            data = f"{len(samples):,} responses; {len(validation):,} for validation{left}"
            console.line(f"{'Data':9}{data}; {steps:,} steps")
        best = BEST if validation else None
        plan = TrainingSchedule(
            steps,
            config.run.save_interval,
            config.run.eval_interval,
            best,
            report_every=config.run.log_interval or 10,
        )

        def evaluate(step: int) -> Mapping[str, Any]:
            return {BEST: mean_log_prob(engine, validation, config.batch.seq_length)}

        stopped = fit(training, plan, step, evaluate if validation else None)
        if stopped:
            return 128 + stopped
        folder = training.folder / "best"
        # Rank 0 decides for all: another rank may look after rank 0 has begun to export.
        if not all_reduce_max(int(training.writes and folder.is_dir())):
            engine.export(folder)
        if training.writes:
            console.line(f"The best policy is {folder}.")
    return 0


def mean_log_prob(engine: AlignmentEngine, samples: Sequence[TokenSample], length: int) -> float:
    """Return the mean log-probability of the trained tokens of all samples, in nats.

    Args:
        engine: Engine of the model.
        samples: Samples, the same on every rank; each is scored by one share of the ranks.
        length: Length in tokens of the rows into which samples are packed.
    """
    batch = TokenBatch.packed(samples[engine.data_rank :: engine.data_size], length)
    scores = engine.log_probs(batch, trained_only=True).log_probs.cpu()
    own = (float((scores * batch.loss_mask).double().sum()), int(batch.loss_mask.sum()))
    sums, counts = zip(*all_gather_by_data_rank(engine, own))
    return sum(sums) / sum(counts)


def _read_samples(
    config: TrainSFTConfig, files: Sequence[str], warn: bool = False
) -> tuple[list[TokenSample], int]:
    """Return the responses of files as token ids, and the number that is left out as too long.

    Args:
        config: Flags of the command.
        files: Files of responses.
        warn: Whether to print what is doubtful about the chat template.

    Raises:
        UserError: All responses are too long.
        TooFewResults: More than --max-left-out are too long.
    """
    tokenizer = load_tokenizer(config.model.model_folder, config.model.chat_template_file)
    template, length = config.model.template_variables, config.batch.seq_length
    rows = read_files(files, Response, options=config.rows.options) if files else []
    rows = transform_records(rows, config.data_transform)
    if warn and rows:
        warn_of_template("train-sft", tokenizer, rows[0].prompt.messages, template)
    examples = [example(tokenizer, row.prompt.messages, row.text, **template) for row in rows]
    samples = [TokenSample([*e.prompt, *e.completion], len(e.prompt)) for e in examples]
    fitting = [sample for sample in samples if len(sample.tokens) <= length]
    if rows and not fitting:
        raise UserError(
            f"All {len(rows):,} responses of {files[0]} are longer with their prompts than "
            f"--seq-length {length}. Raise it."
        )
    too_long = len(rows) - len(fitting)
    reasons = [f"longer than --seq-length {length}: raise it"] * too_long
    require_usable(reasons, len(rows), config.batch.max_left_out, "responses of --input")
    return fitting, too_long
