"""Let a judge whose model is at hand give verdicts, on the ranks of this command.

    et-align judge --model RUN/best --input ITEMS.jsonl --output VERDICTS.jsonl [--thinking asked]

A judge that does not think gives the expectation over its labels; one that does thinks, and the
expectation is read where it puts its label. Under torchrun the ranks hold the model by the flags of
training. For a judge behind an address there is `et-align annotate`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from alignment.commands import training_flags as flags
from alignment.commands.judge_format_flags import (
    add_answer_flags,
    add_form_flags,
    form_of,
    judge_of,
)
from alignment.judges.questions import Judgeable, make_questions
from alignment.judges.results import reasons_of, require_results
from alignment.output_file import OutputFile, format_outcomes
from alignment.ranks import map_over_data_ranks
from alignment.record_files import read_all
from alignment.records import Pair, Response
from megatron_ext.errors import ToolParser, UserError
from megatron_ext.progress import Progress
from megatron_ext.recipes import expand_recipes


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    items: list[Judgeable] = read_all(Path(options.input), Response, Pair)
    asked = list(make_questions(items, options.orders, options.samples))
    judge_format = form_of(options, isinstance(items[0], Pair))
    judge_format.label_tokens  # noqa: B018  (fails before anything is loaded)
    engine = flags.engine_of(options, 0)
    judge = judge_of(options, engine, judge_format)
    output = OutputFile(
        Path(options.output), Path(options.input), options.overwrite,
        orders=options.orders, samples=options.samples,
    )  # fmt: skip
    output.check_or_create(
        judge.identity
    )  # on all ranks, of which none then waits for one that refuses
    rows, at_once = [], options.rows * engine.data_size
    with Progress("judging", len(asked), "questions") as progress:
        for begin in range(0, len(asked), at_once):
            rows += map_over_data_ranks(engine, asked[begin : begin + at_once], judge.judge)
            if dist.get_rank() == 0:
                progress.update(len(rows))
    if dist.get_rank() == 0:
        output.write(rows, {"judge": {"model": options.model, "thinking": options.thinking}})
        print(f"{format_outcomes(rows)}; wrote {options.output}", file=sys.stdout)
    dist.barrier()  # rank 0 has written before any rank ends the command
    require_results(reasons_of(rows), len(rows), options.max_failed)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(
        prog="et-align judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument_group("what is asked").add_argument
    add("--input", required=True, metavar="FILE", help="responses or pairs")
    add("--output", required=True, metavar="FILE", help="verdicts to write")
    add("--overwrite", action="store_true", help="replace an --output that was made otherwise")
    add("--orders", choices=["both", "given", "swapped"], default="both",
        help="in which the responses of a pair are shown (%(default)s)")
    add("--samples", type=int, default=1, metavar="N", help="answers a question (%(default)s)")
    add("--seq-length", type=int, default=4096, metavar="TOKENS",
        help="the most of a question and its answer (%(default)s)")
    add("--max-failed", type=float, default=0.2, metavar="SHARE",
        help="Share of the questions that may end without a verdict, for any reason; more end the "
        "command with status 3. Default: %(default)s.")
    # fmt: on
    add_form_flags(parser)
    add_answer_flags(parser)
    flags.add_engine_flags(parser)
    options = parser.parse_args(expand_recipes(argv, parser))
    flags.check(options)
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"--max-failed {options.max_failed} is a share: from 0 to 1")
    if options.samples < 1 or options.rows < 1:
        raise UserError("--samples and --rows must be at least 1")
    if options.samples > 1 and (options.thinking == "none" or options.judging_temperature == 0):
        raise UserError(f"--samples {options.samples} would give the same verdicts again")
    return options
