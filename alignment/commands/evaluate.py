"""Command `et-align evaluate`; its help is in `evaluate_config`."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands.annotate import annotate
from alignment.commands.config_groups import OutputConfig
from alignment.commands.evaluate_config import (
    PREFERENCES,
    SCORES,
    EvaluateConfig,
    Evaluation,
    file_name,
    parse,
)
from alignment.data.record_writer import RecordWriter
from alignment.evaluation.comparisons import PolicyComparison, read_comparison
from alignment.evaluation.policy_table import (
    preferences_json,
    preferences_table,
    scores_json,
    scores_table,
)
from alignment.evaluation.win_rates import Verdicts, check_items, prefer, score
from alignment.judges.formats.scale import read_verdicts
from alignment.judges.results import commonest, reasons_of, require_results
from alignment.records import Outcome, Pair, Response, Verdict
from alignment.statistics.bootstrap import LEVEL
from alignment.statistics.verdict_alignment import verdicts_by_item
from megatron_ext.errors import TooFewResults, UserError
from megatron_ext.progress import Progress

_ITEMS = {SCORES: "responses.jsonl", PREFERENCES: "pairs.jsonl"}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run the command."""
    return run(parse(argv))


def run(evaluation: Evaluation) -> int:
    """Collect the verdicts and compare the policies; return the exit status.

    Raises:
        UserError: A file cannot be used.
        TooFewResults: Too many verdicts failed.
    """
    config = evaluation.config
    assert config.baseline is not None
    contest = read_comparison(config.responses, config.baseline, config.common, config.rows.options)
    files: dict[tuple[str, str], list[Path]] = {}
    if config.output:
        _write_items(Path(config.output), contest)
        for judge in evaluation.judges:
            for kind in judge.kinds:
                file = Path(config.output) / f"{file_name(judge.judge_name)}.{kind}.jsonl"
                records = str(file.with_name(_ITEMS[kind]))
                print(f"{file.stem}:", flush=True)
                output = OutputConfig(input=records, output=str(file), overwrite=config.overwrite)
                caches = [Path(f"{each}.answers.jsonl") for [each] in files.values()]
                if code := annotate(output, judge.judge, counted=caches):
                    return code
                files[judge.judge_name, kind] = [file]
    verdicts = {judge: _read(paths, judge[0]) for judge, paths in files.items()}
    from_files = _read_verdict_files(config, verdicts)
    verdicts |= from_files
    if not verdicts:
        print(
            f"Wrote {len(contest.responses):,} responses and {len(contest.pairs):,} pairs to "
            f"{config.output}: annotate them and give the files as --verdicts, or give --judge."
        )
        return 0
    results = _measure(contest, verdicts, config)
    if config.output:
        _write(Path(config.output) / "evaluation.json", contest, results, config)
    for (name, kind), by_id in from_files.items():
        rows = [verdict for each in by_id.values() for verdict in each]
        source = f"{kind} of --verdicts {name}=..."
        require_results(reasons_of(rows), len(rows), evaluation.max_failed, source, "judgement")
    return 0


def _read(files: Sequence[Path], name: str) -> Verdicts:
    return verdicts_by_item([verdict for file in files for verdict in read_verdicts(file)], name)


def _read_verdict_files(
    config: EvaluateConfig, collected: Mapping[tuple[str, str], object]
) -> dict[tuple[str, str], Verdicts]:
    """Return the verdicts of --verdicts by judge and kind.

    Args:
        config: Flags of the command.
        collected: Judges and kinds whose verdicts this command has collected.

    Raises:
        UserError: A file cannot be used.
        TooFewResults: A file has no successful verdict.
    """
    results: dict[tuple[str, str], list[Verdict]] = {}
    for words in config.verdicts:
        judge, _, file = words.partition("=")
        if not judge or not file:
            raise UserError(f"--verdicts {words} must have the form NAME=FILE.")
        rows = read_verdicts(Path(file), config.verdicts_scale, "--verdicts-scale")
        judgements = [row for row in rows if row.judged]
        if not judgements:
            why = commonest(reasons_of(rows))
            raise TooFewResults(f"All verdicts in {file} have failed, most often with: {why}.")
        kind = SCORES if judgements[0].outcome is Outcome.SCORE else PREFERENCES
        if (judge, kind) in collected:
            raise UserError(
                f"--verdicts {words} has the name of a --judge that collects {kind}. Choose "
                "another name."
            )
        results.setdefault((judge, kind), []).extend(rows)
    return {judge: verdicts_by_item(rows, judge[0]) for judge, rows in results.items()}


def _write_items(folder: Path, contest: PolicyComparison) -> None:
    records: dict[str, Sequence[Response | Pair]] = {
        SCORES: contest.responses, PREFERENCES: contest.pairs,
    }  # fmt: skip
    for kind, rows in records.items():
        with RecordWriter(folder / _ITEMS[kind], overwrite=True) as writer:
            for row in rows:
                writer.write(row)


def _measure(
    contest: PolicyComparison, verdicts: Mapping[tuple[str, str], Verdicts], config: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """Print the results of each judge and return them for evaluation.json."""
    results: dict[str, dict[str, Any]] = {}
    with Progress("resampling", len(verdicts) * config.resamples, "resamples") as progress:
        done = itertools.count(1)

        def advance() -> None:
            progress.update(next(done))

        parts = []
        for (name, kind), by_id in verdicts.items():
            items = contest.responses if kind == SCORES else contest.pairs
            check_items(by_id, [item.id for item in items], f"{name} ({kind})", config.common)
            settings = (config.resamples, config.resample_seed, advance)
            if kind == SCORES:
                scores = score(contest, by_id, name, *settings)
                parts.append(scores_table(name, scores, contest.baseline))
                results.setdefault(name, {})[kind] = scores_json(scores)
            else:
                preferences = prefer(contest, by_id, name, *settings)
                parts.append(preferences_table(name, preferences, contest.baseline))
                results.setdefault(name, {})[kind] = preferences_json(preferences)
    print(f"{len(contest.prompts):,} prompts, baseline {contest.baseline}\n")
    print("\n\n".join(parts))
    return results


def _write(
    file: Path, contest: PolicyComparison, results: Mapping[str, Any], config: EvaluateConfig
) -> None:
    content = {
        "baseline": contest.baseline,
        "policies": list(contest.policies),
        "prompts": len(contest.prompts),
        "resamples": config.resamples,
        "level": LEVEL,
        "judges": results,
    }
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(file)
    print(f"\nWrote {file}.")
