"""Report what games a judge in responses, or how good the detectors of it are.

    et-align monitor --input RESPONSES.jsonl [--verdicts VERDICTS.jsonl] [--output FLAGS.jsonl]
    et-align monitor --input RESPONSES.jsonl --judge http://HOST:PORT/v1 --model NAME \\
        --judge-verdicts GAMING.jsonl
    et-align monitor --fixtures [FILE ...] [--folds N]

Prints the share of the responses that make each detector fire, its limit, and an example; with
--fixtures, precision and recall with 95 % intervals.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from alignment.commands import judge_flags
from alignment.commands.annotate import annotate
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.results import commonest
from alignment.monitors.lengths import Lengths
from alignment.monitors.text_features import shown, words_of
from alignment.monitors.training_monitor import CORRELATION, JUDGE, BatchFindings, Limits, Monitor
from alignment.new_output_folder import check_folder
from alignment.record_files import read_all
from alignment.records import Response, Verdict
from megatron_ext.errors import TooFewResults, ToolParser, UserError, run_tool

if TYPE_CHECKING:
    from alignment.monitors.detector_quality import Counts

ALARMED = 3  # exit code of --fail-on-alarm
_GAMING = "pointwise-gaming"  # template of the judge's prompt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.fixtures is not None:
        _measure(options)
        return 0
    limits = Limits.read(options.limits) if options.limits else Limits()
    responses = read_all(Path(options.input), Response)
    usual = None
    if options.usual:
        texts = (response.text for response in read_all(Path(options.usual), Response))
        usual = Lengths.of([len(words_of(text)) for text in texts])
    rewards = _rewards(responses, options.verdicts) if options.verdicts else None
    if options.judge and (status := annotate(_annotation(options))):
        return status
    verdicts = _gaming(responses, options.judge_verdicts) if options.judge_verdicts else None
    findings = Monitor(limits, usual).of_batch(responses, rewards, verdicts)
    print("\n".join(_report(findings, limits)))
    if options.output:
        _write(Path(options.output), responses, findings)
    return ALARMED if options.fail_on_alarm and findings.alarms else 0


def _annotation(options: argparse.Namespace) -> argparse.Namespace:
    """Return the checked options of `et-align annotate` that ask the judge for its verdicts."""
    template = options.template or (None if options.judge.startswith("function:") else _GAMING)
    annotation = argparse.Namespace(
        **{
            **vars(options),
            "output": options.judge_verdicts,
            "template": template,
            "generate": False,
            "rubrics": False,
            "orders": "given",
        }
    )
    judge_flags.check(annotation)
    return annotation


def _gaming(responses: Sequence[Response], file: str) -> list[Verdict | None]:
    """Return the verdict on each response, with the mean score of several samples.

    Raises:
        UserError: the file has preferences, or no score of any of the responses.
    """
    verdicts: dict[str, list[Verdict]] = {}
    for verdict in read_verdicts(Path(file)):
        if verdict.preferred is not None:
            raise UserError(
                f"--judge-verdicts {file} must hold scores of responses, not preferences"
            )
        verdicts.setdefault(verdict.item, []).append(verdict)
    results: list[Verdict | None] = []
    for response in responses:
        samples = verdicts.get(response.id, [])
        judged = [verdict for verdict in samples if verdict.score is not None]
        scores = [verdict.score for verdict in judged if verdict.score is not None]
        results.append(replace(judged[0], score=fmean(scores)) if judged else None)
    if not any(results):
        raise UserError(
            f"--judge-verdicts {file} has no score of a response in --input. Give the verdicts on "
            f"these responses, or check why the judge gave no score."
        )
    return results


def _rewards(responses: Sequence[Response], file: str) -> list[float | None]:
    """The mean of a response's scores; None where it has none."""
    scores: dict[str, list[float]] = {}
    verdicts = read_all(Path(file), Verdict)
    for verdict in verdicts:
        if verdict.preferred is not None:
            raise UserError(f"--verdicts {file} must hold scores of responses, not preferences")
        if verdict.score is not None:
            scores.setdefault(verdict.item, []).append(verdict.score)
    ids = {response.id for response in responses}
    reasons = [v.reason for v in verdicts if v.item in ids]
    if reasons and all(reasons):
        raise TooFewResults(
            f"--verdicts {file} has no score of a response in --input: all {len(reasons):,} "
            f"verdicts failed, most often with: {commonest(reasons)}"
        )
    if not scores.keys() & ids:
        raise UserError(f"--verdicts {file} has no score of a response in --input: give theirs")
    of_each = (scores.get(response.id) for response in responses)
    return [sum(found) / len(found) if found else None for found in of_each]


