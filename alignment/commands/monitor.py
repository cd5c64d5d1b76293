"""Command `et-align monitor`; its help is in `monitor_config`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from alignment.commands.annotate import annotate
from alignment.commands.config_groups import OutputConfig
from alignment.commands.monitor_config import ALARMED, MonitorConfig, parse
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.results import commonest
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.limits import CORRELATION, JUDGE, MonitorLimits
from alignment.monitors.text_features import printable, words_of
from alignment.monitors.training_monitor import BatchFindings, Monitor, describe_alarms
from alignment.record_files import read_all
from alignment.records import Response, Verdict
from megatron_ext.errors import TooFewResults, UserError

if TYPE_CHECKING:
    from alignment.monitors.detector_quality import DetectorCounts


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(config: MonitorConfig) -> int:
    """Monitor responses, or measure the detectors; return the exit status.

    Raises:
        UserError: A file cannot be used.
        TooFewResults: The judge has too few verdicts.
    """
    if config.input is None:
        _measure(config)
        return 0
    limits = MonitorLimits.read(config.limits) if config.limits else MonitorLimits()
    options = config.rows.options
    responses = read_all(Path(config.input), Response, options=options)
    reference = None
    if config.reference_lengths:
        references = read_all(Path(config.reference_lengths), Response, options=options)
        texts = (row.text for row in references)
        reference = ReferenceLengths.from_words([len(words_of(text)) for text in texts])
    rewards = _rewards(responses, config.verdicts) if config.verdicts else None
    if config.judge.judge and config.judge_verdicts:
        files = OutputConfig(
            input=config.input, output=config.judge_verdicts, overwrite=config.overwrite
        )
        if status := annotate(files, config.gaming_judge, orders="given", options=options):
            return status
    verdicts = _gaming(responses, config.judge_verdicts) if config.judge_verdicts else None
    findings = Monitor(limits, reference).check_batch(responses, rewards, verdicts)
    print("\n".join(_report(findings, limits, rewards)))
    if config.output:
        _write(Path(config.output), responses, findings)
    return ALARMED if config.fail_on_alarm and findings.alarms else 0


def _gaming(responses: Sequence[Response], file: str) -> list[Verdict | None]:
    """Return the verdict on each response, with the mean score of several samples.

    Raises:
        UserError: the file has preferences, or no score of any of the responses.
    """
    verdicts: dict[str, list[Verdict]] = {}
    for verdict in read_verdicts(Path(file)):
        if verdict.preferred is not None:
            raise UserError(
                f"--judge-verdicts {file} must contain scores of responses, not preferences."
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
    """Return the mean score of each response; None where it has none.

    Raises:
        UserError: The file has preferences, or no score of any of the responses.
        TooFewResults: All verdicts on the responses failed.
    """
    scores: dict[str, list[float]] = {}
    verdicts = read_all(Path(file), Verdict)
    for verdict in verdicts:
        if verdict.preferred is not None:
            raise UserError(f"--verdicts {file} must contain scores of responses, not preferences.")
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
        raise UserError(
            f"--verdicts {file} has no score of a response in --input. Give the verdicts on these "
            "responses."
        )
    of_each = (scores.get(response.id) for response in responses)
    return [sum(each) / len(each) if each else None for each in of_each]


def _report(
    findings: BatchFindings, limits: MonitorLimits, rewards: Sequence[float | None] | None
) -> list[str]:
    words = ", ".join(f"{name} {value:.0f}" for name, value in findings.words.items())
    lines = [
        f"{len(findings.flags):,} responses; words: {words}",
        f"{'':26}{'share':>8}{'limit':>8}",
    ]
    for name, share in findings.shares.items():
        limit, examples = limits[name], findings.examples[name]
        limit_text = "-" if limit is None else f"{limit:.1%}"
        alarm = "ALARM" if name in findings.alarms else ""
        example = f"{examples[0].id}: {printable(examples[0].evidence[0])}" if examples else ""
        line = f"{name:26}{share:>8.1%}{limit_text:>8}  {alarm:5}  {example}"
        lines.append(line.rstrip())
    limit, value = limits[CORRELATION], findings.correlation
    figures = ["-" if x is None else f"{x:.2f}" for x in (value, limit)]
    alarm = "ALARM" if CORRELATION in findings.alarms else ""
    lines.append(f"{CORRELATION:26}{figures[0]:>8}{figures[1]:>8}  {alarm}".rstrip())
    if rewards and (unscored := rewards.count(None)):
        lines.append(
            f"{unscored:,} of {len(rewards):,} responses have no score in --verdicts; "
            f"{CORRELATION} is of the others"
        )
    if findings.unjudged:
        lines.append(
            f"{findings.unjudged:,} responses have no verdict of the judge; the share of {JUDGE} "
            f"is of the others"
        )
    return [*lines, *describe_alarms(findings.alarms)]


def _write(path: Path, responses: Sequence[Response], findings: BatchFindings) -> None:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for response, flags in zip(responses, findings.flags):
            row = {"id": response.id, "words": len(words_of(response.text)), "flags": flags}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)
    print(f"Wrote {path}.")


def _measure(config: MonitorConfig) -> None:
    """Print precision and recall of the detectors on labeled texts."""
    # Imported here: scikit-learn takes seconds to load.
    from alignment.monitors.detector_quality import PACKAGED, cross_validate, measure, read_fixtures

    packaged = sorted(PACKAGED.glob("*.jsonl"))
    fixtures = list(read_fixtures([Path(file) for file in config.fixtures or ()] or packaged))
    if config.folds:
        counts = cross_validate(fixtures, config.folds, read_fixtures(packaged))
        results = {f"{config.folds} folds": counts}
    else:
        results = measure(fixtures)
    for split, counts in results.items():
        print("\n".join(_quality(split, counts)))


def _quality(split: str, counts: "Mapping[str, DetectorCounts]") -> list[str]:
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
