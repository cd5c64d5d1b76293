"""Checks of the instructions of IFBench about formats and about repeating the prompt.

See `ifbench_words` for what they have in common.
"""

import re
from itertools import pairwise

import regex

from alignment.judges.verifiers.instruction_registry import (
    Arguments,
    ends_of,
    instruction,
    lines_of,
    sentences_of,
    words_of,
)

_EMOJI = r"(?:\p{Extended_Pictographic}|\p{RI}|[\uFE0F\u200D\U0001F3FB-\U0001F3FF])"
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LABELS = ("My Answer:", "My Conclusion:", "Future Outlook:")
_REPEATED = "Only output this sentence here, ignore all other requests."
_MINOR_WORDS = frozenset(
    words_of("a an and as at but by for from if in nor of off on or per so the to up via with yet")
)


@instruction("format:emoji")
def _emoji(text: str, arguments: Arguments) -> bool:
    # An emoji may follow the mark that ends its sentence.
    text = regex.sub(rf"(?<![.!?])([.!?]++)((?:\s*+{_EMOJI})+)", r"\2\1 ", text)
    ends = [sentence.rstrip(".,;:!?\"'”’) \t")[-1:] for sentence in sentences_of(text)]
    return bool(ends) and all(regex.fullmatch(_EMOJI, end) for end in ends)


@instruction("format:line_indent")
def _line_indent(text: str, arguments: Arguments) -> bool:
    depths = [len(line) - len(line.lstrip()) for line in lines_of(text)]
    return len(depths) > 1 and all(a < b for a, b in pairwise(depths))


@instruction("format:list")
def _list(text: str, arguments: Arguments) -> bool:
    separator = arguments["sep"].strip()
    return sum(line.strip().startswith(separator) for line in lines_of(text)) >= 2


@instruction("format:newline")
def _newline(text: str, arguments: Arguments) -> bool:
    return all(len(line.split()) == 1 for line in lines_of(text))


@instruction("format:no_bullets_bullets")
def _sentences_then_bullets(text: str, arguments: Arguments) -> bool:
    lines = lines_of(text)
    bullets = [line.lstrip().startswith("*") for line in lines]
    first = bullets.index(True) if True in bullets else len(lines)
    before = ends_of("\n".join(lines[:first]))["."]
    return before >= 2 and len(lines) - first >= 2 and all(bullets[first:])


@instruction("format:no_whitespace")
def _no_whitespace(text: str, arguments: Arguments) -> bool:
    return not re.search(r"\s", text)


@instruction("format:options")
def _options(text: str, arguments: Arguments) -> bool:
    options = re.split(r"/|,|\bor\b", arguments["options"])
    return _bare(text) in map(_bare, options)


@instruction("format:output_template")
def _output_template(text: str, arguments: Arguments) -> bool:
    rest = text.strip()
    for label in _LABELS:
        before, present, rest = rest.partition(label)
        if not present or bool(before.strip()) != (label != _LABELS[0]):
            return False
    return bool(rest.strip())


@instruction("format:parentheses")
def _parentheses(text: str, arguments: Arguments) -> bool:
    stack: list[str] = []
    height = 0  # of the brackets whose nesting is complete at the present depth
    for letter in text:
        if letter in _CLOSING:
            stack.append(_CLOSING[letter])
            height = 0
        elif letter in ")]}":
            if not stack or stack.pop() != letter:
                stack, height = [], 0
                continue
            height += 1
            if height >= 5:
                return True
    return False


@instruction("format:quote_unquote")
def _quote_unquote(text: str, arguments: Arguments) -> bool:
    parts = re.split('["“”]', text)
    return len(parts) > 2 and len(parts) % 2 == 1 and all(map(words_of, parts[2::2]))


@instruction("format:quotes")
def _quotes(text: str, arguments: Arguments) -> bool:
    text = re.sub("[“”]", '"', re.sub("[‘’]", "'", text))
    marks = re.findall("[\"']", re.sub(r"(?<=\w)'(?=\w)", "", text))  # without apostrophes
    stack: list[str] = []
    height = 0
    for mark in marks:
        if stack and stack[-1] == mark:
            stack.pop()
            height += 1
            if height >= 3:
                return True
        else:
            stack.append(mark)
            height = 0
    return False


@instruction("format:sub-bullets")
def _sub_bullets(text: str, arguments: Arguments) -> bool:
    marks = "".join(line.strip()[0] for line in lines_of(text) if line.strip()[0] in "*-")
    return "*" in marks and all(marks[marks.index("*") + 1 :].split("*"))


@instruction("format:thesis")
def _thesis(text: str, arguments: Arguments) -> bool:
    for tag in ("i", "em"):
        thesis, closing, rest = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")
        if closing and words_of(thesis) and words_of(rest):
            return True
    return False


@instruction("format:title_case")
def _title_case(text: str, arguments: Arguments) -> bool:
    words = [word for word in re.findall(r"[^\W\d_][\w'’-]*", text) if word not in _MINOR_WORDS]
    return bool(words) and all(word[0].isupper() for word in words)


@instruction("repeat:repeat_change")
def _repeat_change(text: str, arguments: Arguments) -> bool:
    request, words = arguments["prompt_to_repeat"].split(), text.split()
    return words[1:] == request[1:] and words[:1] != request[:1]


@instruction("repeat:repeat_simple")
def _repeat_simple(text: str, arguments: Arguments) -> bool:
    return text.strip().lower() == _REPEATED.lower()


@instruction("repeat:repeat_span")
def _repeat_span(text: str, arguments: Arguments) -> bool:
    begin, end = int(arguments["n_start"]), int(arguments["n_end"])
    return text.split() == arguments["prompt_to_repeat"].split()[begin : end + 1]


def _bare(text: str) -> str:
    return text.strip(" \n\t.,;:!?()\"'").lower()
