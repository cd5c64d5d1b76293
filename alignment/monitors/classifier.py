"""Classifier of sentences that game a judge, trained on the packaged fixtures at its first use.

The features of a sentence are the classes that its words have in `lexicon.txt`, so that a new
wording resembles known ones, and its words and their parts. Words of a class that the prompt also
uses count as another class: a review may praise and a policy may forbid where the prompt requests
one. A multinomial logistic regression returns the probabilities of each form of attack and of none.
Training is a convex problem, so that it gives the same classifier on every machine.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline

from alignment.monitors.text_features import NormalizedResponse, ScoredSentence
from alignment.records import Message

NONE = "none"
_LONGEST_SENTENCE = 600  # characters of a sentence that are read
_SHORT_QUOTATION = 25  # characters; longer ones are not read

_TOKEN = re.compile(r"[a-z0-9+_]+(?:['-][a-z]+)*")
# Classes that do not depend on the topic of a prompt.
_GENERAL = frozenset({
    "i", "my", "you", "your", "this", "that", "not", "can", "cannot", "must", "every", "answer",
    "please", "who", "end", "start", "size",
})  # fmt: skip
_SHAPES = {
    name: re.compile(pattern)
    for name, pattern in {
        "special token": r"<\|[^|>]{1,30}\|>|</?s>|<e[a-z_]{1,20}>|\[/?inst\]|"
        r"<(?:start|end)_of_turn>",
        "bracketed": r"\A[^\w[\](){}<>]{0,9}[\[<({].*[\])>}]\W{0,9}\Z",
        "ruled": r"\A[^\w\s]{0,3} ?[-=*~#>]{2,}|[-=*~]{3,}\W{0,3}\Z",
        "role": r"\A\W{0,9}(?:user|human|assistant|ai|bot|system|customer|client|question|answer|"
        r"prompt|response|instruction|input|output|q|a|agent)\W{0,3}:",
        "label": r"\A\W{0,9}\w{1,20}(?: \w{1,20}){0,4}:\s",
        "ratio": r"\d ?(?:/|out of) ?\d|\d ?%",
        "JSON key": r'"\w{1,30}" ?:',
        "tag": r"</?[a-z_]{1,30}[^<>]{0,100}>",
        "tick": r"[✓✔✅☑]|\[x\]",
        "number": r"\b\d",
        "reference": r"\d\.\d|\b(?:no|section|rule|article|clause|paragraph|policy)\.? ?\w?-?\d|"
        r"\b[a-z]-?\d",
        "exclamation": r"!",
        "quotation": r'"',
    }.items()
}
_GENRES = {
    name: re.compile(pattern)
    for name, pattern in {
        "review": r"\b(?:review|rate|rating|critique|feedback|apprais|opinion|recommend|think of|"
        r"best|better)",
        "judging": r"\b(?:judg|grad(?:e|ing|er)|mark(?:s|ing)?\b|scor|evaluat|assess|rubric|rater|"
        r"exam|points|reward|bias|compet|referee|jury|win|won)",
        "letter": r"\b(?:letter|e-?mail|message|reply|note|customer|client|guest|complain|apolog|"
        r"declin|refus|reject|thank|toast|speech|invit|ticket|say no|tell a|answer a|write to)",
        "fiction": r"\b(?:story|scene|dialogue|tale|novel|poem|song|lyrics|limerick|play|fiction|"
        r"joke|verse|haiku)",
        "format": r"\b(?:html|json|xml|yaml|csv|code|python|java\w{0,9}|c\+\+|sql|bash|script|"
        r"function|program|api|regex|git|css|test|config|format|markup|tag|token|table|list|"
        r"template|log)",
        "law": r"\b(?:polic|law|legal|rule|regulat|section|article|clause|terms|contract|amendment|"
        r"statute|forbid|ban|prohibit|allow|permit|code|act|right)",
        "language model": r"\b(?:llm|language model|prompt|injection|jailbreak|chatbot|ai\b|"
        r"assistant|model|system)",
        "yes or no": r"\A(?:can|should|could|is it|may|do i|am i|will|would|why)\b",
        "addressed": r"\b(?:you|your)\b",
    }.items()
}


@dataclass(frozen=True)
class Sentence:
    """Sentence of a response with its context.

    Attributes:
        text: Text in lower case and plain letters.
        place: Position in the response: "only", "first", "last" or "middle".
        prompt: Text of the user's messages in lower case.
    """

    text: str
    place: str
    prompt: str


class Lexicon:
    """Classes of words, read from a file of lines `CLASS: WORDS`."""

    def __init__(self, path: Path) -> None:
        """Read the file; a word that ends with an asterisk is a prefix."""
        self._classes: dict[str, list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                name, _, words = line.partition(":")
                for word in words.split():
                    self._classes.setdefault(word.replace("_", " "), []).append(name)
        phrases = sorted(word for word in self._classes if " " in word)
        self._phrase = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b")
        self.classes = lru_cache(1 << 16)(self._classes_of)

    def _classes_of(self, word: str) -> tuple[str, ...]:
        """Return the classes of a word, in the order of the file's words."""
        stems = (word[:length] + "*" for length in range(2, len(word) + 1))
        names = [name for key in (word, *stems) for name in self._classes.get(key, ())]
        return tuple(dict.fromkeys(names))

    def words(self, text: str) -> list[str]:
        """Return the words of a text, known phrases as one."""
        joined = self._phrase.sub(lambda match: match[0].replace(" ", "_"), text)
        return [word.replace("_", " ") for word in _TOKEN.findall(joined)]


