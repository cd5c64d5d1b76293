"""How good the detectors are: precision and recall on texts of which it is known."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scipy import stats

from alignment.data.source_rows import MalformedRow, read_rows
from alignment.monitors.classifier import Classifier, training_rows
from alignment.monitors.detectors import DETECTORS, detect_all
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.text_features import NormalizedResponse
from alignment.records import Prompt
from megatron_ext.errors import UserError

PACKAGED = Path(__file__).with_name("fixtures")
ANY = "any of them"


@dataclass(frozen=True)
class Fixture:
    """A response of which it is known what detectors should make of it.

    Attributes:
        split: patterns may be written after `develop`, never after `held_out`; users have others.
        messages: of its prompt.
        fires: detectors that should fire.
        quiet: detectors that should not. Of others nothing is known.
        reference_words: lengths of responses to such prompts, for `verbose`.
        wording: name of the idea behind a text; cross-validation never learns from a text of the
            same wording. The classifier learns from texts that have one.
        passage: the part of the text that is the attack.
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
        if both := sorted(set(self.fires) & set(self.quiet)):
            raise UserError(f"{both[0]} stands both in fires and in quiet")
        lengths = self.reference_words
        if not isinstance(lengths, list | tuple) or not all(
            type(n) is int and n >= 0 for n in lengths
        ):
            raise UserError("reference_words must be a list of numbers of words")
        if "verbose" in (*self.fires, *self.quiet) and not lengths:
            raise UserError("verbose needs reference_words: lengths of responses to such prompts")

    @property
    def response(self) -> NormalizedResponse:
        """The response as detectors read it."""
        lengths = (
            ReferenceLengths.from_words(self.reference_words) if self.reference_words else None
        )
        return NormalizedResponse.create(self.messages, self.text, lengths)


def read_fixtures(paths: Sequence[Path]) -> Iterator[Fixture]:
    """The fixtures of some files, .jsonl or .parquet.

    Raises:
        UserError: a file cannot be read, or a row is not a fixture.
    """
    known = {field.name for field in fields(Fixture)}
    for path in paths:
        for number, row in read_rows(path):
            if isinstance(row, MalformedRow):
                raise UserError(f"{path}, {row}")
            try:
                if unknown := sorted(set(row) - known):
                    raise UserError(f"unknown field {unknown[0]!r}; a fixture has {sorted(known)}")
                yield Fixture(**row)
            except UserError as error:
                raise UserError(f"{path}, row {number:,}: {error}") from None
            except TypeError as error:
                wrong = str(error).rpartition(") ")[2]
                raise UserError(f"{path}, row {number:,}: not a fixture: {wrong}") from None


@dataclass
class DetectorCounts:
    """Of one detector on some fixtures."""

    hits: int = 0
    misses: int = 0
    false: int = 0
    quiet: int = 0  # rightly

    def __add__(self, other: "DetectorCounts") -> "DetectorCounts":
        return DetectorCounts(
            self.hits + other.hits, self.misses + other.misses,
            self.false + other.false, self.quiet + other.quiet,
        )  # fmt: skip

    @property
    def precision(self) -> tuple[int, int]:
        """How many of those that it fires on are right; it depends on how many look-alikes there
        are, and on how like."""
        return self.hits, self.hits + self.false

    @property
    def recall(self) -> tuple[int, int]:
        """How many of those that it should fire on it does fire on."""
        return self.hits, self.hits + self.misses

    @property
    def false_positives(self) -> tuple[int, int]:
        """How many of those that it should be quiet on it fires on."""
        return self.false, self.false + self.quiet


def measure(
    fixtures: Iterable[Fixture], classifier: Classifier | None = None
) -> dict[str, dict[str, DetectorCounts]]:
    """Count what the detectors find by split and detector.

    The counts of `ANY` are of texts: of attacks on which any detector fires, and of harmless texts
    on which any detector fires that should not.

    Args:
        fixtures: texts of which it is known what they are.
        classifier: takes the place of the packaged one.
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
    """Count what is found in texts whose wordings the classifier has not learned from.

    The texts with a wording that the classifier may learn from are divided into folds, all texts of
    a wording in one. Each fold is measured with a classifier trained on the others.

    Args:
        fixtures: Texts to measure on.
        folds: Number of folds; as many as there are wordings leaves one out at a time.
        others: Further texts to learn from, where they are of other wordings than the fold.

    Raises:
        UserError: There are fewer wordings than folds.
    """
    learned = [fixture for fixture in fixtures if fixture.split == "develop" and fixture.wording]
    wordings = sorted({fixture.wording for fixture in learned})
    random.Random(0).shuffle(wordings)
    if folds > len(wordings):
        raise UserError(
            f"--folds {folds} is more than the {len(wordings)} wordings of the fixtures. Choose "
            f"fewer folds, or give fixtures with the split develop and a wording."
        )
    fold_of = {wording: number % folds for number, wording in enumerate(wordings)}
    total = {name: DetectorCounts() for name in (*DETECTORS, ANY)}
    ids = {fixture.id for fixture in learned}
    everything = [*learned, *(other for other in others if other.id not in ids)]
    for fold in range(folds):
        classifier = Classifier(
            training_rows(f for f in everything if fold_of.get(f.wording, -1) != fold)
        )
        unseen = [fixture for fixture in learned if fold_of[fixture.wording] == fold]
        for name, counts in measure(unseen, classifier)["develop"].items():
            total[name] += counts
    return total


def wilson(part: int, whole: int) -> tuple[float, float] | None:
    """The 95 % interval of a share, by Wilson; None of nothing."""
    if not whole:
        return None
    interval = stats.binomtest(part, whole).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
