"""Ask a judge about responses or pairs, or a policy about prompts, and keep every answer.

    et-align annotate --input FILE --output FILE --judge http://HOST:PORT/v1 --model NAME
    et-align annotate --input FILE --output FILE --judge rule --rule-text FILE
    et-align annotate --input FILE --output FILE --judge function:CHECKS.py:score

Stopped or killed at any moment, the same command resumes where it was. --output is written when all
questions have been asked; until then the answers are in --cache. The exit status is 3 when more of
the questions than --max-failed have no result.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignment.commands.judge_flags import Options, parse
from alignment.judges.endpoint_annotator import ask_endpoint
from alignment.judges.kinds.function_judge import FunctionJudge
from alignment.judges.kinds.rule_judge import RULES, Fluency, RuleJudge
from alignment.judges.questions import Item, Question, questions
from alignment.judges.results import reasons_of, require_results
from alignment.output_file import Output, outcomes
from alignment.record_files import read_all
from alignment.records import Pair, Prompt, Response
from megatron_ext.errors import UserError, run_tool
from megatron_ext.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    return annotate(parse(argv, __doc__))


def annotate(options: Options) -> int:
    """Do what the flags say; returns the exit code, which is not 0 after a signal.

    Raises:
        UserError: naming the flag or the file; answers that came are kept.
        TooFewResults: more questions have no result than --max-failed allows.
    """
    items = read_items(Path(options.input), options.generate or options.rubrics)
    asked = list(questions(items, options.orders, options.samples))
    output = Output(
        Path(options.output), Path(options.input), options.overwrite,
        orders=options.orders, samples=options.samples,
    )  # fmt: skip
    if options.judge.startswith("function:"):
        name, scale = options.judge.partition(":")[2], options.scale
        told = {"function": options.judge} | ({"scale": scale} if scale else {})
        with closing(FunctionJudge(name, scale, options.timeout)) as function:
            _ask_program(function, asked, output, told, options.max_failed)
        return 0
    if options.judge.startswith("rule"):
        judge = rule_judge(options.judge, options.rule_text)
        told = {"rule": judge.rule.name, "weights": dict(judge.rule.weights)}
        _ask_program(judge, asked, output, told, options.max_failed)
        return 0
    return ask_endpoint(options, asked, output)


def read_items(path: Path, prompts: bool) -> list[Item]:
    """What is to be judged; or prompts, to be answered or given rubrics.

    Raises:
        UserError: the file holds something else.
    """
    items: list[Item] = read_all(path, Prompt) if prompts else read_all(path, Response, Pair)
    return items


def _ask_program(
    judge: RuleJudge | FunctionJudge,
    asked: Sequence[Question],
    output: Output,
    told: Mapping[str, Any],
    max_failed: float,
) -> None:
    output.claim(judge.identity)
    rows = []
    with Progress("judging", len(asked), "items") as progress:
        for done, question in enumerate(asked, start=1):
            assert not isinstance(question.item, Prompt)
            verdict = judge.verdict(question.item, question.swapped, question.sample)
            rows.append(verdict)
            progress.update(done)
    output.write(rows, {"judge": told})
    print(f"{outcomes(rows)}; wrote {output.path}")
    require_results(reasons_of(rows), len(rows), max_failed)


def rule_judge(name: str, file: str | None) -> RuleJudge:
    """The judge that `rule` or `rule:NAME` names, to which the texts of a file are fluent.

    Raises:
        UserError: there is no such rule, or no text.
    """
    rule = RULES.get(name.partition(":")[2] or "gold")
    if rule is None:
        raise UserError(f"--judge {name}: there is no such rule, only {', '.join(RULES)}")
    if file is None:
        raise UserError("--judge rule measures fluency: give text to compare with as --rule-text")
    from megatron_ext.data.shards import expand_inputs

    paths = expand_inputs([file], "--rule-text")
    states = [(path, os.stat(path)) for path in paths]
    return RuleJudge(rule, _fluency(tuple((p, s.st_size, s.st_mtime_ns) for p, s in states)))


@lru_cache(maxsize=4)  # a fit takes seconds, and rules share a text
def _fluency(files: tuple[tuple[str, int, int], ...]) -> Fluency:
    """Of texts by their paths, sizes and times of change."""
    return Fluency.fit(_texts([path for path, *_ in files]))


def _texts(files: list[str]) -> Iterable[str]:
    """The documents of files; the lines of plain text."""
    from megatron_ext.data.documents import MalformedRecord, ShardReader
    from megatron_ext.data.shards import TextFormat, plan_shards

    layout = TextFormat(separator="\n")
    for shard in plan_shards(files, layout, 1 << 40):
        for text in ShardReader(shard, layout):
            if not isinstance(text, MalformedRecord):
                yield text


if __name__ == "__main__":
    run_tool(main)
