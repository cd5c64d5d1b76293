"""Gold judge that is a rule: it uses no model and no randomness, and is hard to learn from text.

It measures a few features of a prompt and a response, each a whole level from 0 to 9, and returns
the weighted mean of the levels. Its thinking is a text with the levels, from which the label
follows, so that another judge can learn this thinking.
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
    """Return the words and numbers of a text in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


# Words that carry little of the topic of a text.
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
    """Measure of how much a text resembles a reference, by a bigram model of its words.

    Attributes:
        ids: Number of each word that the model knows.
        model: The bigram model.
        shuffled: Mean log-probability of a word of held-out reference text in random order, in
            nats: the lower end of the scale.
        real: The same in the original order: the upper end of the scale.
        digest: A hash of the reference.
    """

    ids: Mapping[str, int]
    model: Bigram
    shuffled: float
    real: float
    digest: str

    @classmethod
    def fit(cls, texts: Iterable[str], most_words: int = 1_000_000) -> "Fluency":
        """Fit the measure to a reference: every eighth text sets the scale, the others the model.

        Args:
            texts: The reference texts.
            most_words: Maximum number of words to read.

        Raises:
            UserError: If the reference is too small to distinguish text from noise.
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
        vocabulary = [word for word in sorted(counts) if counts[word] > 1]
        # 0 is any other word.
        ids = {word: number for number, word in enumerate(vocabulary, start=1)}
        digest = sha256(json.dumps(documents).encode()).hexdigest()
        if len(vocabulary) < 10 or len(scale) < 10:
            raise UserError("--rule-text has too few words to learn from. Pass at least 100 texts.")
        model = Bigram.fit(_numbered(fitted, ids), len(ids) + 1)
        itself = cls(ids, model, 0.0, 1.0, digest)
        real = itself.log_probability(scale)
        shuffled = itself.log_probability(random.Random(0).sample(scale, len(scale)))
        if not real > shuffled:
            raise UserError(
                "--rule-text is no more likely in order than shuffled. Pass text of a language."
            )
        return replace(itself, shuffled=shuffled, real=real)

    def log_probability(self, words: Sequence[str]) -> float:
        """Return the mean log-probability of the words after the first, in nats."""
        numbers = _numbered(words, self.ids)
        return float(np.log(self.model.probability(numbers[:-1], numbers[1:])).mean())

    def __call__(self, words: Sequence[str]) -> float:
        """Return the fluency, from 0 (like shuffled words) to 1 (like the reference)."""
        if len(words) < 2:
            return 0.0
        return (self.log_probability(words) - self.shuffled) / (self.real - self.shuffled)


def _numbered(words: Sequence[str], ids: Mapping[str, int]) -> np.ndarray:
    return np.fromiter((ids.get(word, 0) for word in words), np.int64, len(words))


@dataclass(frozen=True)
class SplitResponse:
    """Words of a prompt and a response, split once for all features.

    Attributes:
        prompt: The words of the user's messages.
        words: The words of the response.
        text: The response.
        fluency: The measure of fluency.
    """

    prompt: list[str]
    words: list[str]
    text: str
    fluency: Fluency

    @classmethod
    def of(cls, messages: Sequence[Message], text: str, fluency: Fluency) -> "SplitResponse":
        """Split a prompt and a response into words."""
        prompt = [word for m in messages if m.role == "user" for word in words_of(m.content)]
        return cls(prompt, words_of(text), text, fluency)


def _content(words: Sequence[str]) -> set[str]:
    return {word for word in words if word not in _FUNCTION_WORDS}


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(words, words[1:], words[2:]))


def _topic(response: SplitResponse) -> float:
    """Return the share of the content words of the prompt that the response contains."""
    topic = _content(response.prompt)
    return len(topic & set(response.words)) / len(topic) if topic else 1.0


def _own_topic(response: SplitResponse) -> float:
    """Return `_topic` without words in runs of three or more that are copied from the prompt."""
    copied = set(_runs(response.prompt))
    is_own = [True] * len(response.words)
    for position, run in enumerate(_runs(response.words)):
        if run in copied:
            is_own[position : position + 3] = [False] * 3
    words = [word for word, is_own_word in zip(response.words, is_own) if is_own_word]
    return _topic(replace(response, words=words))


def _fluency(response: SplitResponse) -> float:
    return response.fluency(response.words)


def _variety(response: SplitResponse) -> float:
    """Return the share of new runs of three words, scaled so that a share of one half gives 0."""
    runs = _runs(response.words)
    return 2 * len(set(runs)) / len(runs) - 1 if runs else 0.0


def _length(response: SplitResponse) -> float:
    """Return 1 for 12 to 40 words, falling to 0 at no words and at 80."""
    count = len(response.words)
    return min(count / 12, 1.0, (80 - count) / 40)


def _ending(response: SplitResponse) -> float:
    """Return 1 if the response ends like a sentence, and otherwise 0."""
    return float(bool(_ENDING.search(response.text)))


FEATURES: Mapping[str, Callable[[SplitResponse], float]] = {
    "topic": _topic,
    "own topic": _own_topic,
    "fluency": _fluency,
    "variety": _variety,
    "length": _length,
    "ending": _ending,
}


@dataclass(frozen=True)
class ScoringRule:
    """Rule that scores responses: weights of features.

    Attributes:
        name: Name of the rule.
        weights: Weight of each feature, in the order of the thinking.
        margin: Largest difference between two mean levels that counts as a tie.
    """

    name: str
    weights: Mapping[str, float]
    margin: float = 0.25

    def changed(self, name: str, old: str, new: str) -> "ScoringRule":
        """Return the rule with one feature in place of another."""
        weights = {new if f == old else f: weight for f, weight in self.weights.items()}
        return replace(self, name=name, weights=weights)

    def mean(self, levels: Mapping[str, int]) -> float:
        """Return the weighted mean of levels, from 0 to 9."""
        total = sum(self.weights.values())
        return sum(weight * levels[name] for name, weight in self.weights.items()) / total


GOLD = ScoringRule("gold", {"topic": 4, "fluency": 4, "variety": 2, "length": 1, "ending": 1})
RULES = {rule.name: rule for rule in (GOLD, GOLD.changed("no-copying", "topic", "own topic"))}


@dataclass(frozen=True)
class RuleJudge:
    """Judge that follows a rule, with a reference text for fluency.

    Attributes:
        rule: The rule.
        fluency: The measure of fluency.
        identity: A hash of everything that a verdict depends on.
    """

    rule: ScoringRule
    fluency: Fluency
    identity: str = field(init=False)

    VERSION = 1  # increase this when a feature changes, because the judge is then another one

    def __post_init__(self) -> None:
        rule = [self.rule.name, dict(self.rule.weights), self.rule.margin]
        depends = json.dumps([self.VERSION, rule, self.fluency.digest]).encode()
        object.__setattr__(self, "identity", sha256(depends).hexdigest())

    def levels(self, messages: Sequence[Message], text: str) -> dict[str, int]:
        """Return the level of each feature of a response, a whole number from 0 to 9."""
        response = SplitResponse.of(messages, text, self.fluency)
        return {name: _level(FEATURES[name](response)) for name in self.rule.weights}

    def verdict(self, item: Response | Pair, swapped: bool = False, sample: int = 0) -> Verdict:
        """Return the verdict on a response, or on a pair, which is the same in both orders."""
        score, side = None, None
        if isinstance(item, Response):
            levels = self.levels(item.prompt.messages, item.text)
            outcome, score = Outcome.SCORE, float(round_half_up(self.rule.mean(levels)))
            thinking, label = describe_levels(levels), f"{score:.0f}"
        else:
            texts = (item.second, item.first) if swapped else (item.first, item.second)
            levels_of_both = [self.levels(item.prompt.messages, text) for text in texts]
            thinking = " ".join(
                f"{name}: {describe_levels(levels)}" for name, levels in zip("AB", levels_of_both)
            )
            difference = self.rule.mean(levels_of_both[0]) - self.rule.mean(levels_of_both[1])
            outcome, label = Outcome.TIE, "tie"
            if abs(difference) > self.rule.margin + 1e-9:
                outcome, label = Outcome.PREFERENCE, "A" if difference > 0 else "B"
                side = Side.FIRST if (difference > 0) != swapped else Side.SECOND
        return Verdict(
            item.id, outcome, score, side, swapped, sample,
            thinking=thinking, answer=f"{OPEN}{thinking}{CLOSE}\n{label}", judge=self.identity,
        )  # fmt: skip


def describe_levels(levels: Mapping[str, int]) -> str:
    """Return levels as text."""
    return ", ".join(f"{name} {NUMBERS[level]}" for name, level in levels.items()) + "."


def round_half_up(value: float) -> int:
    """Round to the nearest whole number, halves up, with tolerance for rounding errors of a sum."""
    return math.floor(value + 0.5 + 1e-9)


def _level(share: float) -> int:
    return round_half_up(HIGHEST * min(1.0, max(0.0, share)))