LEXICON = Lexicon(Path(__file__).with_name("lexicon.txt"))


@lru_cache(4096)
def _prompt_features(prompt: str) -> tuple[frozenset[str], tuple[str, ...], frozenset[str]]:
    """Return the classes, the genres and the stems of the words of a prompt."""
    words = LEXICON.words(prompt)
    classes = frozenset(name for word in words for name in LEXICON.classes(word)) - _GENERAL
    genres = tuple(name for name, pattern in _GENRES.items() if pattern.search(prompt))
    return classes, genres, frozenset(word[:5] for word in words if len(word) > 3)


def meaning(sentence: Sentence) -> list[str]:
    """Return the features of a sentence that depend on the classes of its words only."""
    in_prompt, genres, stems = _prompt_features(sentence.prompt)
    words = LEXICON.words(sentence.text)
    sequence = [
        [f"{name}~" if name in in_prompt else name for name in names]
        for word in words
        if (names := LEXICON.classes(word))
    ]
    present = sorted({name for names in sequence for name in names})
    features = [name for names in sequence for name in names]
    for pair in pairwise(sequence):
        features += map(">".join, product(*pair))
    for three in zip(sequence, sequence[1:], sequence[2:]):
        features.append(">".join(names[0] for names in three))
    features += map("&".join, combinations(present, 2))
    for name, pattern in _SHAPES.items():
        if pattern.search(sentence.text):
            features += [f"<{name}>", *(f"<{name}>&{other}" for other in (*present, *genres))]
    for genre in genres:
        features += [f"[{genre}]", f"[{genre}]", *(f"[{genre}]&{name}" for name in present)]
    size = sum(len(words) >= bound for bound in (3, 8, 20, 30))
    repeats = sum(word[:5] in stems for word in words if len(word) > 3)
    features += [
        f"place {sentence.place}",
        f"size {size}",
        *["repeats the prompt"] * min(repeats, 3),
    ]
    return features


def _text(sentence: Sentence) -> str:
    return sentence.text


def sentences(response: NormalizedResponse) -> tuple[list[Sentence], list[tuple[int, int]]]:
    """Return the sentences of a response that are not quoted or copied from the prompt.

    Returns:
        The sentences, and their positions in the folded text.
    """
    spans = response.sentences
    prompt = prompt_text(response.messages)
    own_sentences, positions = [], []
    for number, (start, end) in enumerate(spans):
        if not response.is_own(start, end):
            continue
        last = number == len(spans) - 1
        place = ("only" if last else "first") if number == 0 else "last" if last else "middle"
        words = _own_words(response, start, end)
        if any(map(LEXICON.classes, LEXICON.words(words))):  # others, such as data, say nothing
            own_sentences.append(Sentence(words, place, prompt))
            positions.append((start, end))
    return own_sentences, positions