def _report(findings: BatchFindings, limits: Limits) -> list[str]:
    words = ", ".join(f"{name} {value:.0f}" for name, value in findings.words.items())
    lines = [
        f"{len(findings.flags):,} responses; words: {words}",
        f"{'':26}{'share':>8}{'limit':>8}",
    ]
    for name, share in findings.shares.items():
        limit, examples = limits[name], findings.examples[name]
        limit_text = "-" if limit is None else f"{limit:.1%}"
        alarm = "ALARM" if name in findings.alarms else ""
        example = f"{examples[0].id}: {shown(examples[0].evidence[0])}" if examples else ""
        line = f"{name:26}{share:>8.1%}{limit_text:>8}  {alarm:5}  {example}"
        lines.append(line.rstrip())
    limit, value = limits[CORRELATION], findings.correlation
    figures = ["-" if x is None else f"{x:.2f}" for x in (value, limit)]
    alarm = "ALARM" if CORRELATION in findings.alarms else ""
    lines.append(f"{CORRELATION:26}{figures[0]:>8}{figures[1]:>8}  {alarm}".rstrip())
    if findings.unjudged:
        lines.append(
            f"{findings.unjudged:,} responses have no verdict of the judge; the share of {JUDGE} "
            f"is of the others"
        )
    return lines


def _write(path: Path, responses: Sequence[Response], findings: BatchFindings) -> None:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for response, flags in zip(responses, findings.flags):
            row = {"id": response.id, "words": len(words_of(response.text)), "flags": flags}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


def _measure(options: argparse.Namespace) -> None:
    """Print how good the detectors are on fixtures."""
    # Imported here: scikit-learn takes seconds to load.
    from alignment.monitors.detector_quality import PACKAGED, cross_validate, measure, read_fixtures

    packaged = sorted(PACKAGED.glob("*.jsonl"))
    fixtures = list(read_fixtures([Path(file) for file in options.fixtures] or packaged))
    if options.folds:
        counts = cross_validate(fixtures, options.folds, read_fixtures(packaged))
        results = {f"{options.folds} folds": counts}
    else:
        results = measure(fixtures)
    for split, counts in results.items():
        print("\n".join(_quality(split, counts)))


def _quality(split: str, counts: "Mapping[str, Counts]") -> list[str]:
    from alignment.monitors.detector_quality import wilson

    heads = ("recall", "precision", "false positives")
    lines = [f"{split:16}" + "".join(f"{head:>16}{'95 %':>14}" for head in heads)]
    for name, one in counts.items():
        if not (one.recall[1] or one.false_positives[1]):
            continue
        cells = [f"{name:16}"]
        for part, whole in (one.recall, one.precision, one.false_positives):
            interval = wilson(part, whole)
            span = "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
            cells.append(f"{f'{part}/{whole}':>16}{span:>14}")
        lines.append("".join(cells))
    return [*lines, ""]


def _check(options: argparse.Namespace) -> None:
    if (options.fixtures is None) == (options.input is None):
        raise UserError("give responses as --input, or --fixtures to measure the detectors")
    if options.fixtures is not None:
        for name in ("verdicts", "limits", "usual", "output", "fail_on_alarm", "judge",
                     "judge_verdicts"):  # fmt: skip
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is for --input, not for --fixtures")
        if options.folds < 0 or options.folds == 1:
            raise UserError(f"--folds {options.folds} must be 0 or at least 2")
    elif options.folds:
        raise UserError("--folds is for --fixtures, not for --input")
    if options.judge:
        if options.judge.startswith("rule"):
            raise UserError(
                f"--judge {options.judge} judges the quality of text, not whether it games a "
                f"judge. Give the address of a model or function:FILE.py:NAME."
            )
        if not options.judge_verdicts:
            raise UserError(
                "--judge needs --judge-verdicts: the file in which to keep its verdicts"
            )
        _annotation(options)
    if not options.output:
        return
    output = Path(options.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give a file")
    check_folder(output.parent)
    if output.exists() and not options.overwrite:
        raise UserError(f"--output {output} is there already: give --overwrite")


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="et-align monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--input", metavar="FILE", help="Responses to monitor, .jsonl or .parquet.")
    add("--verdicts", metavar="FILE",
        help="Scores of the responses, to correlate with their lengths. Default: none.")
    add("--usual", metavar="FILE",
        help="Responses that are not suspected, such as the start policy's, whose lengths in words "
        "decide which responses are verbose. Default: those of --input.")
    add("--limits", metavar="FILE",
        help="YAML file of the shares, from 0 to 1, above which detectors raise an alarm. "
        "Default: the limits of the detectors.")
    add("--output", metavar="FILE",
        help="File to write, .jsonl: which detectors fire on each response, and on which words. "
        "Default: none.")
    add("--overwrite", action="store_true", help="Replace --output and --judge-verdicts.")
    add("--fail-on-alarm", action="store_true",
        help=f"Exit with status {ALARMED} when there is an alarm.")
    add("--fixtures", nargs="*", metavar="FILE",
        help="Measure the detectors on texts of which it is known what they are. Default: those of "
        "the package.")
    add("--folds", type=int, default=0, metavar="N",
        help="Measure --fixtures by cross-validation over wordings with this many folds; the texts "
        "of the package that are of other wordings are learned from too. Default: 0, no "
        "cross-validation.")
    add("--judge-verdicts", metavar="FILE",
        help="Verdicts of a judge that was asked whether responses game their judge, 0 to 9; "
        "written by --judge. Default: none.")
    # fmt: on
    judge_flags.add_judge(parser, required=False)
    return parser


if __name__ == "__main__":
    run_tool(main)
