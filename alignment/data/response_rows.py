"""Rows of prompts, responses and conversations of other projects."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from alignment.data.messages import is_transcript, message_list, transcript
from alignment.data.people_labels import PersonLabel, score_label, several_labels
from alignment.data.preference_rows import (
    check_context,
    conversation,
    mapping_of,
    opening_of,
    with_system,
)
from alignment.data.source_row import LabeledRecord, SourceRow, hash_id, prompt_of
from alignment.records import Message, Prompt, Response
from megatron_ext.errors import UserError

_RATING_ROLES = ("score", "label")


def answered(row: SourceRow) -> list[LabeledRecord]:
    """Return the response of a row with a prompt and an answer, or its prompt without an answer."""
    opening = opening_of(row)
    if opening is None:
        raise UserError(f"{row.column('prompt')} is empty")
    return [_answer(row, opening)]


def prompt_only(row: SourceRow) -> list[LabeledRecord]:
    """Return the prompt of a row without an answer."""
    opening = opening_of(row)
    if opening is None:
        raise UserError(f"{row.column('prompt')} is empty")
    return [LabeledRecord(_prompt(row, with_system(row, opening)))]


def alpaca(row: SourceRow) -> list[LabeledRecord]:
    """Return the response of a row with an instruction and perhaps an input, or its prompt."""
    instruction, context = row.get("prompt"), row.get("input")
    for name, value in ((row.column("prompt"), instruction), ("input", context)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{name} must be text, not {type(value).__name__}")
    if not instruction or not instruction.strip():
        raise UserError(f"{row.column('prompt')} is empty")
    question = f"{instruction}\n\n{context}" if context and context.strip() else instruction
    opening = [*_history(row.get("history")), Message("user", question)]
    return [_answer(row, opening)]


def _history(value: Any) -> list[Message]:
    """Return earlier turns, pairs of a question and its answer."""
    messages: list[Message] = []
    for turn in value or []:
        if not (isinstance(turn, Sequence) and len(turn) == 2 and all(map(_is_text, turn))):
            raise UserError("history must be a list of pairs of a question and its answer")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    return messages


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _answer(row: SourceRow, opening: list[Message]) -> LabeledRecord:
    """Return the response to messages that is in the column of the response."""
    value, column = row.get("response"), row.column("response")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{column} is empty")
    messages = conversation(row, "response", opening)
    return _response(row, with_system(row, messages))


def _prompt(row: SourceRow, messages: Sequence[Message]) -> Prompt:
    check_context(row)
    prompt_id, id, rubric = row.get("prompt_id"), row.get("id"), row.get("rubric")
    id = id if id is not None else prompt_id
    return prompt_of(messages, row.source, id, rubric, row.metadata())


def _response(
    row: SourceRow, messages: Sequence[Message], labels: Sequence[PersonLabel] | None = None
) -> LabeledRecord:
    """Return the response that is the last of several messages, with its ratings by people."""
    check_context(row)
    if labels is None:
        labels = _ratings(row)
    id, prompt_id, rubric = row.get("id"), row.get("prompt_id"), row.get("rubric")
    prompt = prompt_of(messages[:-1], row.source, prompt_id, rubric, row.metadata())
    text = messages[-1].content
    name = str(id) if id is not None else hash_id(prompt.id, text)
    return LabeledRecord(Response(name, prompt, text, row.source), labels)


def note_ratings(row: SourceRow) -> None:
    """Add the roles whose column has ratings that can be read to the row's `rating_roles`."""
    for role in _RATING_ROLES:
        with suppress(UserError):
            if _labels(row, role, None):
                row.rating_roles.add(role)


def _labels(row: SourceRow, role: str, annotator: str | None) -> list[PersonLabel]:
    column, values = row.title(role), several_labels(row.peek(role), annotator)
    return [score_label(value, who, row.options.labels, column) for value, who in values]


