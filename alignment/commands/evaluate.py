"""Compare policies by judges: mean scores, win rates against a baseline, Bradley-Terry strengths.

    et-align evaluate --responses BASE.jsonl A.jsonl B.jsonl --baseline BASE.jsonl --output DIR
        --judge http://HOST:PORT/v1 --model NAME --judge rule --rule-text FILE
    et-align evaluate --responses BASE.jsonl A.jsonl --baseline BASE.jsonl
        --verdicts NAME=FILE NAME=FILE

Flags that follow a --judge are that judge's; flags of judges before the first --judge are every
judge's. What is judged (responses.jsonl, pairs.jsonl), each judge's verdicts and evaluation.json
are in --output. Stopped or killed at any moment, the same command goes on where it was. Without a
judge and without verdicts it writes what is to be judged, for et-align annotate.
"""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignment.commands.annotate import annotate
from alignment.commands.judge_flags import Options, add_judge, check
from alignment.data.source_rows import RecordWriter
from alignment.evaluation.comparisons import Contest, read_contest
from alignment.evaluation.policy_table import (
    preferences_json,
    preferences_table,
    scores_json,
    scores_table,
)
from alignment.evaluation.win_rates import Verdicts, check_items, prefer, score
from alignment.judges.formats.scale import check_scale, read_verdicts
from alignment.judges.results import commonest, reasons_of, require_results
from alignment.new_output_folder import check_folder
from alignment.records import Outcome, Pair, Response, Verdict
from alignment.statistics.bootstrap import LEVEL
from alignment.statistics.verdict_alignment import by_item
from megatron_ext.errors import TooFewResults, ToolParser, UserError, run_tool
from megatron_ext.progress import Progress

SCORES, PREFERENCES = "scores", "preferences"
_ITEMS = {SCORES: "responses.jsonl", PREFERENCES: "pairs.jsonl"}


class Judge(NamedTuple):
    name: str
    options: Options
    kinds: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    judges = _judges(words)
    _check(options, judges)
    contest = read_contest(options.responses, options.baseline, options.common)
    files: dict[tuple[str, str], list[Path]] = {}
    if options.output:
        _write_items(Path(options.output), contest)
    for judge in judges:
        for kind in judge.kinds:
            file = Path(options.output) / f"{_plain(judge.name)}.{kind}.jsonl"
            judge.options.overwrite = options.overwrite
            if code := _ask(judge.options, kind, file):
                return code
            files[judge.name, kind] = [file]
    verdicts = {judge: _read(of, judge[0]) for judge, of in files.items()}
    given = _given(options, verdicts)
    verdicts |= given
    if not verdicts:
        print(
            f"wrote {len(contest.responses):,} responses and {len(contest.pairs):,} pairs to "
            f"{options.output}: annotate them and give the files as --verdicts, or give --judge"
        )
        return 0
    found = _measure(contest, verdicts, options)
    if options.output:
        _write(Path(options.output) / "evaluation.json", contest, found, options)
    max_failed = _shared_flags(words).max_failed
    for (name, kind), of in given.items():
        rows = [verdict for each in of.values() for verdict in each]
        what = f"{kind} of --verdicts {name}=..."
        require_results(reasons_of(rows), len(rows), max_failed, what, "judgement")
    return 0


def _judges(words: Sequence[str]) -> list[Judge]:
    """The judges of a command line, each from the flags that follow its --judge."""
    starts = _starts(words)
    shared = words[: starts[0]] if starts else []
    judges = []
    for start, end in itertools.pairwise([*starts, len(words)]):
        options = _parser().parse_args([*shared, *words[start:end]])
        check(options)
        if options.template and options.ask == "both":
            raise UserError(
                f"--template {options.template} is for scores or for preferences: say which with "
                "--ask, and give the judge twice for both"
            )
        kinds = (SCORES, PREFERENCES) if options.ask == "both" else (options.ask,)
        judges.append(Judge(options.name or options.model or options.judge, options, kinds))
    asked = [(_plain(judge.name), kind) for judge in judges for kind in judge.kinds]
    if repeated := [name for name, kind in asked if asked.count((name, kind)) > 1]:
        raise UserError(f"two judges are called {repeated[0]}: tell them apart with --name")
    return judges


def _starts(words: Sequence[str]) -> list[int]:
    """Where the flags of each judge begin on a command line."""
    return [n for n, word in enumerate(words) if word == "--judge" or word[:8] == "--judge="]


def _shared_flags(words: Sequence[str]) -> Options:
    """The flags before the first judge's."""
    return _parser().parse_args(words[: next(iter(_starts(words)), len(words))])


def _plain(name: str) -> str:
    """As a file may be called."""
    return re.sub(r"[^\w.-]+", "-", name)


def _ask(options: Options, kind: str, file: Path) -> int:
    options.input, options.output = str(file.with_name(_ITEMS[kind])), str(file)
    print(f"{file.stem}:", flush=True)
    return annotate(options)


def _read(files: Sequence[Path], name: str) -> Verdicts:
    return by_item([verdict for file in files for verdict in read_verdicts(file)], name)


