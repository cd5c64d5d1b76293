"""A gold judge that is a rule: no model, no randomness, and learnable from text only in part.

It reads a prompt and a response, measures a few features, each a whole level from 0 to 9, and gives
the weighted mean of the levels. What it writes before the label is the levels in words, from which
the label follows; so a judge can learn to think as it does.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from alignment.judges.formats.parsing import CLOSE, OPEN
from alignment.records import Message, Outcome, Pair, Response, Side, Verdict
from megatron_ext.errors import UserError
from megatron_ext.evaluation.ngram_losses import Bigram

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HIGHEST = 9
_ENDING = re.compile(r"""[.!?]["'”’)]*\s*$""")


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[^\W_]+", text.lower())


# Words that say little of what a text is about.
_FUNCTION_WORDS = frozenset(
    words_of(
        """
        a about after again all also am an and any are as at be because been before being between
        both but by can could did do does down each few for from had has have having he her here
        hers him his how i if in into is it its just may me might more most must my no nor not now
        of off on once only or other our out over own same shall she should so some such than that
        the their them then there these they this those through to too under until up upon us very
        was we were what when where which while who whom why will with would you your s t re ve ll
        d m
        """
    )
)


@dataclass(frozen=True)
class Fluency:
    """How much a text reads like a reference, under a bigram model of the reference's words.

    Attributes:
        shuffled, real: mean log-probability of a word of held-out reference text in random order,
            and as it stands: the ends of the scale.
        digest: of the reference.
    """

    ids: Mapping[str, int]
    model: Bigram
    shuffled: float
    real: float
    digest: str

    @classmethod
    def fit(cls, texts: Iterable[str], most_words: int = 1_000_000) -> "Fluency":
        """Learn from a reference: every eighth text sets the scale, the others the model.

        Args:
            most_words: what is beyond is not read.

        Raises:
            UserError: the reference is too small to tell text from noise.
        """
        documents: list[list[str]] = []
        read = 0
        for text in texts:
            if read >= most_words:
                break
            documents.append(words_of(text))
            read += len(documents[-1])
        fitted = [word for i, words in enumerate(documents) if i % 8 for word in words]
        scale = [word for words in documents[::8] for word in words][:100_000]
        counts: dict[str, int] = {}
        for word in fitted:
            counts[word] = counts.get(word, 0) + 1
        kept = [word for word in sorted(counts) if counts[word] > 1]
        ids = {word: number for number, word in enumerate(kept, start=1)}  # 0 is any other word
        digest = sha256(json.dumps(documents).encode()).hexdigest()
        if len(kept) < 10 or len(scale) < 10:
            raise UserError("--rule-text has too few words to learn from: give at least 100 texts")
        model = Bigram.fit(_numbered(fitted, ids), len(ids) + 1)
        itself = cls(ids, model, 0.0, 1.0, digest)
        real = itself.log_probability(scale)
        shuffled = itself.log_probability(random.Random(0).sample(scale, len(scale)))
        if not real > shuffled:
            raise UserError("--rule-text reads no better in order than shuffled: give real text")
        return replace(itself, shuffled=shuffled, real=real)

    def log_probability(self, words: Sequence[str]) -> float:
        """Mean over the words after the first, in nats."""
        numbers = _numbered(words, self.ids)
        return float(np.log(self.model.probability(numbers[:-1], numbers[1:])).mean())

    def __call__(self, words: Sequence[str]) -> float:
        """From 0, no better than shuffled words, to 1, as good as the reference."""
        if len(words) < 2:
            return 0.0
        return (self.log_probability(words) - self.shuffled) / (self.real - self.shuffled)


def _numbered(words: Sequence[str], ids: Mapping[str, int]) -> np.ndarray:
    return np.fromiter((ids.get(word, 0) for word in words), np.int64, len(words))


@dataclass(frozen=True)
class Reading:
    """A prompt and a response, taken apart once for all features."""

    prompt: list[str]
    words: list[str]
    text: str
    fluency: Fluency

    @classmethod
    def of(cls, messages: Sequence[Message], text: str, fluency: Fluency) -> "Reading":
        asked = [word for m in messages if m.role == "user" for word in words_of(m.content)]
        return cls(asked, words_of(text), text, fluency)


def _content(words: Sequence[str]) -> set[str]:
    return {word for word in words if word not in _FUNCTION_WORDS}


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(words, words[1:], words[2:]))


def _topic(reading: Reading) -> float:
    """Share of the prompt's content words that the response takes up."""
    asked = _content(reading.prompt)
    return len(asked & set(reading.words)) / len(asked) if asked else 1.0