def _ratings(row: SourceRow) -> list[PersonLabel]:
    """Return the ratings of a response.

    The column stays in the metadata too, unless it is that of one of several annotators.

    Raises:
        UserError: A rating cannot be read.
    """
    annotator = row.peek("annotator")
    name = None if annotator is None else str(annotator)
    for role in _RATING_ROLES:
        is_explicit = role in row.options.columns
        try:
            labels = _labels(row, role, name)
        except UserError as error:
            # A column that the user has not named may be something else, such as a category.
            if is_explicit or row.options.labels:
                raise
            if role in row.rating_roles:
                column = row.title(role)
                raise UserError(
                    f"{error}; if {column} has no ratings, name it otherwise, as in --columns "
                    f"other={column}"
                ) from None
            continue
        if labels:
            row.rating_roles.add(role)
            if name is not None or is_explicit:
                row.get(role)
                row.get("annotator")
            return labels
    return []


def chat(row: SourceRow) -> list[LabeledRecord]:
    """Return the response that ends a conversation, or the conversation as a prompt."""
    value, column = row.get("messages"), row.column("messages")
    if value in (None, "", []):
        raise UserError(f"{column} must be a list of messages, not empty")
    if isinstance(value, str) and is_transcript(value):
        messages = transcript(value)
        if messages[-1] == Message("assistant", ""):
            messages.pop()
    else:
        messages = message_list(value, column, row.omissions)
    messages = with_system(row, messages)
    if messages[-1].role == "system":
        raise UserError(f"{column} has no message of the user")
    if messages[-1].role != "assistant":
        return [LabeledRecord(_prompt(row, messages))]
    if len(messages) == 1:
        raise UserError(f"{column} has an answer of the assistant without a message before it")
    return [_response(row, messages)]


def completions(row: SourceRow) -> list[LabeledRecord]:
    """Return the responses of a row with several completions, as UltraFeedback has them."""
    opening = opening_of(row)
    if opening is None:
        raise UserError(f"{row.column('prompt')} is empty")
    opening = with_system(row, opening)
    entries = row.get("completions")
    if not isinstance(entries, list) or not entries:
        raise UserError("completions must be a list of at least one answer")
    annotator, column, ratings = _ratings_of_completions(row, entries)
    prompt = _prompt(row, opening)
    records: list[LabeledRecord] = []
    for place, item in enumerate(entries):
        answer = mapping_of(item, "an entry of completions")
        text = answer.get("response") or answer.get("completion") or answer.get("text")
        if not isinstance(text, str):
            raise UserError(f"entry {place + 1} of completions has no response")
        source = str(answer.get("model") or row.source)
        values = several_labels(ratings[place], annotator)
        labels = [score_label(value, who, row.options.labels, column) for value, who in values]
        name = hash_id(prompt.id, text, source)
        records.append(LabeledRecord(Response(name, prompt, text, source), labels))
    return records


def _ratings_of_completions(
    row: SourceRow, entries: Sequence[Any]
) -> tuple[str | None, str, Sequence[Any]]:
    """Return the annotator, the name of the column of the ratings, and the rating of each entry."""
    annotator = row.get("annotator") if "annotator" in row.options.columns else None
    name = None if annotator is None else str(annotator)
    if "score" not in row.options.columns:
        default = next((n for n in ("overall_score", "score") if _has(entries, n)), "score")
        ratings = [mapping_of(entry, "an entry of completions").get(default) for entry in entries]
        return name, f"completions.{default}", ratings
    column, ratings = row.title("score"), row.get("score")
    if ratings is None:
        return name, column, [None] * len(entries)
    if not isinstance(ratings, list) or len(ratings) != len(entries):
        raise UserError(
            f"{column} must have one rating for each of the {len(entries)} completions, as "
            "completions.overall_score has"
        )
    return name, column, ratings


def _has(entries: Sequence[Any], name: str) -> bool:
    return any(isinstance(entry, Mapping) and entry.get(name) is not None for entry in entries)


def arena_hard(row: SourceRow) -> list[LabeledRecord]:
    """Return a question of Arena-Hard."""
    question, category = row.get("prompt"), row.get("category")
    if not isinstance(question, str):
        raise UserError(f"prompt must be text, not {str(question)[:60]!r}")
    source, id = f"arena-hard/{category}", row.get("uid")
    return [LabeledRecord(prompt_of([Message("user", question)], source, id, None, row.metadata()))]
