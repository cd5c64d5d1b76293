"""Patterns of words, read from `english.txt`, which describes its notation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Replaces the mark that ends a sentence in folded text; neither a letter nor white space.
END = "\x01"

_GAP = rf"[^{END}\n]{{0,60}}?"
_SPACE = r"(?:\s{1,8}+)"
_START = rf"(?:\A|(?<=[{END}\n:]))[^\w\n]{{0,6}}"
# Signs of the notation, and character classes and escapes, which `expand` leaves unchanged.
_SIGN = re.compile(r"\[(?:\\.|[^\]\\])+\]|\\.|\.\.|@[a-z]+|\^| ")
_SECTION = re.compile(r"\[([a-z_ ]+)\]")


@dataclass(frozen=True)
class Patterns:
    """Sections of a file of patterns, and their regular expressions over folded text.

    Attributes:
        sections: Lines by the name of their section.
    """

    sections: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, path: Path) -> "Patterns":
        """Read the sections of a file, without comments and empty lines."""
        sections: dict[str, list[str]] = {}
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.startswith("# ") or not line.strip("# "):
                continue
            if header := _SECTION.fullmatch(line):
                section = sections.setdefault(header[1], [])
            else:
                section.append(line)
        return cls(sections)

    def expand(self, pattern: str) -> str:
        """Return a line as a regular expression, with the signs of the notation replaced."""

        def meaning(sign: re.Match[str]) -> str:
            match sign[0]:
                case "..":
                    return _GAP
                case " ":
                    return _SPACE
                case "^":
                    return _START
                case name if name[0] == "@":
                    words = "|".join(self.sections[f"word {name[1:]}"])
                    return f"(?:{self.expand(words)})"
                case same:
                    return same

        return _SIGN.sub(meaning, pattern)

    @cached_property
    def fires(self) -> dict[str, re.Pattern[str]]:
        """Regular expression of all patterns of a detector, by its name."""
        names = [name for name in self.sections if " " not in name]
        return {name.partition(" ")[0]: self._any_of(name) for name in names}

    @cached_property
    def certain(self) -> dict[str, re.Pattern[str]]:
        """Regular expression of the patterns that count at any position, by detector."""
        names = [name for name in self.sections if name.endswith(" anywhere")]
        return {name.partition(" ")[0]: self._any_of(name) for name in names}

    @cached_property
    def whole(self) -> dict[str, re.Pattern[str]]:
        """Regular expression of whole responses, by detector; one space separates words."""
        sections = {name: lines for name, lines in self.sections.items() if name.endswith(" whole")}
        return {name.partition(" ")[0]: re.compile("|".join(x)) for name, x in sections.items()}

    @cached_property
    def requested(self) -> dict[str, re.Pattern[str]]:
        """Regular expression of prompts that request such text, by detector."""
        names = [name for name in self.sections if name.endswith(" requested")]
        return {name.partition(" ")[0]: self._any_of(name) for name in names}

    def _any_of(self, section: str) -> re.Pattern[str]:
        any_of = "|".join(map(self.expand, self.sections[section]))
        expression = any_of if section.endswith(" anywhere") else rf"(?<!\w)(?:{any_of})(?!\w)"
        return re.compile(expression)


ENGLISH = Patterns.read(Path(__file__).with_name("english.txt"))
