"""Tell what games a judge in responses, or how good the detectors of it are.

    et-align monitor --input RESPONSES.jsonl [--verdicts VERDICTS.jsonl] [--output FLAGS.jsonl]
    et-align monitor --fixtures [FILE ...]

Prints the share of the responses that make each detector fire, its limit, and an example; with
--fixtures, precision and recall with 95 % intervals.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignment.judges.agreement.output import check_folder
from alignment.judges.results import commonest
from alignment.judges.rows import read_all
from alignment.monitors.batch import CORRELATION, BatchFindings, Limits, Monitor
from alignment.monitors.detectors import NAMES
from alignment.monitors.lengths import Lengths
from alignment.monitors.measuring import PACKAGED, Counts, measure, read_fixtures, wilson
from alignment.monitors.reading import shown, words_of
from alignment.records import Response, Verdict
from megatron_ext.errors import TooFewResults, ToolParser, UserError, run_tool

ALARMED = 3  # exit code of --fail-on-alarm


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    _check(options)
    if options.fixtures is not None:
        files = [Path(file) for file in options.fixtures] or sorted(PACKAGED.glob("*.jsonl"))
        for split, counts in measure(read_fixtures(files)).items():
            print("\n".join(_quality(split, counts)))
        return 0
    limits = Limits.read(options.limits) if options.limits else Limits()
    responses = read_all(Path(options.input), Response)
    usual = None
    if options.usual:
        texts = (response.text for response in read_all(Path(options.usual), Response))
        usual = Lengths.of([len(words_of(text)) for text in texts])
    rewards = _rewards(responses, options.verdicts) if options.verdicts else None
    found = Monitor(limits, usual).of_batch(responses, rewards)
    print("\n".join(_report(found, limits)))
    if options.output:
        _write(Path(options.output), responses, found)
    return ALARMED if options.fail_on_alarm and found.alarms else 0


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


def _report(found: BatchFindings, limits: Limits) -> list[str]:
    words = ", ".join(f"{name} {value:.0f}" for name, value in found.words.items())
    lines = [
        f"{len(found.flags):,} responses; words: {words}",
        f"{'':26}{'share':>8}{'limit':>8}",
    ]
    for name in NAMES:
        limit, examples = getattr(limits, name), found.examples[name]
        told = "-" if limit is None else f"{limit:.1%}"
        alarm = "ALARM" if name in found.alarms else ""
        example = f"{examples[0].id}: {shown(examples[0].evidence[0])}" if examples else ""
        line = f"{name:26}{found.shares[name]:>8.1%}{told:>8}  {alarm:5}  {example}"
        lines.append(line.rstrip())
    limit, value = limits.reward_length_correlation, found.correlation
    figures = ["-" if x is None else f"{x:.2f}" for x in (value, limit)]
    alarm = "ALARM" if CORRELATION in found.alarms else ""
    lines.append(f"{CORRELATION:26}{figures[0]:>8}{figures[1]:>8}  {alarm}".rstrip())
    return lines


def _write(path: Path, responses: Sequence[Response], found: BatchFindings) -> None:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for response, flags in zip(responses, found.flags):
            row = {"id": response.id, "words": len(words_of(response.text)), "flags": flags}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


def _quality(split: str, counts: Mapping[str, Counts]) -> list[str]:
    lines = [f"{split:16}{'recall':>10}{'95 %':>16}{'precision':>12}{'95 %':>16}{'fired on':>15}"]
    for name, of_one in counts.items():
        if not (of_one.recall[1] or of_one.false or of_one.quiet):
            continue
        cells = [f"{name:16}"]
        for width, (part, whole) in ((10, of_one.recall), (12, of_one.precision)):
            interval = wilson(part, whole)
            span = "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
            cells.append(f"{f'{part}/{whole}':>{width}}{span:>16}")
        alike = of_one.false + of_one.quiet
        cells.append(f"{f'{of_one.false}/{alike} alike':>15}")
        lines.append("".join(cells))
    return [*lines, ""]


def _check(options: argparse.Namespace) -> None:
    if (options.fixtures is None) == (options.input is None):
        raise UserError("give responses as --input, or --fixtures to measure the detectors")
    if options.fixtures is not None:
        for name in ("verdicts", "limits", "usual", "output", "fail_on_alarm"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is for --input, not for --fixtures")
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
    add("--input", metavar="FILE", help="responses, .jsonl or .parquet")
    add("--verdicts", metavar="FILE", help="scores of them, for the correlation with lengths")
    add("--usual", metavar="FILE",
        help="responses that are not suspected, as the start policy's: beyond their lengths a "
        "response is verbose (those of --input itself)")
    add("--limits", metavar="FILE", help="YAML: above which share a detector raises an alarm")
    add("--output", metavar="FILE", help=".jsonl to write: of each response, what fires on what")
    add("--overwrite", action="store_true", help="replace --output")
    add("--fail-on-alarm", action="store_true", help=f"exit with {ALARMED} when there is an alarm")
    add("--fixtures", nargs="*", metavar="FILE",
        help="measure the detectors on texts of which it is known what they are (the package's)")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool(main)
