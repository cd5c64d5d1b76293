"""Prompt templates of judges, which put untrusted text into fences that it cannot close.

A template is a text file with sections, each headed by a line `=== system ===` or `=== user ===`,
and placeholders: {prompt}, {response} or {response_a} and {response_b}, and {rubric} become fenced
text, {mark} becomes the mark of every fence, {rules} and {answer} the files of these names. Any
other placeholder, such as {reference}, becomes the fenced text of the column of this name in the
metadata of the prompt; {column:answer} is the form for a column whose name is a placeholder. The
inserted text is never read as a template, and a file that differs by a byte has another hash.
Every variant is a separate file, so that a reader sees what the judge sees.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from alignment.records import Message, Pair, Prompt, Response
from megatron_ext.errors import UserError

FOLDER = Path(__file__).with_name("prompts")
# Version of the format of conversations and fences.
_VERSION = 1
_SECTION = re.compile(r"^=== (system|user) ===\n", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{((?:column:)?[A-Za-z_][A-Za-z0-9_]*)\}")
_MATERIAL = {
    "pointwise": {"prompt", "response"},
    "pairwise": {"prompt", "response_a", "response_b"},
    "rubric": {"prompt"},
}


@dataclass(frozen=True)
class JudgePrompt:
    """Prompt template of a judge.

    Attributes:
        kind: "pointwise" (for a response), "pairwise" (for a pair) or "rubric" (for a prompt whose
            rubric the judge is to write).
        thinks: Whether the prompt requests thinking before the label.
        with_rubric: Whether the judge sees the rubric of the prompt.
        columns: Placeholders of columns of the prompt's metadata.
        sections: Role and text of each message, with the placeholders of the item.
        identity: A hash of everything except the item on which the messages depend.
    """

    kind: str
    thinks: bool
    with_rubric: bool
    columns: Sequence[str]
    sections: Sequence[tuple[str, str]]
    identity: str

    def messages(self, item: Prompt | Response | Pair, swapped: bool = False) -> list[Message]:
        """Return the messages that ask a judge about an item.

        Args:
            item: The item.
            swapped: Whether to show the second response of a pair first, as A.

        Raises:
            UserError: If the template is for another kind of item, or needs a rubric that the
                prompt does not have.
        """
        material = self._material(item, swapped)
        mark = mark_for(text for blocks in material.values() for _, text in blocks)
        filled = {
            name: "\n".join(fenced(label, text, mark) for label, text in blocks)
            for name, blocks in material.items()
        }
        filled["mark"] = mark
        return [
            Message(role, _PLACEHOLDER.sub(lambda match: filled[match[1]], text))
            for role, text in self.sections
        ]

    def check_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
        """Check that all prompts have the rubric and the columns that the template shows.

        Args:
            prompts: The prompts.
            source: The flag or file with the prompts, for the message.

        Raises:
            UserError: If a prompt lacks one.
        """
        for prompt in prompts:
            try:
                for column in self.columns:
                    _column_text(prompt, column.removeprefix("column:"))
                if self.with_rubric:
                    _rubric(prompt)
            except UserError as error:
                raise UserError(f"{source}: {error}") from None

    def _material(
        self, item: Prompt | Response | Pair, swapped: bool
    ) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Return the labeled texts for each placeholder."""
        prompt = item if isinstance(item, Prompt) else item.prompt
        material = {"prompt": [(f"{m.role} message", m.content) for m in prompt.messages]}
        if self.kind == "pointwise" and isinstance(item, Response):
            material["response"] = [("response", item.text)]
        elif self.kind == "pairwise" and isinstance(item, Pair):
            a, b = (item.second, item.first) if swapped else (item.first, item.second)
            material["response_a"] = [("response A", a)]
            material["response_b"] = [("response B", b)]
        elif self.kind != "rubric" or not isinstance(item, Prompt):
            raise UserError(
                f"A {self.kind} template cannot ask about a {type(item).__name__.lower()}. "
                "Choose another --template."
            )
        if self.with_rubric:
            material["rubric"] = [("rubric", _rubric(prompt))]
        for placeholder in self.columns:
            column = placeholder.removeprefix("column:")
            material[placeholder] = [(column, _column_text(prompt, column))]
        return material


