"""Answers of chat endpoints of all formats, as instances of one class."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alignment.endpoints.endpoint_errors import (
    EndpointError,
    ErrorKind,
    error_in,
    error_of_body,
    load_json,
)
from alignment.judges.formats.label_log_probs import LabelLogProbs, read_label_log_probs

# An answer that is cut off in transmission is billed, so that it is requested only once more, and
# not --tries times.
_TRIES_OF_TORN = 2
_MOST_TOKENS = 1 << 40
_FILTERED = "content_filter"
_BROKEN = {"error", "abort", "cancelled"}  # reasons to finish that are faults of the endpoint


@dataclass(frozen=True)
class Answer:
    """Paid answer of an endpoint.

    Attributes:
        text: The text of the answer.
        thinking: The thinking, if the endpoint returns it in a separate field.
        finish: Reason why the text ends; "length" for a text that was cut off.
        prompt_tokens: Tokens of the prompt; None if the endpoint does not report them.
        completion_tokens: Tokens of the answer; None if the endpoint does not report them.
        labels: Log-probabilities of the labels, see `LabelLogProbs`; None if there are none that
            can be read.
        model: Name of the model by the endpoint, or "".
        problem: Reason why the text is not an answer of the model (a refusal, a content filter, a
            tool call); "" if it is one.
        label_problem: Reason why `labels` is None although they were requested.
        cached_tokens: Number of prompt tokens that the endpoint had cached; None if it does not
            report them.
    """

    text: str
    thinking: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    labels: LabelLogProbs | None = None
    model: str = ""
    problem: str = ""
    label_problem: str = ""
    cached_tokens: int | None = None

    def to_row(self) -> dict[str, Any]:
        """Return the answer as plain values."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Answer":
        """Return the answer of a row."""
        answer = cls(**row)
        if answer.labels:  # rows of earlier versions lack the third value
            labels = [(entry[0], entry[1], *entry[2:], 0.0)[:3] for entry in answer.labels]
            object.__setattr__(answer, "labels", labels)
        return answer

    @property
    def missing(self) -> str:
        """Return the reason why the model wrote no text, or "" if it did."""
        if self.problem:
            return self.problem
        return self.cut_off if self.finish == "length" and not self.text.strip() else ""

    @property
    def cut_off(self) -> str:
        """Return a phrase on where the answer was cut off."""
        tokens = self.completion_tokens
        return (
            "cut off at the limit of tokens" if tokens is None else f"cut off after {tokens} tokens"
        )


class _Unusable(Exception):
    """Error of a part of an answer that cannot be read."""


def read_answer(content: bytes, log_probs: bool = False, seconds: float | None = None) -> Answer:
    """Read the body of an answer of status 200.

    Args:
        content: The body.
        log_probs: Whether the log-probabilities of labels were requested.
        seconds: The wait that the endpoint requests, in seconds, for errors.

    Raises:
        EndpointError: If the body reports an error, or is not an answer of the chat API. The same
        call
            may succeed later if the body was torn or is that of a proxy; a body of another shape
            would recur, so that the call is not repeated.
    """
    try:
        body = load_json(content)
    except ValueError:
        torn = content.lstrip()[:1] == b"{"
        problem = "JSON that is cut short or damaged" if torn else "not JSON"
        begins = content[:40].decode(errors="replace")
        reason = (
            f"an answer of status 200 is {problem}: {begins!r}" if content else "an empty answer"
        )
        tries = _TRIES_OF_TORN if torn else None
        raise EndpointError(reason, ErrorKind.PASSING, seconds, tries) from None
    choice = _first(body.get("choices")) if isinstance(body, Mapping) else None
    error = error_in(body) or (choice.get("error") if isinstance(choice, Mapping) else None)
    if error:
        raise error_of_body(error, seconds)
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        lacks = "choices" if choice is None else "message"
        raise EndpointError(
            f"an answer of status 200 is not one of the chat API: it has no {lacks}",
            ErrorKind.REFUSED,
            may_be_billed=True,
        )
    finish = choice.get("finish_reason")
    if isinstance(finish, str) and finish in _BROKEN:
        reason = f"the endpoint ended the answer with finish_reason {finish}"
        raise EndpointError(reason, ErrorKind.PASSING, seconds, _TRIES_OF_TORN)
    return _read(body, choice, message, finish if isinstance(finish, str) else "", log_probs)


