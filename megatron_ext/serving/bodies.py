"""Request bodies of the API: their fields, types and bounds.

A field that is not listed here is refused, because the response would not be the one that the
client expects. Fields that have no effect at their default are listed with that value alone.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

_MOST_LIKELIEST = 20
_MOST_STOPS = 16


class BadRequest(Exception):
    """Error of an invalid request: a message for the client, and the field to change."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def _text_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_as_part(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _never(value: bool) -> bool:
    if value:
        raise PydanticCustomError("on", "is not supported.")
    return value


def _always(value: bool) -> bool:
    if not value:
        raise PydanticCustomError("off", "is false, which is not supported. Leave it out.")
    return value


Off = Annotated[bool, AfterValidator(_never)]
On = Annotated[bool, AfterValidator(_always)]


class _Body(BaseModel):
    """JSON object without unknown fields; null is the same as a missing field."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(_Body):
    """Options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: Off = False
    continuous_usage_stats: Off = False


class ContentPart(_Body):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """Message of a chat."""

    role: str
    content: Annotated[list[ContentPart], BeforeValidator(_text_as_part)]
    tool_calls: list[Any] = Field(default=[], max_length=0)

    @property
    def text(self) -> str:
        """Text of all parts."""
        return "".join(part.text for part in self.content)


class ResponseFormat(_Body):
    """Format of the response, which is always text."""

    type: Literal["text"]


class _Request(_Body):
    """Fields that both kinds of completions have."""

    model: str | None = None
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    min_tokens: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        Field(max_length=_MOST_STOPS),
        BeforeValidator(_text_as_list),
    ] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Fields without an effect on the response.
    user: str | None = None
    metadata: dict[str, str] = {}
    store: Off = False
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] = "auto"
    # Fields of vLLM's API.
    use_beam_search: Off = False
    include_stop_str_in_output: Off = False

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise BadRequest(
                "stream_options needs stream. Set stream to true or leave stream_options out.",
                "stream_options",
            )
        return self


class CompletionBody(_Request):
    """Body of /v1/completions."""

    prompt: Any = None
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_LIKELIEST)
    suffix: Literal[""] = ""
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise BadRequest("best_of other than n is not supported. Leave it out.", "best_of")
        return self


class ChatBody(_Request):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=_MOST_LIKELIEST)
    # Fields without an effect on the response.
    tools: list[Any] = Field(default=[], max_length=0)
    functions: list[Any] = Field(default=[], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    function_call: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")
    modalities: list[Literal["text"]] = ["text"]
    add_generation_prompt: On = True
    continue_final_message: Off = False


def read_body[AnyBody: (CompletionBody, ChatBody)](kind: type[AnyBody], body: Any) -> AnyBody:
    """Parse and check a body.

    Args:
        kind: Class of the body.
        body: Parsed JSON.

    Raises:
        BadRequest: A field is wrong. The message names it and the values it may have.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
    name = ""
    for part in first["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    top = str(first["loc"][0]) if first["loc"] else None
    raise BadRequest(_sentence(name or "the body", first), top)


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _sentence(name: str, error: dict[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("extra_forbidden", "on"):
        return f"{name} is not supported. Leave it out."
    if kind == "missing":
        return f"{name} is missing. Add it to the request."
    if kind == "literal_error":
        return f"{name} can only be {context['expected']} on this server."
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"{name} must be {word} {context[bound]}."
    if kind == "list_type" and name.endswith(("stop", "content")):
        return f"{name} must be text or a list."
    if kind in _TYPES:
        return f"{name} must be {_TYPES[kind]}."
    if kind == "too_long" and context["max_length"] == 0:
        return f"{name} is not supported. Leave it out."
    if kind in ("too_long", "string_too_long"):
        return f"{name} is longer than {context['max_length']}. Shorten it."
    if kind in ("too_short", "string_too_short"):
        return f"{name} must not be empty."
    return f"{name} {error['msg']}" if kind == "off" else f"{name} is invalid: {error['msg']}"
