"""Ask a judge about responses or pairs, or a policy about prompts, and keep every answer.

    et-align annotate --input FILE --output FILE --judge http://HOST:PORT/v1 --model NAME
    et-align annotate --input FILE --output FILE --judge rule --rule-text FILE
    et-align annotate --input FILE --output FILE --judge function:CHECKS.py:score
    et-align annotate --input FILE --output FILE --judge JUDGE.yaml

Stopped or killed at any moment, the same command resumes where it was. --output is written when all
questions have been asked; until then the answers are in --cache. The exit status is 3 when more of
the questions than --max-failed have no result.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from alignment.commands.judge_flags import Options, parse
from alignment.judges.kinds.judge_config import AnnotationSettings, JudgeFlags
from alignment.judges.kinds.registry import judge_from_flag
from alignment.judges.questions import Item, make_questions
from alignment.output_file import OutputFile
from alignment.record_files import read_all
from alignment.records import Pair, Prompt, Response
from megatron_ext.errors import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    return annotate(parse(argv, __doc__))


def annotate(options: Options) -> int:
    """Do what the flags say; returns the exit code, which is not 0 after a signal.

    Raises:
        UserError: naming the flag or the file; answers that came are kept.
        TooFewResults: more questions have no result than --max-failed allows.
    """
    items = read_items(Path(options.input), options.generate or options.rubrics)
    output = OutputFile(
        Path(options.output), Path(options.input), options.overwrite,
        orders=options.orders, samples=options.samples,
    )  # fmt: skip
    flags = JudgeFlags(**{field.name: getattr(options, field.name) for field in fields(JudgeFlags)})
    settings = AnnotationSettings(
        "rubrics" if options.rubrics else "generate" if options.generate else "judge",
        options.max_failed, options.concurrency, options.requests_per_minute,
        options.tokens_per_minute, options.price_in, options.price_out, options.cache,
    )  # fmt: skip
    questions = list(make_questions(items, options.orders, options.samples))
    return judge_from_flag(options.judge, flags).annotate(questions, output, settings)


def read_items(path: Path, prompts: bool) -> list[Item]:
    """What is to be judged; or prompts, to be answered or given rubrics.

    Raises:
        UserError: the file holds something else.
    """
    items: list[Item] = read_all(path, Prompt) if prompts else read_all(path, Response, Pair)
    return items


if __name__ == "__main__":
    run_tool(main)