def _given(
    options: Options, asked: Mapping[tuple[str, str], object]
) -> dict[tuple[str, str], Verdicts]:
    """The verdicts of --verdicts by judge and kind.

    Raises:
        UserError: a file cannot be used.
        TooFewResults: a file holds no judgement.
    """
    found: dict[tuple[str, str], list[Verdict]] = {}
    for words in options.verdicts:
        judge, _, file = words.partition("=")
        if not judge or not file:
            raise UserError(f"--verdicts {words} must be NAME=FILE")
        rows = read_verdicts(Path(file), options.verdicts_scale, "--verdicts-scale")
        judgements = [row for row in rows if row.judged]
        if not judgements:
            why = commonest(reasons_of(rows))
            raise TooFewResults(f"{file} has no judgement: every verdict in it failed, with {why}")
        kind = SCORES if judgements[0].outcome is Outcome.SCORE else PREFERENCES
        if (judge, kind) in asked:
            raise UserError(f"--verdicts {words}: the judge of that name is asked for {kind}")
        found.setdefault((judge, kind), []).extend(rows)
    return {judge: by_item(rows, judge[0]) for judge, rows in found.items()}


def _write_items(folder: Path, contest: Contest) -> None:
    records: dict[str, Sequence[Response | Pair]] = {
        SCORES: contest.responses, PREFERENCES: contest.pairs,
    }  # fmt: skip
    for kind, rows in records.items():
        with RecordWriter(folder / _ITEMS[kind], overwrite=True) as writer:
            for row in rows:
                writer.write(row)


def _measure(
    contest: Contest, verdicts: Mapping[tuple[str, str], Verdicts], options: Options
) -> dict[str, dict[str, Any]]:
    """Print what each judge's verdicts say; returns it for JSON."""
    found: dict[str, dict[str, Any]] = {}
    with Progress("resampling", len(verdicts) * options.resamples, "resamples") as progress:
        done = itertools.count(1)

        def advance() -> None:
            progress.update(next(done))

        parts = []
        for (name, kind), of in verdicts.items():
            items = contest.responses if kind == SCORES else contest.pairs
            check_items(of, [item.id for item in items], f"{name} ({kind})", options.common)
            settings = (options.resamples, options.resample_seed, advance)
            if kind == SCORES:
                scores = score(contest, of, name, *settings)
                parts.append(scores_table(name, scores, contest.baseline))
                found.setdefault(name, {})[kind] = scores_json(scores)
            else:
                preferences = prefer(contest, of, name, *settings)
                parts.append(preferences_table(name, preferences, contest.baseline))
                found.setdefault(name, {})[kind] = preferences_json(preferences)
    print(f"{len(contest.prompts):,} prompts, baseline {contest.baseline}\n")
    print("\n\n".join(parts))
    return found


def _write(file: Path, contest: Contest, found: Mapping[str, Any], options: Options) -> None:
    content = {
        "baseline": contest.baseline,
        "policies": list(contest.policies),
        "prompts": len(contest.prompts),
        "resamples": options.resamples,
        "level": LEVEL,
        "judges": found,
    }
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(file)
    print(f"\nwrote {file}")


def _check(options: Options, judges: Sequence[Judge]) -> None:
    if options.resamples < 1:
        raise UserError(f"--resamples {options.resamples} must be at least 1")
    if options.verdicts_scale:
        check_scale(options.verdicts_scale, "--verdicts-scale")
    if len(options.responses) < 2:
        raise UserError("--responses needs files of two policies or more, the baseline among them")
    if not options.baseline:
        raise UserError("--baseline is needed: one of the files of --responses")
    if not options.output and (judges or not options.verdicts):
        raise UserError("--output is needed: the folder in which answers are kept")
    if options.output:
        check_folder(options.output)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # words are looked for on the command line as they are
    )
    # fmt: off
    add = parser.add_argument_group("what is compared").add_argument
    add("--responses", nargs="+", default=[], metavar="FILE", help="of a policy each")
    add("--baseline", metavar="FILE", help="the one of them that others are held against")
    add("--verdicts", nargs="+", default=[], metavar="NAME=FILE",
        help="of a judge on these responses, or on the pairs in --output; several of a judge join")
    add("--verdicts-scale", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="Scale of the scores in --verdicts, which are mapped to 0 to 9. Default: 0 9.")
    add("--common", action="store_true",
        help="compare on the prompts that all policies answered and that were judged")
    add("--output", metavar="DIR", help="for what is judged, verdicts and evaluation.json")
    add("--overwrite", action="store_true", help="replace verdicts there that were made otherwise")
    add("--resamples", type=int, default=1000, metavar="N", help="of prompts (%(default)s)")
    add("--resample-seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add = parser.add_argument_group("judges, each from its --judge on").add_argument
    add("--name", metavar="NAME", help="in tables (the model, or the rule)")
    add("--ask", choices=["both", SCORES, PREFERENCES], default="both", help="(%(default)s)")
    # fmt: on
    add_judge(parser, required=False)
    parser.set_defaults(generate=False, rubrics=False, orders="both")
    return parser


if __name__ == "__main__":
    run_tool(main)
