"""Command `et-align annotate`; its help is in `annotate_config`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from alignment.commands.annotate_config import AnnotateConfig, Orders, parse
from alignment.commands.annotation_judge_config import AnnotationJudgeConfig
from alignment.commands.config_groups import OutputConfig
from alignment.data.read_options import ReadOptions
from alignment.judges.kinds.command_settings import AnnotationSettings, CostSettings, JudgeFlags
from alignment.judges.kinds.registry import judge_from_flag
from alignment.judges.questions import Item, make_questions
from alignment.output_file import OutputFile
from alignment.record_files import read_all
from alignment.records import Pair, Prompt, Response


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: AnnotateConfig) -> int:
    """Annotate the input; return the exit status, which is not 0 after a signal.

    Raises:
        UserError: A flag or a file cannot be used; answers that arrived are stored.
        TooFewResults: More questions have no result than --max-failed allows.
    """
    return annotate(
        config.files,
        config.judge,
        config.orders,
        config.generate,
        config.rubrics,
        config.dry_run,
        options=config.rows.options,
    )


def annotate(
    files: OutputConfig,
    judge: AnnotationJudgeConfig,
    orders: Orders = "both",
    generate: bool = False,
    rubrics: bool = False,
    dry_run: bool = False,
    counted: Sequence[Path] = (),
    options: ReadOptions | None = None,
) -> int:
    """Ask a judge about the records of a file; return the exit status.

    Args:
        files: Input and output.
        judge: Flags of the judge.
        orders: Orders in which the responses of a pair are shown.
        generate: Whether to answer prompts instead of judging.
        rubrics: Whether to write rubrics instead of judging.
        dry_run: Whether to print the estimate of the cost alone.
        counted: Further files of answers whose cost counts against --max-cost.
        options: How an input of another project is read.

    Raises:
        UserError: A flag or a file cannot be used; answers that arrived are stored.
        TooFewResults: More questions have no result than --max-failed allows.
        BudgetSpent: --max-cost allows no further call; answers that arrived are stored.
    """
    items = read_items(Path(files.input), generate or rubrics, options)
    output = OutputFile(
        Path(files.output), Path(files.input), files.overwrite,
        orders=orders, samples=judge.samples,
    )  # fmt: skip
    flags = JudgeFlags(**{field.name: getattr(judge, field.name) for field in fields(JudgeFlags)})
    cost = {field.name: getattr(judge, field.name) for field in fields(CostSettings)}
    settings = AnnotationSettings(
        "rubrics" if rubrics else "generate" if generate else "judge",
        judge.max_failed,
        judge.cache,
        dry_run,
        counted,
        CostSettings(**cost),
    )
    questions = list(make_questions(items, orders, judge.samples))
    return judge_from_flag(judge.judge, flags).annotate(questions, output, settings)


def read_items(path: Path, prompts: bool, options: ReadOptions | None = None) -> list[Item]:
    """Return the responses or pairs of a file, or its prompts.

    Raises:
        UserError: The file contains other records.
    """
    kinds = (Prompt,) if prompts else (Response, Pair)
    items: list[Item] = read_all(path, *kinds, options=options)
    return items