def _read(
    body: Mapping[str, Any],
    choice: Mapping[str, Any],
    message: Mapping[str, Any],
    finish: str,
    log_probs: bool,
) -> Answer:
    text, thinking, problem = "", "", ""
    try:
        text, thinking = _content(message)
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal.strip() and not text.strip():
            problem = f"the model refused: {refusal.strip()[:200]}"
        elif (message.get("tool_calls") or message.get("function_call")) and not text.strip():
            problem = "the answer is a call of a tool, without text"
        elif finish == _FILTERED:
            problem = "the endpoint's content filter stopped the answer"
        elif message.get("content") is None and finish != "length":
            problem = "the answer has no content"
    except _Unusable as error:
        problem = str(error)
    labels, label_problem = None, ""
    if log_probs:
        try:
            labels = read_label_log_probs(choice.get("logprobs"))
        except ValueError as error:
            label_problem = str(error)
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    model = body.get("model")
    return Answer(
        text=text,
        thinking=thinking,
        finish=finish,
        prompt_tokens=_count(usage, "prompt_tokens", "input_tokens"),
        completion_tokens=_count(usage, "completion_tokens", "output_tokens"),
        labels=labels,
        model=_whole(model.strip()) if isinstance(model, str) else "",
        problem=_whole(problem),
        label_problem=label_problem,
        cached_tokens=_cached(usage),
    )


def _first(choices: Any) -> Any:
    return choices[0] if isinstance(choices, list) and choices else None


def _content(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return text and thinking without lone surrogates, which JSON permits."""
    text: list[str] = []
    thinking: list[str] = []
    for is_text, part in _parts(message.get("content")):
        (text if is_text else thinking).append(part)
    for name in ("reasoning_content", "reasoning"):
        if not thinking and message.get(name):
            thinking = [part for _, part in _parts(message[name])]
    for part in (*text, *thinking):
        if _whole(part) != part:
            raise _Unusable("the answer's text contains a lone surrogate")
    return "".join(text), "".join(thinking)


def _parts(content: Any) -> Iterator[tuple[bool, str]]:
    """Yield the texts of a message's content, each with whether it is not thinking."""
    if content is None:
        return
    if isinstance(content, str):
        yield True, content
        return
    if isinstance(content, list):
        for part in content:
            yield from _parts(part)
        return
    if not isinstance(content, Mapping):
        raise _Unusable(f"the answer's content is not text but {content!r:.40}")
    kind = content.get("type", "text")
    if kind in ("text", "output_text") and isinstance(content.get("text"), str):
        yield True, content["text"]
    elif kind in ("thinking", "reasoning"):
        inner = content.get(kind, content.get("text"))
        yield from ((False, text) for _, text in _parts(inner))
    elif kind == "redacted_thinking":
        return
    elif kind == "refusal":
        raise _Unusable(f"the model refused: {str(content.get('refusal', ''))[:200]}")
    else:
        raise _Unusable(f"the answer has a part of type {kind!r:.40} without text")


def _whole(text: str) -> str:
    """Replace lone surrogates."""
    return text.encode(errors="replace").decode()


def _cached(usage: Mapping[str, Any]) -> int | None:
    """Return the tokens of the prompt that were cached, by the names of OpenAI and DeepSeek."""
    details = usage.get("prompt_tokens_details")
    if isinstance(details, Mapping) and details.get("cached_tokens") is not None:
        return _count(details, "cached_tokens")
    return _count(usage, "prompt_cache_hit_tokens")


def _count(usage: Mapping[str, Any], *names: str) -> int | None:
    """Return a count of tokens, or None if the endpoint reports no integer."""
    value = next((usage[name] for name in names if usage.get(name) is not None), None)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None