def _own_topic(reading: Reading) -> float:
    """As `topic`, without the words that stand in three or more copied from the prompt in a row."""
    copied = set(_runs(reading.prompt))
    own = [True] * len(reading.words)
    for at, run in enumerate(_runs(reading.words)):
        if run in copied:
            own[at : at + 3] = [False] * 3
    kept = [word for word, mine in zip(reading.words, own) if mine]
    return _topic(replace(reading, words=kept))


def _fluency(reading: Reading) -> float:
    return reading.fluency(reading.words)


def _variety(reading: Reading) -> float:
    """Share of runs of three words that were not there before; half of them is none at all."""
    runs = _runs(reading.words)
    return 2 * len(set(runs)) / len(runs) - 1 if runs else 0.0


def _length(reading: Reading) -> float:
    """1 from 12 to 40 words, falling to 0 at none and at 80."""
    count = len(reading.words)
    return min(count / 12, 1.0, (80 - count) / 40)


def _ending(reading: Reading) -> float:
    """Whether it ends as a sentence does."""
    return float(bool(_ENDING.search(reading.text)))


FEATURES: Mapping[str, Callable[[Reading], float]] = {
    "topic": _topic,
    "own topic": _own_topic,
    "fluency": _fluency,
    "variety": _variety,
    "length": _length,
    "ending": _ending,
}


@dataclass(frozen=True)
class Rule:
    """What makes a response good.

    Attributes:
        weights: of the features that count, in the order in which they are told.
        margin: two responses whose means of levels differ by no more are tied.
    """

    name: str
    weights: Mapping[str, float]
    margin: float = 0.25

    def changed(self, name: str, old: str, new: str) -> "Rule":
        """The rule with one feature in the place of another."""
        weights = {new if f == old else f: weight for f, weight in self.weights.items()}
        return replace(self, name=name, weights=weights)

    def mean(self, levels: Mapping[str, int]) -> float:
        """The weighted mean of levels, from 0 to 9."""
        total = sum(self.weights.values())
        return sum(weight * levels[name] for name, weight in self.weights.items()) / total


GOLD = Rule("gold", {"topic": 4, "fluency": 4, "variety": 2, "length": 1, "ending": 1})
RULES = {rule.name: rule for rule in (GOLD, GOLD.changed("no-copying", "topic", "own topic"))}


@dataclass(frozen=True)
class RuleJudge:
    """Judges by a rule, against a reference text for fluency.

    Attributes:
        identity: a hash of all that a verdict depends on.
    """

    rule: Rule
    fluency: Fluency
    identity: str = field(init=False)

    VERSION = 1  # of the features: another one, another judge

    def __post_init__(self) -> None:
        rule = [self.rule.name, dict(self.rule.weights), self.rule.margin]
        depends = json.dumps([self.VERSION, rule, self.fluency.digest]).encode()
        object.__setattr__(self, "identity", sha256(depends).hexdigest())

    def levels(self, messages: Sequence[Message], text: str) -> dict[str, int]:
        """Each feature of a response as a whole level from 0 to 9."""
        reading = Reading.of(messages, text, self.fluency)
        return {name: _level(FEATURES[name](reading)) for name in self.rule.weights}

    def verdict(self, item: Response | Pair, swapped: bool = False, sample: int = 0) -> Verdict:
        """What the rule says of a response, or of a pair: the same in both orders."""
        score, side = None, None
        if isinstance(item, Response):
            levels = self.levels(item.prompt.messages, item.text)
            outcome, score = Outcome.SCORE, float(round_half_up(self.rule.mean(levels)))
            thinking, label = tell(levels), f"{score:.0f}"
        else:
            texts = (item.second, item.first) if swapped else (item.first, item.second)
            both = [self.levels(item.prompt.messages, text) for text in texts]
            thinking = " ".join(f"{name}: {tell(levels)}" for name, levels in zip("AB", both))
            difference = self.rule.mean(both[0]) - self.rule.mean(both[1])
            outcome, label = Outcome.TIE, "tie"
            if abs(difference) > self.rule.margin + 1e-9:
                outcome, label = Outcome.PREFERENCE, "A" if difference > 0 else "B"
                side = Side.FIRST if (difference > 0) != swapped else Side.SECOND
        return Verdict(
            item.id, outcome, score, side, swapped, sample,
            thinking=thinking, answer=f"{OPEN}{thinking}{CLOSE}\n{label}", judge=self.identity,
        )  # fmt: skip


def tell(levels: Mapping[str, int]) -> str:
    """Levels in words."""
    return ", ".join(f"{name} {NUMBERS[level]}" for name, level in levels.items()) + "."


def round_half_up(value: float) -> int:
    """To the nearest whole number; the smallest error of a sum must not decide a half."""
    return math.floor(value + 0.5 + 1e-9)


def _level(share: float) -> int:
    return round_half_up(HIGHEST * min(1.0, max(0.0, share)))
