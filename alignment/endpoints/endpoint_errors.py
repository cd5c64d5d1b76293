"""Errors of endpoints, and whether the same call may succeed later.

Servers report the same fault by status, by a code or type in the body, or by an error object in a
body of status 200. All of them are read here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

_PASSING_STATUSES = {408, 409, 425, 429}
_FATAL_STATUSES = {401, 402, 403, 404, 405, 410, 501}
# Codes and types of OpenAI, vLLM, Anthropic, Google and OpenRouter. They decide before the status:
# an exhausted quota comes as 429, and an unknown parameter as 400.
_FATAL_WORDS = {
    "access_terminated", "account_deactivated", "authentication_error",
    "billing_hard_limit_reached", "billing_not_active", "insufficient_quota",
    "invalid_api_key", "model_not_found",
    "permission_error", "unauthenticated", "unknown_parameter", "unsupported_parameter",
    "unsupported_value",
}  # fmt: skip
_PASSING_WORDS = {
    "api_error", "overloaded", "overloaded_error", "rate_limit_error", "rate_limit_exceeded",
    "resource_exhausted", "server_error", "service_unavailable", "timeout", "too_many_requests",
    "unavailable",
}  # fmt: skip
_REFUSED_WORDS = {
    "bad_request", "badrequesterror", "content_filter", "content_policy_violation",
    "context_length_exceeded", "invalid_argument", "invalid_request_error",
    "string_above_max_length",
}  # fmt: skip
# A parameter that is refused in one request is refused in every request.
_UNSUPPORTED = re.compile(
    r"(unsupported|unrecognized|unknown|unexpected) (request )?(parameter|argument|field|keyword)"
    r"|extra (inputs|fields) (are )?not permitted|not supported with this model"
)
_LONGEST = 200  # characters of an endpoint's message that are shown


class ErrorKind(Enum):
    """Consequence of an error for later calls."""

    PASSING = "the same call may succeed later"
    REFUSED = "this request will not be answered, others may be"
    FATAL = "no request will be answered"


class EndpointError(Exception):
    """Error of one attempt of a call.

    Attributes:
        kind: The consequence for later calls.
        seconds: The wait that the endpoint requests, in seconds, or None.
        tries: Maximum number of attempts that may end with this kind of error, because each may be
            billed; None for the limit of all attempts.
        may_be_billed: Whether the endpoint may bill the attempt as if it had been answered.
        status: The status of the answer; None if there was none, or a success.
    """

    def __init__(
        self,
        reason: str,
        kind: ErrorKind,
        seconds: float | None = None,
        tries: int | None = None,
        may_be_billed: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.kind, self.seconds, self.tries, self.status = kind, seconds, tries, status
        self.may_be_billed = may_be_billed or tries is not None


def load_json(content: bytes) -> Any:
    """Return the value of a body.

    Raises:
        ValueError: If the body is not JSON in UTF-8.
    """
    try:
        body = json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    # Google's endpoint wraps an error object in a list.
    return body[0] if isinstance(body, list) and len(body) == 1 else body


def error_in(body: Any) -> Any:
    """Return the error that a body of any status reports, or None."""
    if not isinstance(body, Mapping):
        return None
    if body.get("error"):
        return body["error"]
    if body.get("object") == "error":  # vLLM before 0.10
        return body
    if "choices" not in body and (
        keys := [k for k in ("detail", "message", "errors") if body.get(k)]
    ):
        return {**body, "message": body[keys[0]]}
    return None


def error_of_status(status: int, content: bytes, seconds: float | None) -> EndpointError:
    """Return the error of an answer whose status is not a success."""
    try:
        error = error_in(load_json(content))
    except ValueError:
        error = None
    text = message_of(error if error is not None else content.decode(errors="replace"))
    return EndpointError(f"status {status}: {text}", _kind(status, error), seconds, status=status)


def error_of_body(error: Any, seconds: float | None) -> EndpointError:
    """Return the error that an error object reports in an answer of status 200."""
    status = next((code for code in _codes(error) if isinstance(code, int)), None)
    code = "" if status is None else f", code {status}"
    reason = f"an error in an answer of status 200{code}: {message_of(error)}"
    return EndpointError(reason, _kind(status, error), seconds)


def message_of(error: Any) -> str:
    """Return the message of an endpoint on one line, shortened."""
    while isinstance(error, Mapping) and (inner := error.get("message") or error.get("error")):
        error = inner
    text = error if isinstance(error, str) else json.dumps(error, default=str)
    if "<" in text:
        text = re.sub(r"<(script|style)\b.*?</\1>|<[^<>]*>", " ", text, flags=re.DOTALL | re.I)
    return " ".join(text.split())[:_LONGEST] or "no message"


def _codes(error: Any) -> Iterator[int | str]:
    """Yield the codes of an error: statuses as integers, other codes in lower case."""
    while isinstance(error, Mapping):
        for name in ("code", "status", "type"):
            code = error.get(name)
            if isinstance(code, str) and code.isdecimal():
                code = int(code)
            if isinstance(code, str):
                yield code.lower()
            elif type(code) is int and 100 <= code <= 599:
                yield code
        error = error.get("error")


def _kind(status: int | None, error: Any) -> ErrorKind:
    words = {code for code in _codes(error) if isinstance(code, str)}
    if words & _FATAL_WORDS:
        return ErrorKind.FATAL
    if status in (400, 422) and _UNSUPPORTED.search(message_of(error).lower()):
        return ErrorKind.FATAL
    if status is not None:
        if status in _FATAL_STATUSES or 300 <= status < 400:
            return ErrorKind.FATAL
        passing = status in _PASSING_STATUSES or status >= 500
        return ErrorKind.PASSING if passing else ErrorKind.REFUSED
    if words & _REFUSED_WORDS and not words & _PASSING_WORDS:
        return ErrorKind.REFUSED
    return ErrorKind.PASSING
