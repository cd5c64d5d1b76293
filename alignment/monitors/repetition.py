"""Repetition of words in a response, apart from text in which repetition is normal."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from alignment.monitors.text_features import NormalizedResponse

_RUN = 4  # words of the runs whose repeats are counted
_LEAST_RUNS = 24  # least number of runs for which the share of repeats is computed
_REPEATED = 0.5
_REPEATED_IN_VERSE = 0.75
_LOOP_WORDS = 12  # least number of words that repeat the words directly before them
_LOOP_TIMES = 2  # least number of repeats of the unit of a loop
_LOOP_TIMES_IN_VERSE = 5
_PERIODS = 3  # number of distances between equal runs that are tried
_LOOPED = 20  # repeats of the same few characters, or of the same line
_LOOP_OF_CHARACTERS = re.compile(rf"([^\W_]{{1,10}}?)\1{{{_LOOPED - 1},}}+")
# Lines of tables, markup, structured data and numbers, and fenced code.
_DATA = re.compile(
    r"```(?:(?!```).)*+(?:```)?"
    r'|(?:(?<=\n)|\A)[ \t]*+(?:[|<{}\[\]"][^\n]*+|[-+\d][-+\d.,;:%e \t]*+(?=\n|\Z))',
    re.DOTALL,
)
_VERSE = re.compile(r"\b(?:poems?|songs?|rhymes?|ballad|villanelle|pantoum|hymn|carol|verses?)\b")


def repeated(response: NormalizedResponse) -> tuple[int, int] | None:
    """Return the position, in the folded text, of a repeated unit; None without one."""
    text = response.folded
    data = [match.span() for match in _DATA.finditer(text)]
    if loop := _loop_of_lines(text):
        return loop
    words, places = response.words, response.places
    if data:
        outside = [not _within(place, data) for place in places]
        words = [word for word, keep in zip(words, outside) if keep]
        places = [place for place, keep in zip(places, outside) if keep]
    if max(map(len, words), default=0) >= _LOOPED or len(words) >= _LOOPED:
        for match in _LOOP_OF_CHARACTERS.finditer(text):
            if not _within(match.span(), data):
                return match.span()
    runs = list(zip(*(words[start:] for start in range(_RUN))))
    repeats = len(runs) - len(set(runs))
    if repeats < _LOOP_WORDS - _RUN:
        return None
    verse = any(
        _VERSE.search(message.content.lower())
        for message in response.messages
        if message.role == "user"
    )
    share = _REPEATED_IN_VERSE if verse else _REPEATED
    if len(runs) >= _LEAST_RUNS and repeats >= share * len(runs):
        first = runs.index(Counter(runs).most_common(1)[0][0])
        return places[first][0], places[first + _RUN - 1][1]
    unit = _loop(words, runs, _LOOP_TIMES_IN_VERSE if verse else _LOOP_TIMES)
    return (places[unit[0]][0], places[unit[1]][1]) if unit else None


def _within(span: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether one of some sorted spans contains a span."""
    index = bisect_right(spans, (span[0], len(spans) and spans[-1][1] + 1)) - 1
    return index >= 0 and spans[index][0] <= span[0] and span[1] <= spans[index][1]


def _loop_of_lines(text: str) -> tuple[int, int] | None:
    """Return the position of a line, also of code or data, that is repeated at least 20 times."""
    position, before, times = 0, "", 0
    for line in text.split("\n"):
        times = times + 1 if line.strip() and line == before else 0
        if times >= _LOOPED:
            return position, position + len(line)
        position, before = position + len(line) + 1, line
    return None


def _loop(
    words: Sequence[str], runs: Sequence[tuple[str, ...]], times: int
) -> tuple[int, int] | None:
    """Return the indices of the first and last word of a unit that is repeated often enough."""
    last_place: dict[tuple[str, ...], int] = {}
    periods: Counter[int] = Counter()
    for index, run in enumerate(runs):
        if run in last_place:
            periods[index - last_place[run]] += 1
        last_place[run] = index
    for period, _ in periods.most_common(_PERIODS):
        length = 0
        for index in range(period, len(words)):
            length = length + 1 if words[index] == words[index - period] else 0
            if length >= max(_LOOP_WORDS, times * period):
                return index - period + 1, index
    return None