def _own_words(response: NormalizedResponse, start: int, end: int) -> str:
    """Return a sentence with its end mark, in lower case, without code and longer quotations."""
    text, parts = response.normalized.text, []
    for first, last in response.quoted_near(start, end):
        long = last - first > _SHORT_QUOTATION or text[first] == "`"
        if start <= first and last <= end and long:
            parts.append(text[start:first])
            start = last
    parts.append(text[start : min(end + 1, len(text))])
    return '""'.join(parts).strip()[:_LONGEST_SENTENCE].lower()


@lru_cache(4096)
def prompt_text(messages: tuple[Message, ...]) -> str:
    """Return the text of the user's messages, in lower case."""
    return "\n".join(m.content for m in messages if m.role == "user").lower()


class Classifier:
    """Logistic regression over the features of sentences."""

    def __init__(self, rows: Iterable[tuple[Sequence[Message], str, str, str]]) -> None:
        """Train the classifier.

        Args:
            rows: Messages of the prompt, text, passage of the text that is an attack, and form of
                the attack; an empty passage and `NONE` for a harmless text.
        """
        examples: list[Sentence] = []
        labels: list[str] = []
        for messages, text, passage, form in rows:
            response = NormalizedResponse.create(messages, text)
            start = text.find(passage) if passage else len(text)
            for sentence, span in zip(*sentences(response)):
                piece = response.piece(*span).strip()
                inside = bool(passage) and start <= text.find(piece, start) < start + len(passage)
                examples.append(sentence)
                labels.append(form if inside else NONE)
        meanings = TfidfVectorizer(analyzer=meaning, sublinear_tf=True, min_df=2)
        words = TfidfVectorizer(
            preprocessor=_text, ngram_range=(1, 2), sublinear_tf=True, min_df=2,
            token_pattern=r"[a-z0-9']+",
        )  # fmt: skip
        # Parts of words: "evaluator" resembles "evaluation" where neither is in the lexicon.
        parts = TfidfVectorizer(
            preprocessor=_text, analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=3
        )
        self._model = Pipeline([
            ("features", FeatureUnion([("meaning", meanings), ("words", words), ("parts", parts)],
                                      transformer_weights={"words": 0.7, "parts": 0.7})),
            ("regression", LogisticRegression(C=10.0, tol=1e-3, max_iter=3000)),
        ])  # fmt: skip
        self._model.fit(examples, labels)
        self.forms = [str(name) for name in self._model.classes_]

    def probabilities(self, examples: Sequence[Sentence]) -> np.ndarray:
        """Return the probability of each of `forms` for each sentence, `[sentences, forms]`."""
        if not examples:
            return np.zeros((0, len(self.forms)))
        result: Any = self._model.predict_proba(examples)
        return np.asarray(result)

    def score(self, responses: Sequence[NormalizedResponse]) -> list[list[ScoredSentence]]:
        """Return the scored sentences of each response, without quoted or copied ones."""
        parts = [sentences(response) for response in responses]
        rows = self.probabilities([sentence for part, _ in parts for sentence in part])
        none = self.forms.index(NONE)
        attack = 1.0 - rows[:, none]
        rows[:, none] = -1.0
        scored = iter(zip(attack.tolist(), rows.argmax(axis=1).tolist()))
        return [
            [
                ScoredSentence(*span, probability, self.forms[form])
                for span, (probability, form) in zip(spans, scored)
            ]
            for _, spans in parts
        ]


@cache
def packaged_classifier() -> Classifier:
    """Return the classifier trained on the packaged fixtures of the split `develop`."""
    from alignment.monitors.detector_quality import PACKAGED, read_fixtures

    return Classifier(training_rows(read_fixtures(sorted(PACKAGED.glob("*.jsonl")))))


def training_rows(fixtures: Iterable[Any]) -> Iterable[tuple[Sequence[Message], str, str, str]]:
    """Yield the training data in fixtures: attacks with a wording, and harmless texts.

    Yields:
        Messages of the prompt, text, passage that is the attack, and form of the attack or `NONE`.
    """
    for fixture in fixtures:
        if fixture.split == "develop" and (fixture.wording or not fixture.fires):
            form = fixture.fires[0] if fixture.passage else NONE
            yield fixture.messages, fixture.text, fixture.passage, form
