"""Command `et-align judge`; its help is in `judge_config`."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from alignment.commands.judge_config import JudgeCommandConfig, parse
from alignment.commands.judge_setup import load_judge_format, make_local_judge
from alignment.commands.training_setup import start_engine
from alignment.judges.questions import Judgeable, make_questions
from alignment.judges.results import reasons_of, require_results
from alignment.output_file import OutputFile, format_outcomes
from alignment.ranks import map_over_data_ranks
from alignment.record_files import read_all
from alignment.records import Pair, Response, Verdict
from megatron_ext.progress import Progress


def main(argv: Sequence[str]) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: JudgeCommandConfig) -> int:
    """Judge the items and write the verdicts; return the exit status.

    Raises:
        UserError: The input, the output or the model cannot be used.
        TooFewResults: More questions have no verdict than --max-failed allows.
    """
    files, model = config.files, config.model.model
    items: list[Judgeable] = read_all(
        Path(files.input), Response, Pair, options=config.rows.options
    )
    todo = list(make_questions(items, config.orders, config.samples))
    judge_format = load_judge_format(config.model, config.format, isinstance(items[0], Pair))
    judge_format.label_tokens  # noqa: B018  (fails before anything is loaded)
    engine = start_engine(model, config.engine)
    judge = make_local_judge(model, config.answers, engine, judge_format, config.seq_length)
    output = OutputFile(
        Path(files.output), Path(files.input), files.overwrite,
        orders=config.orders, samples=config.samples,
    )  # fmt: skip
    # On all ranks, so that none waits for one that refuses.
    output.check_or_create(judge.identity)
    verdicts: list[Verdict] = []
    at_once = config.answers.generation_batch_size * engine.data_size
    with Progress("judging", len(todo), "questions") as progress:
        for begin in range(0, len(todo), at_once):
            verdicts += map_over_data_ranks(engine, todo[begin : begin + at_once], judge.judge)
            if dist.get_rank() == 0:
                progress.update(len(verdicts))
    if dist.get_rank() == 0:
        output.write(verdicts, {"judge": {"model": model, "thinking": config.format.thinking}})
        print(f"Wrote verdicts to {files.output}: {format_outcomes(verdicts)}.")
    dist.barrier()  # rank 0 has written before any rank ends the command
    require_results(reasons_of(verdicts), len(verdicts), config.max_failed)
    return 0
