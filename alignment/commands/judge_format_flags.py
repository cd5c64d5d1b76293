"""Flags of a judge whose model an engine holds: what it is asked, and how it answers."""

import argparse
from pathlib import Path

from alignment.commands import training_flags as flags
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.kinds.local_judge import (
    LocalJudge,
    TokenizedJudgeFormat,
    local_judge_identity,
)
from megatron_ext.inference.sampling import Sampling


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add what it is asked."""
    # fmt: off
    add = parser.add_argument_group("what the judge is asked").add_argument
    add("--template", metavar="NAME", help="of the judge's prompt: pointwise-rubric, "
        "pairwise-rubric or a file (plain)")
    add("--thinking", choices=["none", "asked", "opened"], default="none",
        help="before the label, in <think>; opened: the chat template has begun it (%(default)s)")
    # fmt: on


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add how it answers."""
    # fmt: off
    add = parser.add_argument_group("answers of a judge").add_argument
    add("--max-new-tokens", type=int, default=4096, metavar="N", help="with thinking (%(default)s)")
    add("--rows", type=int, default=64, metavar="N", help="asked at a time on a rank (%(default)s)")
    add("--judging-temperature", type=float, default=0.7,
        help="of thinking; 0 takes the likeliest tokens (%(default)s)")
    add("--judging-top-k", type=int, default=20, help="of thinking (%(default)s)")
    add("--judging-top-p", type=float, default=0.95, help="of thinking (%(default)s)")
    # fmt: on


def form_of(options: argparse.Namespace, pairwise: bool) -> TokenizedJudgeFormat:
    """Return the format of the judge.

    Raises:
        UserError: If the template is of the other kind, or the tokenizer has no chat template.
    """
    judge_format = JudgeFormat.create(pairwise, options.template, options.thinking)
    chat_template = Path(options.chat_template) if options.chat_template else None
    tokenizer = load_tokenizer(Path(options.model), chat_template)
    return TokenizedJudgeFormat.from_format(judge_format, tokenizer, flags.template_kwargs(options))


def judge_of(
    options: argparse.Namespace,
    engine: AlignmentEngine,
    judge_format: TokenizedJudgeFormat,
    identity: str | None = None,
) -> LocalJudge:
    """Return the judge whose model the engine holds.

    Args:
        identity: A hash of everything that verdicts depend on. Default: computed from the files of
            the model.
    """
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.judging_temperature or 1.0,
        greedy=options.judging_temperature == 0,
        top_k=options.judging_top_k,
        top_p=options.judging_top_p,
    )
    if identity is None:
        identity = local_judge_identity(options.model, judge_format, sampling)
    return LocalJudge(engine, judge_format, options.seq_length, sampling, options.rows, identity)
