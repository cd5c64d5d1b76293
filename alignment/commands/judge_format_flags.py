"""Flags of a judge whose model an engine holds: what it is asked, and how it answers."""

import argparse
from functools import cache
from pathlib import Path

from alignment.commands import training_flags as flags
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.formats.parsing import Parser
from alignment.judges.formats.prompts import judge_prompt
from alignment.judges.kinds.local_judge import JudgeForm, LocalJudge
from megatron_ext.errors import UserError
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


def form_of(options: argparse.Namespace, pairwise: bool) -> JudgeForm:
    """How the judge is asked and answers.

    Raises:
        UserError: the template is for something else, or the tokenizer has none of chats.
    """
    kind = "pairwise" if pairwise else "pointwise"
    thinks = options.thinking != "none"
    prompt = judge_prompt(options.template or kind, thinks)
    if prompt.kind != kind:
        holds = "pairs" if pairwise else "responses"
        raise UserError(f"--template {options.template} is {prompt.kind}, not for {holds}")
    chat_template = Path(options.chat_template) if options.chat_template else None
    return JudgeForm(
        prompt,
        Parser(pairwise, thinks, options.thinking == "opened"),
        load_tokenizer(Path(options.model), chat_template),
        flags.template_kwargs(options),
    )


def judge_of(
    options: argparse.Namespace, engine: AlignmentEngine, form: JudgeForm, identity: str
) -> LocalJudge:
    """The engine's model as a judge."""
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.judging_temperature or 1.0,
        greedy=options.judging_temperature == 0,
        top_k=options.judging_top_k,
        top_p=options.judging_top_p,
    )
    return LocalJudge(engine, form, options.seq_length, sampling, options.rows, identity)


def held_identity(options: argparse.Namespace, form: JudgeForm) -> str:
    """A hash of all that a verdict depends on: the model's files, the form, the chat template,
    which may be a file elsewhere, and its sampling."""
    from hashlib import sha256

    digest = sha256(form.identity.encode())
    digest.update(repr(form.tokenizer.chat_template).encode())
    if form.parser.thinks:
        names = ("max_new_tokens", "judging_temperature", "judging_top_k", "judging_top_p")
        digest.update(repr([getattr(options, name) for name in names]).encode())
    digest.update(files_digest(options.model).encode())
    return digest.hexdigest()


def files_digest(model: str) -> str:
    """A hash of a model's weights and settings."""
    files = [
        file
        for file in sorted(Path(model).rglob("*"))
        if file.is_file() and file.suffix in (".safetensors", ".distcp", ".json")
    ]
    stats = [file.stat() for file in files]
    return _digest(tuple((f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats)))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A hash of what is in files. Sizes and times tell those that changed: of a large model the
    answer is wanted more than once."""
    from hashlib import file_digest, sha256

    digest = sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            digest.update(file_digest(stream, "sha256").digest())
    return digest.hexdigest()
