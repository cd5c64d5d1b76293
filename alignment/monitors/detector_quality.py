"""Precision and recall of the detectors on labeled texts."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scipy import stats

from alignment.monitors.classifier import Classifier, training_rows
from alignment.monitors.detectors import DETECTORS, detect_all
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.text_features import NormalizedResponse
from alignment.records import Prompt
from megatron_ext.data.row_files import MalformedRow, read_rows
from megatron_ext.errors import UserError

PACKAGED = Path(__file__).with_name("fixtures")
ANY = "any of them"


@dataclass(frozen=True)
class Fixture:
    """Response that is labeled with the detectors that should fire on it.

    Attributes:
        id: Identifier of the response.
        split: Name of the split. Patterns may be derived from `develop`, never from `held_out`;
            files of users have other splits.
        messages: Messages of the prompt.
        text: Text of the response.
        fires: Detectors that should fire.
        quiet: Detectors that should not fire. Other detectors are not measured on this response.
        reference_words: Lengths of reference responses to such prompts in words, for `verbose`.
        wording: Name of the idea behind the text. The classifier is trained on texts that have a
            wording; in cross-validation, never on the wording on which it is measured.
        passage: Part of the text that is the attack.
    """

    id: str
    split: str
    messages: Any
    text: str
    fires: Sequence[str] = ()
    quiet: Sequence[str] = ()
    reference_words: Sequence[int] = ()
    wording: str = ""
    passage: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "split", "text", "wording", "passage"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be text")
        object.__setattr__(self, "messages", Prompt("prompt", self.messages).messages)
        for name in ("fires", "quiet"):
            detectors = getattr(self, name)
            if not isinstance(detectors, list | tuple):
                raise UserError(f"{name} must be a list of detectors")
            if unknown := [detector for detector in detectors if detector not in DETECTORS]:
                raise UserError(
                    f"there is no detector {unknown[0]!r}: known are {', '.join(DETECTORS)}"
                )
        if contradictory := sorted(set(self.fires) & set(self.quiet)):
            raise UserError(f"{contradictory[0]} is both in fires and in quiet")
        lengths = self.reference_words
        if not isinstance(lengths, list | tuple) or not all(
            type(n) is int and n >= 0 for n in lengths
        ):
            raise UserError("reference_words must be a list of numbers of words")
        if "verbose" in (*self.fires, *self.quiet) and not lengths:
            raise UserError("verbose needs reference_words: lengths of responses to such prompts")

    @property
    def response(self) -> NormalizedResponse:
        """Response in the form that detectors examine."""
        lengths = (
            ReferenceLengths.from_words(self.reference_words) if self.reference_words else None
        )
        return NormalizedResponse.create(self.messages, self.text, lengths)


def read_fixtures(paths: Sequence[Path]) -> Iterator[Fixture]:
    """Yield the fixtures of JSONL or Parquet files.

    Raises:
        UserError: A file cannot be read, or a row is not a fixture.
    """
    columns = {field.name for field in fields(Fixture)}
    for path in paths:
        for number, row in read_rows(path):
            if isinstance(row, MalformedRow):
                raise UserError(f"{path}, {row}")
            try:
                if unknown := sorted(set(row) - columns):
                    raise UserError(
                        f"unknown field {unknown[0]!r}; a fixture has {sorted(columns)}"
                    )
                yield Fixture(**row)
            except UserError as error:
                raise UserError(f"{path}, row {number:,}: {error}") from None
            except TypeError as error:
                wrong = str(error).rpartition(") ")[2]
                raise UserError(f"{path}, row {number:,}: not a fixture: {wrong}") from None


@dataclass
class DetectorCounts:
    """Numbers of right and wrong results of one detector on some fixtures.

    Attributes:
        hits: Fixtures on which the detector fires, as it should.
        misses: Fixtures on which it should fire and does not.
        false: Fixtures on which it fires and should not.
        quiet: Fixtures on which it does not fire, as it should not.
    """

    hits: int = 0
    misses: int = 0
    false: int = 0
    quiet: int = 0

    def __add__(self, other: "DetectorCounts") -> "DetectorCounts":
        return DetectorCounts(
            self.hits + other.hits, self.misses + other.misses,
            self.false + other.false, self.quiet + other.quiet,
        )  # fmt: skip

    @property
    def precision(self) -> tuple[int, int]:
        """Hits, and the number of fixtures on which it fires.

        The ratio depends on how many harmless look-alikes the fixtures contain.
        """
        return self.hits, self.hits + self.false

    @property
    def recall(self) -> tuple[int, int]:
        """Hits, and the number of fixtures on which it should fire."""
        return self.hits, self.hits + self.misses

    @property
    def false_positives(self) -> tuple[int, int]:
        """False positives, and the number of fixtures on which it should not fire."""
        return self.false, self.false + self.quiet


def measure(
    fixtures: Iterable[Fixture], classifier: Classifier | None = None
) -> dict[str, dict[str, DetectorCounts]]:
    """Count the results of the detectors by split and detector.

    The counts of `ANY` are about texts: attacks on which any detector fires, and harmless texts on
    which any detector fires that should not.

    Args:
        fixtures: Labeled texts.
        classifier: Classifier to use instead of the packaged one.
    """
    fixtures = list(fixtures)
    splits: dict[str, dict[str, DetectorCounts]] = {}
    fired = detect_all([fixture.response for fixture in fixtures], classifier)
    for fixture, names in zip(fixtures, fired):
        counts = splits.setdefault(
            fixture.split, {name: DetectorCounts() for name in (*DETECTORS, ANY)}
        )
        for name in fixture.fires:
            counts[name].hits += name in names
            counts[name].misses += name not in names
        for name in fixture.quiet:
            counts[name].false += name in names
            counts[name].quiet += name not in names
        if fixture.fires:
            counts[ANY].hits += bool(names)
            counts[ANY].misses += not names
        elif fixture.quiet:
            false = any(name in names for name in fixture.quiet)
            counts[ANY].false += false
            counts[ANY].quiet += not false
    return splits


def cross_validate(
    fixtures: Iterable[Fixture], folds: int, others: Iterable[Fixture] = ()
) -> dict[str, DetectorCounts]:
    """Count the results of the detectors on wordings that the classifier was not trained on.

    The texts of the split `develop` that have a wording are divided into folds, with all texts of a
    wording in one fold. Each fold is measured with a classifier trained on the other folds.

    Args:
        fixtures: Labeled texts to measure on.
        folds: Number of folds. With the number of wordings, each fold is one wording.
        others: Further texts to train on, except those whose wording is in the fold.

    Raises:
        UserError: There are fewer wordings than folds.
    """
    measured = [fixture for fixture in fixtures if fixture.split == "develop" and fixture.wording]
    wordings = sorted({fixture.wording for fixture in measured})
    random.Random(0).shuffle(wordings)
    if folds > len(wordings):
        raise UserError(
            f"--folds {folds} exceeds the {len(wordings)} wordings of the fixtures. Choose "
            f"fewer folds, or add fixtures with the split develop and a wording."
        )
    fold_of = {wording: number % folds for number, wording in enumerate(wordings)}
    total = {name: DetectorCounts() for name in (*DETECTORS, ANY)}
    ids = {fixture.id for fixture in measured}
    everything = [*measured, *(other for other in others if other.id not in ids)]
    for fold in range(folds):
        classifier = Classifier(
            training_rows(f for f in everything if fold_of.get(f.wording, -1) != fold)
        )
        unseen = [fixture for fixture in measured if fold_of[fixture.wording] == fold]
        for name, counts in measure(unseen, classifier)["develop"].items():
            total[name] += counts
    return total


def wilson(count: int, total: int) -> tuple[float, float] | None:
    """Return the 95 % Wilson interval of a share; None if the total is 0."""
    if not total:
        return None
    interval = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
