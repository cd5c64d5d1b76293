"""Rows of preferences of other projects: chosen and rejected answers, and pairs with a label."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from alignment.data.messages import (
    begins_transcript,
    check_order,
    is_json_messages,
    is_transcript,
    message_list,
    transcript,
    transcript_answer,
    transcript_prompt,
)
from alignment.data.people_labels import PersonLabel, parse_side, several_labels
from alignment.data.source_row import LabeledRecord, SourceRow, hash_id, pair_of, prompt_of
from alignment.records import Message, Pair, Side
from megatron_ext.errors import UserError

# Columns that change the meaning of a conversation. A row is refused if its value would be lost.
_CONTEXT = {
    "tools", "functions", "documents", "image", "images", "videos", "audio",
    "chat_template_kwargs",
}  # fmt: skip
_ENDS = re.compile(
    r"(?P<name>(?:response|answer|completion|output|conversation|assistant|human_ref)?)_?"
    r"(?P<end>first|second|left|right|[ab012])"
)
_BOOLEANS = {"": None, "true": True, "false": False}
_WORDS = re.compile(r"[^\W\d_]+|\d+")
_SIDES = (("first", "second"), ("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"))


def preference(row: SourceRow) -> list[LabeledRecord]:
    """Return the pair of a row with a chosen and a rejected answer."""
    opening = opening_of(row)
    chosen = with_system(row, conversation(row, "chosen", opening))
    rejected = with_system(row, conversation(row, "rejected", opening))
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected do not answer the same messages")
    check_context(row)
    tie, id, prompt_id = _is_tie(row), row.get("id"), row.get("prompt_id")
    annotator = row.get("annotator")
    prompt = prompt_of(
        chosen[:-1], row.source, prompt_id, row.get("rubric"), row.metadata()
    )  # fmt: skip
    texts = chosen[-1].content, rejected[-1].content
    if annotator is not None and id is None:
        id = hash_id(prompt.id, *sorted(texts))  # the item of all annotators of these texts
    pair = pair_of(prompt, *texts, row.source, id, tie)
    label = PersonLabel.of_side(pair.preferred, *(() if annotator is None else [str(annotator)]))
    if annotator is not None:
        pair = Pair(pair.id, prompt, pair.first, pair.second, None, row.source)
    return [LabeledRecord(pair, [label])]


def find_sides(columns: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of the two responses of a pair, or None if there are none.

    They have the same name up to their ends, such as response_a and response_b.
    """
    columns_by_end: dict[tuple[str, str], str] = {}
    for column in columns:
        if match := _ENDS.fullmatch(column.strip().lower().replace(" ", "_")):
            columns_by_end.setdefault((match["name"], match["end"]), column)
    for name in dict.fromkeys(name for name, _ in columns_by_end):
        for first, second in _SIDES:
            bare = not name and first not in ("first", "a")
            if not bare and (name, first) in columns_by_end and (name, second) in columns_by_end:
                return columns_by_end[name, first], columns_by_end[name, second]
    return None


def labeled_pair(row: SourceRow) -> list[LabeledRecord]:
    """Return the pair of a row with two responses and perhaps labels of which is better."""
    opening = opening_of(row)
    first = with_system(row, conversation(row, "first", opening))
    second = with_system(row, conversation(row, "second", opening))
    if first[:-1] != second[:-1]:
        raise UserError("the two responses do not answer the same messages")
    check_context(row)
    ends = _ends([row.options.columns.get(c, c) for c in map(row.column, ("first", "second"))])
    annotator = row.get("annotator")
    values = several_labels(row.get("label"), None if annotator is None else str(annotator))
    labels = [
        PersonLabel.of_side(parse_side(value, ends, row.options.labels, row.column("label")), name)
        for value, name in values
    ]
    id = row.get("id")
    prompt = prompt_of(
        first[:-1], row.source, row.get("prompt_id"), row.get("rubric"), row.metadata()
    )  # fmt: skip
    texts = first[-1].content, second[-1].content
    single = labels[0] if len(labels) == 1 and annotator is None else None
    side: Side | None = single.preferred if single else None
    name = str(id) if id is not None else hash_id(prompt.id, "pair", *texts)
    tied = single is not None and side is None
    return [LabeledRecord(Pair(name, prompt, *texts, side, row.source, tied), labels)]


def _ends(columns: Sequence[str]) -> tuple[str, str]:
    """Return the words and numbers in which two names of columns differ."""
    first, second = (_WORDS.findall(name) for name in columns)
    different = [pair for pair in zip(first, second) if pair[0] != pair[1]]
    if len(first) != len(second) or len(different) != 1:
        return columns[0], columns[1]
    return different[0]


