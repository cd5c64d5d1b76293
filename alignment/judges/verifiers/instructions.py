"""Checks of the instructions of IFEval, such as a number of words.

The names and arguments are those of the datasets (`instruction_id_list` and `kwargs`). The checks
are written anew and need no language model and no download: sentences end at `.`, `!` or `?`, and
words are runs of letters and digits. Results are close to those of IFEval and IFBench, and not to
be compared with them. A response without a word follows no instruction.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Importing the modules of IFBench registers their instructions.
from alignment.judges.verifiers import ifbench_formats, ifbench_words  # noqa: F401
from alignment.judges.verifiers.instruction_registry import (
    CHECKS,
    Arguments,
    instruction,
    occurrences,
    sentences_of,
    words_of,
)

_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def _holds(count: float, relation: str | None, bound: float) -> bool:
    """Return whether a count is "at least", "at most", "less than" or "exactly" a bound."""
    relations = {
        "at least": count >= bound, "at most": count <= bound, "less than": count < bound,
        "more than": count > bound, "exactly": count == bound,
    }  # fmt: skip
    if relation is not None and relation not in relations:
        raise ValueError(f"the relation {relation!r} is none of {', '.join(relations)}")
    return relations[relation or "at least"]


@instruction("keywords:existence")
def _keywords(text: str, settings: Arguments) -> bool:
    return all(occurrences(word, text) for word in settings["keywords"])


@instruction("keywords:forbidden_words")
def _forbidden(text: str, settings: Arguments) -> bool:
    return not any(occurrences(word, text) for word in settings["forbidden_words"])


@instruction("keywords:frequency")
def _frequency(text: str, settings: Arguments) -> bool:
    return _holds(
        occurrences(settings["keyword"], text), settings.get("relation"), settings["frequency"]
    )


@instruction("keywords:letter_frequency")
def _letters(text: str, settings: Arguments) -> bool:
    count = text.lower().count(settings["letter"].lower())
    return _holds(count, settings.get("let_relation"), settings["let_frequency"])


@instruction("length_constraints:number_words")
def _number_of_words(text: str, settings: Arguments) -> bool:
    return _holds(len(words_of(text)), settings.get("relation"), settings["num_words"])


@instruction("length_constraints:number_sentences")
def _number_of_sentences(text: str, settings: Arguments) -> bool:
    return _holds(len(sentences_of(text)), settings.get("relation"), settings["num_sentences"])


@instruction("length_constraints:number_paragraphs")
def _number_of_paragraphs(text: str, settings: Arguments) -> bool:
    return len(_paragraphs(text, r"\s?\*\*\*\s?")) == settings["num_paragraphs"]


@instruction("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, settings: Arguments) -> bool:
    paragraphs = _paragraphs(text, r"\n\n")
    if len(paragraphs) != settings["num_paragraphs"] or settings["nth_paragraph"] > len(paragraphs):
        return False
    words = words_of(paragraphs[settings["nth_paragraph"] - 1])
    return bool(words) and words[0].lower() == settings["first_word"].lower()


@instruction("detectable_content:number_placeholders")
def _placeholders(text: str, settings: Arguments) -> bool:
    return len(re.findall(r"\[[^\[\]]*\]", text)) >= settings["num_placeholders"]


@instruction("detectable_content:postscript")
def _postscript(text: str, settings: Arguments) -> bool:
    marker = settings["postscript_marker"]
    pattern = r"\s*".join(re.escape(letter) for letter in marker if not letter.isspace())
    return re.search(rf"^\s*{pattern}", text, re.IGNORECASE | re.MULTILINE) is not None


@instruction("detectable_format:number_bullet_lists")
def _bullets(text: str, settings: Arguments) -> bool:
    return (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*\S", text, re.MULTILINE)) == settings["num_bullets"]
    )


@instruction("detectable_format:constrained_response")
def _constrained(text: str, settings: Arguments) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


@instruction("detectable_format:number_highlighted_sections")
def _highlights(text: str, settings: Arguments) -> bool:
    double = re.findall(r"\*\*[^\n*]+\*\*", text)
    single = re.findall(r"\*[^\n*]+\*", re.sub(r"\*\*[^\n*]+\*\*", "", text))
    return sum(bool(part.strip("* ")) for part in double + single) >= settings["num_highlights"]


@instruction("detectable_format:multiple_sections")
def _sections(text: str, settings: Arguments) -> bool:
    marks = re.findall(rf"\s?{re.escape(settings['section_spliter'])}\s?\d+\s?", text)
    return len(marks) >= settings["num_sections"]


@instruction("detectable_format:json_format")
def _json(text: str, settings: Arguments) -> bool:
    text = re.sub(r"\A\s*```(?:json)?|```\s*\Z", "", text, flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def _title(text: str, settings: Arguments) -> bool:
    return any(part.strip("<> \t") for part in re.findall(r"<<[^\n]+>>", text))


@instruction("combination:two_responses")
def _two_responses(text: str, settings: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inner = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(inner) == 2 and "" not in inner and inner[0] != inner[1]


@instruction("combination:repeat_prompt")
def _repeat(text: str, settings: Arguments) -> bool:
    return text.strip().lower().startswith(settings["prompt_to_repeat"].strip().lower())


@instruction("startend:end_checker")
def _ending(text: str, settings: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(settings["end_phrase"].strip().lower())


@instruction("startend:quotation")
def _quotation(text: str, settings: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' == text[-1]


@instruction("change_case:capital_word_frequency")
def _capital_words(text: str, settings: Arguments) -> bool:
    count = sum(word.isupper() for word in words_of(text))
    return _holds(count, settings.get("capital_relation"), settings["capital_frequency"])


@instruction("change_case:english_capital")
def _capitals(text: str, settings: Arguments) -> bool:
    return text.isupper()


@instruction("change_case:english_lowercase")
def _lower_case(text: str, settings: Arguments) -> bool:
    return text.islower()


@instruction("punctuation:no_comma")
def _no_comma(text: str, settings: Arguments) -> bool:
    return "," not in text


def follows(text: str, name: str, arguments: Arguments) -> bool:
    """Return whether a response follows an instruction.

    Args:
        text: The response.
        name: Name of the instruction, a key of `CHECKS`.
        arguments: Arguments of the instruction. Those without a value are left out.

    Raises:
        ValueError: If an argument is missing or of a wrong kind.
    """
    settings = {key: value for key, value in arguments.items() if value is not None}
    try:
        return CHECKS[name](text, settings) and bool(words_of(text))
    except KeyError as error:
        raise ValueError(f"{name} lacks the argument {error}") from None
    except (TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{name} has an argument of a wrong kind: {error}") from None


def check_instructions(names: Sequence[str], arguments: Sequence[Any]) -> str:
    """Return in a clause what is wrong with the instructions of a prompt, or ""."""
    if len(names) != len(arguments):
        return f"there are {len(names)} instructions and {len(arguments)} sets of arguments"
    for name, settings in zip(names, arguments):
        if not isinstance(settings, Mapping):
            return f"the arguments of {name} are {settings!r:.40}, and not a mapping"
        if name in CHECKS:
            try:
                follows("text", name, settings)
            except ValueError as error:
                return str(error)
    return ""
