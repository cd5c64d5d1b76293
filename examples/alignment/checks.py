"""Graded checks of IFBench's constraints, for a judge of `kind: function`.

    function: examples/alignment/checks.py:score

A prompt's constraints are in its rubric, as `et-align data import --package ifbench` writes it.
IFBench only determines whether a constraint is met; a level from 0 to 1 lets a small model learn.
The checks are written anew, so that results cannot be compared with those of IFBench.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from alignment.records import Response

_RULE = re.compile(r"^- ([\w:-]+)(?: \((.*)\))?$", re.MULTILINE)
_EMOJI = (
    r"[\U0001F300-\U0001FAFF\u2600-\u27BF\u200D\uFE0F]"  # with characters that join and vary them
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


_PRONOUNS = frozenset(
    words_of(
        """
        i me my mine we us our ours you your yours he him his she her hers it its they them their
        theirs this that these those who whom whose which what
        """
    )
)
_STOP_WORDS = _PRONOUNS | frozenset(
    words_of(
        """
        a an and are as at be been but by can do does for from had has have if in into is more no
        not of on or so such than the then there to was were when where will with would
        """
    )
)
_CONJUNCTIONS = frozenset(words_of("for and nor but or yet so"))
_MARKS = ".,;:!?-()\"'"
_PRIMES = frozenset((2, 3, 5, 7, 11, 13, 17, 19, 23))


def sentences_of(text: str) -> list[str]:
    """Return the sentences, with an emoji after a sentence moved before its end mark."""
    marked = re.sub(rf"([.!?]+)((?:\s*{_EMOJI})+)", r"\2\1 ", text)
    return [part for part in re.split(r"(?<=[.!?])\s+", marked.strip()) if part]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _enough(count: int, least: float) -> float:
    return min(1.0, count / max(1.0, least))


def _near(count: float, low: float, high: float) -> float:
    """Return 1 within the range, falling to 0 at twice the distance from 0."""
    off = max(low - count, count - high, 0.0)
    return max(0.0, 1 - off / max(1.0, high))


def _depth(text: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for letter in text:
        depth += (letter in opening) - (letter in closing)
        deepest = max(deepest, depth)
    return deepest


def _alphabet(words: Sequence[str]) -> float:
    steps = [(ord(b[0]) - ord(a[0])) % 26 == 1 for a, b in pairwise(words)]
    return _share(steps)


def _types(text: str) -> float:
    """Return the level of two declarative sentences per interrogative one."""
    ends = [sentence[-1] for sentence in sentences_of(text)]
    questions = ends.count("?")
    return 1 - abs(questions / len(ends) - 1 / 3) * 1.5 if questions and ends else 0.0


def _keywords(words: Sequence[str], arguments: Mapping[str, str]) -> float:
    """Return the level of keywords that must occur once, twice, three, five and seven times."""
    named = [arguments[name].lower() for name in sorted(arguments) if name.startswith("keyword")]
    levels = [_near(words.count(word), n, n) for word, n in zip(named, (1, 2, 3, 5, 7))]
    return sum(levels) / max(1, len(levels))


def _chosen(text: str, options: str) -> float:
    """Return whether a text is one of the options; the bracket of `a)` may be missing."""
    answer, *names = (x.strip(" .)").lower() for x in (text, *re.split("/|, | or ", options)))
    return float(answer in names)


Check = Callable[[str, list[str], Mapping[str, str]], float]
CHECKS: Mapping[str, Check] = {
    "count:conjunctions": lambda t, w, g: _enough(len(_CONJUNCTIONS & {*w}), _number(g, "small_n")),
    "count:keywords_multiple": lambda t, w, g: _keywords(w, g),
    "count:numbers": lambda t, w, g: _near(len(re.findall(r"\d+", t)), *[_number(g, "N")] * 2),
    "count:pronouns": lambda t, w, g: _enough(sum(x in _PRONOUNS for x in w), _number(g, "N")),
    "count:punctuation": lambda t, w, g: _share([mark in t for mark in _MARKS]),
    "count:unique_word_count": lambda t, w, g: _enough(len(set(w)), _number(g, "N")),
    "count:word_count_range": lambda t, w, g: _near(
        len(t.split()), _number(g, "min_words"), _number(g, "max_words")
    ),
    "format:emoji": lambda t, w, g: _share(
        [bool(re.search(rf"{_EMOJI}\W*$", x)) for x in sentences_of(t)]
    ),
    "format:list": lambda t, w, g: _share([x.startswith(g["sep"]) for x in t.splitlines() if x]),
    "format:newline": lambda t, w, g: _share([len(x.split()) == 1 for x in t.splitlines() if x]),
    "format:no_whitespace": lambda t, w, g: 1 - min(1.0, 6 * len(re.findall(r"\s", t)) / len(t)),
    "format:options": lambda t, w, g: _chosen(t, g["options"]),
    "format:parentheses": lambda t, w, g: _enough(_depth(t, "([{", ")]}"), 5),
    "format:title_case": lambda t, w, g: _share(
        [x[0].isupper() for x in t.split() if x[0].isalpha()]
    ),
    "ratio:sentence_type": lambda t, w, g: _types(t),
    "ratio:stop_words": lambda t, w, g: _near(
        100 * _share([x in _STOP_WORDS for x in w]), 0, _number(g, "percentage")
    ),
    "words:alphabet": lambda t, w, g: _alphabet(w),
    "words:consonants": lambda t, w, g: _share([bool(re.search(r"[^aeiou\d']{2}", x)) for x in w]),
    "words:no_consecutive": lambda t, w, g: _share([a[0] != b[0] for a, b in pairwise(w)]),
    "words:prime_lengths": lambda t, w, g: _share([len(x) in _PRIMES for x in w]),
    "words:repeats": lambda t, w, g: _share(
        [c <= _number(g, "small_n") for c in Counter(w).values()]
    ),
    "words:vowel": lambda t, w, g: 1 - max(0, len({*"aeiou"} & {*t.lower()}) - 3) / 2,
}


def constraints_of(rubric: str | None) -> list[tuple[str, dict[str, str]]]:
    """Return the names and settings of the constraints of a rubric that have a check."""
    constraints = []
    for name, settings in _RULE.findall(rubric or ""):
        if name in CHECKS:
            pairs = [part.partition(" = ") for part in re.split(r", (?=\w+ = )", settings)]
            constraints.append((name, {key: value for key, _, value in pairs if key}))
    return constraints


def form(text: str) -> float:
    """Return the level of form of any answer: it ends as a sentence and repeats little."""
    words = words_of(text)
    runs = list(zip(words, words[1:], words[2:]))
    variety = max(0.0, 2 * len(set(runs)) / len(runs) - 1) if runs else 0.0
    ended = re.search(rf"[.!?](\s|{_EMOJI})*$", text)
    return (variety + float(ended is not None)) / 2


def score(response: Response) -> float:
    """Return a score from 0 to 9: the mean level of the constraints counts twice, form once."""
    text, words = response.text.strip(), words_of(response.text)
    if not words:
        return 0.0
    levels = [
        min(1.0, max(0.0, CHECKS[name](text, words, arguments)))
        for name, arguments in constraints_of(response.prompt.rubric)
    ]
    if not levels:
        return 9 * form(text)
    return 9 * (2 * sum(levels) / len(levels) + form(text)) / 3


def _number(arguments: Mapping[str, str], name: str) -> float:
    return float(arguments[name])
