"""How good the detectors are: precision and recall on texts of which it is known."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scipy import stats

from alignment.data.rows import Malformed, read_rows
from alignment.monitors.detectors import NAMES, detect
from alignment.monitors.lengths import Lengths
from alignment.records import Prompt
from megatron_ext.errors import UserError

PACKAGED = Path(__file__).with_name("fixtures")


@dataclass(frozen=True)
class Fixture:
    """A response of which it is known what detectors should make of it.

    Attributes:
        split: patterns may be written after `develop`, never after `held_out`; users have others.
        messages: of its prompt.
        fires: detectors that should fire.
        quiet: detectors that should not. Of others nothing is known.
        usual_words: lengths of responses to such prompts, for `verbose`.
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
    usual_words: Sequence[int] = ()
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
            if unknown := [detector for detector in detectors if detector not in NAMES]:
                raise UserError(
                    f"there is no detector {unknown[0]!r}: known are {', '.join(NAMES)}"
                )
        if both := sorted(set(self.fires) & set(self.quiet)):
            raise UserError(f"{both[0]} stands both in fires and in quiet")
        lengths = self.usual_words
        if not isinstance(lengths, list | tuple) or not all(
            type(n) is int and n >= 0 for n in lengths
        ):
            raise UserError("usual_words must be a list of numbers of words")
        if "verbose" in (*self.fires, *self.quiet) and not lengths:
            raise UserError("verbose needs usual_words: lengths of responses to such prompts")

    def found(self) -> set[str]:
        """The detectors that do fire."""
        usual = Lengths.of(self.usual_words) if self.usual_words else None
        return set(detect(self.messages, self.text, usual))


def read_fixtures(paths: Sequence[Path]) -> Iterator[Fixture]:
    """The fixtures of some files, .jsonl or .parquet.

    Raises:
        UserError: a file cannot be read, or a row is not a fixture.
    """
    known = {field.name for field in fields(Fixture)}
    for path in paths:
        for number, row in read_rows(path):
            if isinstance(row, Malformed):
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
class Counts:
    """Of one detector on some fixtures."""

    hits: int = 0
    misses: int = 0
    false: int = 0
    quiet: int = 0  # rightly

    @property
    def precision(self) -> tuple[int, int]:
        """How many of those that it fires on are right; it depends on how many look-alikes there
        are, and on how like."""
        return self.hits, self.hits + self.false

    @property
    def recall(self) -> tuple[int, int]:
        return self.hits, self.hits + self.misses


def measure(fixtures: Iterator[Fixture]) -> Mapping[str, Mapping[str, Counts]]:
    """Counts by split and detector."""
    splits: dict[str, dict[str, Counts]] = {}
    for fixture in fixtures:
        counts = splits.setdefault(fixture.split, {name: Counts() for name in NAMES})
        found = fixture.found()
        for name in fixture.fires:
            counts[name].hits += name in found
            counts[name].misses += name not in found
        for name in fixture.quiet:
            counts[name].false += name in found
            counts[name].quiet += name not in found
    return splits


def wilson(part: int, whole: int) -> tuple[float, float] | None:
    """The 95 % interval of a share, by Wilson; None of nothing."""
    if not whole:
        return None
    interval = stats.binomtest(part, whole).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