def opening_of(row: SourceRow) -> list[Message] | None:
    """Return the messages of the prompt's column, or None if a row has none.

    In a row without a prompt, a conversation that the user ends is the prompt.
    """
    if row.peek("prompt") in (None, "", []) and _is_open(row.peek("messages")):
        row.assign("prompt", row.column("messages"))
    prompt = row.get("prompt")
    if isinstance(prompt, Mapping) and isinstance(prompt.get("messages"), list):
        prompt = prompt["messages"]  # OpenAI's preferences have them in the column input
    if prompt in (None, "", []):
        return None
    if not isinstance(prompt, str) or is_json_messages(prompt):
        return message_list(prompt, row.column("prompt"), row.omissions)
    return transcript_prompt(prompt) if is_transcript(prompt) else [Message("user", prompt)]


def _is_open(conversation: object) -> bool:
    """Return whether a value is a conversation that the user ends."""
    try:
        return message_list(conversation, "")[-1].role != "assistant"
    except UserError:
        return False


def conversation(row: SourceRow, role: str, opening: Sequence[Message] | None) -> list[Message]:
    """Return the messages of a conversation that ends with the answer of a column.

    The messages before the answer are in the same column, in the column of the prompt, or in both.

    Args:
        row: The row.
        role: Role of the column of the answer, such as chosen.
        opening: Messages of the column of the prompt; None where the row has none.

    Raises:
        UserError: There is no answer, nothing precedes it, or the two columns contradict each
            other.
    """
    value, prompt, column = row.get(role), row.get("prompt"), row.column(role)
    is_text = isinstance(prompt, str) and not is_json_messages(prompt)
    plain = is_text and not is_transcript(prompt)
    if value is None and opening is not None:
        raise UserError(f"{column} must be a list of messages or text, not null")
    if not isinstance(value, str) or is_json_messages(value):
        messages = message_list(value, column, row.omissions)
    elif opening is None or begins_transcript(value):
        messages = transcript(value)
    elif plain or not is_text:
        messages = [Message("assistant", value)]
    else:
        messages = [transcript_answer(value, column)]
    if opening is not None and messages[: len(opening)] != opening:
        if messages[0].role == "assistant" and (len(messages) == 1 or not plain):
            messages = [*opening, *messages]
            check_order(messages, f"{row.column('prompt')} with {column}")
        elif plain:
            _check_among(str(prompt), row.column("prompt"), messages[:-1])
        else:
            raise UserError(f"{column} does not begin with the messages of prompt")
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError(
            f"{column} does not end with an answer of the assistant to an earlier message"
        )
    return messages


def with_system(row: SourceRow, messages: list[Message]) -> list[Message]:
    """Return messages after the system message of a row that has one in its own column.

    Raises:
        UserError: The column is not text, or the messages have another system message.
    """
    system = row.get("system")
    if system in (None, "", []):
        return messages
    if not isinstance(system, str):
        raise UserError(f"{row.column('system')} must be text, not {type(system).__name__}")
    if messages[0].role != "system":
        return [Message("system", system), *messages]
    if system.strip() != messages[0].content.strip():
        raise UserError(
            f"the column {row.column('system')} and the conversation have different system messages"
        )
    return messages


def check_context(row: SourceRow) -> None:
    """Check that no column that belongs to the conversation is lost.

    Raises:
        UserError: There is such a column with a value.
    """
    for name in _CONTEXT & row.columns:
        if row.get(name) not in (None, "", "[]", [], {}):
            raise UserError(f"the column {name} is a part of the conversation but cannot be read")


def _check_among(text: str, column: str, messages: Sequence[Message]) -> None:
    if not any(text.strip() in message.content for message in messages):
        raise UserError(f"the text of the column {column} is in no message")


def _is_tie(row: SourceRow) -> bool:
    """Return whether the label of a pair is a tie.

    Raises:
        UserError: A label has the wrong type, or the score of `chosen` is below that of `rejected`.
    """
    tie = row.get("tie")
    tie = _BOOLEANS.get(tie.strip().lower(), tie) if isinstance(tie, str) else tie
    if tie not in (None, False, True):
        raise UserError("tie must be true or false")
    chosen, rejected = (_number(row, name) for name in ("score_chosen", "score_rejected"))
    if chosen is None or rejected is None:
        return bool(tie)
    if chosen < rejected:
        raise UserError("score_chosen is below score_rejected")
    return bool(tie) or chosen == rejected


def _number(row: SourceRow, name: str) -> float | None:
    score = row.get(name)
    if score in (None, ""):
        return None
    try:
        number = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError("score_chosen and score_rejected must be finite numbers")
    return number


def mapping_of(value: object, name: str) -> Mapping[str, object]:
    """Return a value that must be a mapping."""
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be an object, not {type(value).__name__}")
    return value