def _rubric(prompt: Prompt) -> str:
    """Return the rubric of a prompt.

    Raises:
        UserError: The prompt has none.
    """
    if prompt.rubric is None:
        raise UserError(
            f"The prompt {prompt.id!r} has no rubric, but the template of the judge shows it. "
            "Write rubrics first with et-align annotate --rubrics, or choose a template without a "
            "rubric."
        )
    return prompt.rubric


def _column_text(prompt: Prompt, column: str) -> str:
    """Return the value of a column of a prompt's metadata as text.

    Raises:
        UserError: The prompt has no such column.
    """
    value = prompt.metadata.get(column)
    if value is None:
        near = get_close_matches(column, ["response", "rubric", *prompt.metadata], n=1)
        advice = f"Did you mean {{{near[0]}}}?" if near else "Name the column with --columns."
        raise UserError(
            f"The template of the judge shows {{{column}}}, and the prompt {prompt.id!r} has no "
            f"value in such a column, only in {', '.join(prompt.metadata) or 'none'}. {advice}"
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def judge_prompt(name: str, thinks: bool = False) -> JudgePrompt:
    """Return a template of this package, or of a file whose name begins with its kind.

    Args:
        name: "pointwise", "pointwise-rubric", "pairwise", "pairwise-rubric" or "rubric", or a path.
        thinks: Whether to ask for thinking before the label.

    Raises:
        UserError: If there is no such template, or it lacks a placeholder or has an unknown one.
    """
    path = Path(name) if name.endswith(".txt") else FOLDER / f"{name}.txt"
    kind = path.name.removesuffix(".txt").partition("-")[0]
    names = sorted(file.stem for file in FOLDER.glob("*.txt") if file.stem != "rules")
    if not path.is_file() or kind not in _MATERIAL:
        raise UserError(
            f"There is no judge prompt {name}. Choose one of {', '.join(names)}, or a file "
            f"{'-NAME.txt, '.join(_MATERIAL)}-NAME.txt."
        )
    text = path.read_text(encoding="utf-8")
    answer = f"{kind}-{'think' if thinks else 'label'}"
    parts = {"rules": _file("rules")}
    if kind != "rubric":
        parts["answer"] = _file(f"answers/{answer}")
    text = _PLACEHOLDER.sub(lambda match: parts.get(match[1], match[0]), text)
    before, *sections = _SECTION.split(text)
    if before.strip() or not sections:
        raise UserError(f"{path} must begin with a line === system === or === user ===.")
    used = set(_PLACEHOLDER.findall(text)) - {"mark"}
    reserved = {"rubric", "rules", "answer"}.union(*_MATERIAL.values())
    # A name similar to that of a text is a mistake; {column:NAME} is certainly a column.
    columns = sorted(n for n in used - reserved if not get_close_matches(n, reserved, 1, 0.8))
    allowed = _MATERIAL[kind] | ({"rubric"} if kind != "rubric" else set()) | set(columns)
    if wrong := sorted(used - allowed) or sorted(_MATERIAL[kind] - used):
        problem = "has an unknown" if wrong[0] in used else "lacks the"
        raise UserError(
            f"{path} {problem} placeholder {{{wrong[0]}}}. Correct the template. Write "
            "{column:NAME} for a column of the data with a similar name."
        )
    pairs = [(role, body.strip()) for role, body in zip(sections[::2], sections[1::2])]
    identity = sha256(repr((_VERSION, kind, pairs)).encode()).hexdigest()
    shows_rubric = "rubric" in used
    return JudgePrompt(kind, thinks and kind != "rubric", shows_rubric, columns, pairs, identity)


def _file(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip()


def mark_for(texts: Iterable[str]) -> str:
    """Return a mark of 16 letters that occurs in none of the texts and depends only on them."""
    texts = list(texts)
    trial = 0
    while True:
        digest = sha256(repr((trial, texts)).encode()).hexdigest()[:16]
        # Letters only, so that no tokenizer or model takes the mark for a number.
        mark = "".join(chr(ord("g") + int(digit, 16)) for digit in digest)
        if not any(mark in text for text in texts):
            return mark
        trial += 1


def fenced(label: str, text: str, mark: str) -> str:
    """Return a text between two lines with the mark.

    The mark does not occur in the text and contains no line break, so that neither a line of the
    text nor its end joined with the following text looks like a fence.

    Args:
        label: The label of the opening line.
        text: The text.
        mark: The mark; see `mark_for`.
    """
    assert mark not in text
    return f"<<< {label} {mark}\n{text}\n>>> {mark}"
