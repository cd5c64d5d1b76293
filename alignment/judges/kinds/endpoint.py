"""Judge kind "endpoint": a model at an OpenAI-compatible endpoint."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alignment.endpoints.api_key import API_KEY_VARIABLE
from alignment.endpoints.chat_client import ChatSampling
from alignment.endpoints.cost_estimate import CALLS_PER_REPLICA, Speed
from alignment.endpoints.retry import MAX_WAIT, RetryPolicy
from alignment.endpoints.usage import Prices
from alignment.judges.kinds.command_settings import AnnotationSettings, CostSettings, JudgeFlags
from alignment.judges.kinds.judge_kind import MAY_CHANGE, JudgeConfig, JudgeContext
from alignment.judges.questions import Question, prompts_of
from alignment.output_file import OutputFile
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.judges.kinds.endpoint_judge import EndpointJudge

ENDPOINT_TIMEOUT = 600.0
"""Default time limit of one call, in seconds."""


def check_cost_settings(settings: "EndpointJudgeConfig") -> None:
    """Check settings of cost and speed against each other.

    Raises:
        UserError: Settings contradict each other.
    """
    if (settings.price_in is None) != (settings.price_out is None):
        present, missing = ("in", "out") if settings.price_out is None else ("out", "in")
        raise UserError(
            f"--price-{present} (price_{present} in a judge's file) requires --price-{missing} "
            f"(price_{missing}): a cost that lacks one of them would be too low. Set both, to 0 "
            "for tokens that are free."
        )
    if settings.price_cached is not None and settings.price_in is None:
        raise UserError(
            "--price-cached (price_cached in a judge's file) requires --price-in and --price-out."
        )
    if settings.max_cost is not None and settings.price_in is None:
        raise UserError(
            "--max-cost (max_cost in a judge's file) requires --price-in and --price-out (price_in "
            "and price_out), in dollars per million tokens."
        )
    if settings.answer_tokens is not None and settings.answer_tokens > settings.max_new_tokens:
        raise UserError(
            f"--answer-tokens {settings.answer_tokens:g} (answer_tokens in a judge's file) exceeds "
            f"the longest answer, --max-tokens {settings.max_new_tokens} (max_new_tokens). Lower "
            "the first or raise the second."
        )
    if settings.concurrency is not None and settings.concurrency < settings.replicas:
        raise UserError(
            f"--concurrency {settings.concurrency} (concurrency in a judge's file) is too low for "
            f"--replicas {settings.replicas} (replicas). Raise the first to at "
            f"least {settings.replicas}, or leave it out for {CALLS_PER_REPLICA} for each replica."
        )


class EndpointJudgeConfig(JudgeConfig):
    """Description of a judge at an endpoint.

    Attributes:
        url: Address of the endpoint up to and including /v1.
        model: Name of the model that the endpoint serves.
        revision: Version of the model, if one name serves several. Answers are stored under it.
        api_key_variable: Environment variable that holds the key of the endpoint.
        template: Name or file of the prompt template. Default: the plain one.
        thinking: Whether the judge writes its thinking before the label: "none", "asked" in its
            prompt, or "opened" by the chat template of its model.
        temperature: Sampling temperature.
        top_k: Number of likeliest tokens to sample from, or None for the default of the endpoint.
        top_p: Total probability of the likeliest tokens to sample from, or None for that default.
        max_new_tokens: Maximum number of tokens of an answer with its thinking.
        reasoning_effort: Reasoning effort, such as "high", for models that have it.
        seed: Seed of the first sample; each further sample has the next one.
        expected_score: Whether the score is the expectation over the probabilities of the labels.
        concurrency: Number of concurrent calls of one rank. Default: 64 for each replica.
        timeout: Time limit of one call, in seconds.
        tries: Maximum number of attempts of one call.
        first_wait: Longest wait after the first failed attempt, in seconds; it doubles up to a
            minute.
        max_wait: Longest wait that the endpoint may request, in seconds.
        requests_per_minute: Limit of the calls per minute, or None.
        tokens_per_minute: Limit of the tokens of prompts and answers per minute, or None.
        price_in: Price in dollars of a million prompt tokens, or None if it is not known.
        price_out: Price in dollars of a million answer tokens, or None if it is not known.
        price_cached: Price in dollars of a million prompt tokens that the endpoint had cached.
            Default: that of all prompt tokens.
        max_cost: Maximum cost of all calls in dollars, or None for no limit.
        replicas: Replicas of the model behind the address.
        tokens_per_second: Answer tokens per second of one replica, for estimates of the time.
        answer_tokens: Expected tokens of an answer, for estimates of the cost.
        tokenizer: Folder of the model's tokenizer, for estimates of the cost.
    """

    kind: Literal["endpoint"] = "endpoint"
    url: Annotated[str, Field(min_length=1), MAY_CHANGE]
    model: Annotated[str, Field(min_length=1)]
    revision: str = ""
    api_key_variable: Annotated[str, MAY_CHANGE] = API_KEY_VARIABLE
    template: str | None = None
    thinking: Literal["none", "asked", "opened"] = "none"
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 8192
    reasoning_effort: str | None = None
    seed: int | None = None
    expected_score: bool = True
    concurrency: Annotated[int | None, Field(ge=1), MAY_CHANGE] = None
    timeout: Annotated[float, Field(gt=0), MAY_CHANGE] = ENDPOINT_TIMEOUT
    tries: Annotated[int, Field(ge=1), MAY_CHANGE] = 12
    first_wait: Annotated[float, Field(ge=0), MAY_CHANGE] = 1.0
    max_wait: Annotated[float, Field(ge=0), MAY_CHANGE] = MAX_WAIT
    requests_per_minute: Annotated[float | None, Field(gt=0), MAY_CHANGE] = None
    tokens_per_minute: Annotated[float | None, Field(gt=0), MAY_CHANGE] = None
    price_in: Annotated[float | None, Field(ge=0), MAY_CHANGE] = None
    price_out: Annotated[float | None, Field(ge=0), MAY_CHANGE] = None
    price_cached: Annotated[float | None, Field(ge=0), MAY_CHANGE] = None
    max_cost: Annotated[float | None, Field(gt=0), MAY_CHANGE] = None
    replicas: Annotated[int, Field(ge=1), MAY_CHANGE] = 1
    tokens_per_second: Annotated[float | None, Field(gt=0), MAY_CHANGE] = None
    answer_tokens: Annotated[float | None, Field(gt=0), MAY_CHANGE] = None
    tokenizer: Annotated[str | None, MAY_CHANGE] = None

    @model_validator(mode="after")
    def check_cost(self) -> Self:
        """Check the settings of cost and speed against each other.

        Raises:
            UserError: Settings contradict each other.
        """
        check_cost_settings(self)
        return self

    @classmethod
    def from_flag(cls, argument: str, flags: JudgeFlags) -> Self:
        """Return the judge that `--judge URL --model NAME` names."""
        if not flags.model:
            raise UserError(
                f"--judge {argument} is an address and needs --model, the name that it serves."
            )
        return cls(
            name=flags.model,
            url=argument.rstrip("/"),
            model=flags.model,
            revision=flags.revision,
            api_key_variable=flags.api_key_variable or API_KEY_VARIABLE,
            template=flags.template,
            thinking=flags.thinking,  # type: ignore[arg-type]  # validated by pydantic
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            max_new_tokens=flags.max_tokens,
            reasoning_effort=flags.reasoning_effort,
            seed=flags.seed,
            expected_score=flags.expected_score,
            timeout=ENDPOINT_TIMEOUT if flags.timeout is None else flags.timeout,
            tries=flags.tries,
            first_wait=flags.first_wait,
            max_wait=MAX_WAIT if flags.max_wait is None else flags.max_wait,
        )

    @property
    def sampling(self) -> ChatSampling:
        """Return the sampling settings of an answer."""
        return ChatSampling(
            self.temperature,
            self.max_new_tokens,
            self.top_p,
            self.top_k,
            self.reasoning_effort,
            self.seed,
        )

    @property
    def retry_policy(self) -> RetryPolicy:
        """Return the limits on the duration and the repetition of a call."""
        return RetryPolicy(
            tries=self.tries,
            timeout=self.timeout,
            first_wait=self.first_wait,
            max_wait=self.max_wait,
        )

    @property
    def asks_endpoints(self) -> bool:
        """Return True, because verdicts may cost money."""
        return True

    @property
    def prices(self) -> Prices:
        """Return the prices of the endpoint."""
        return Prices(self.price_in, self.price_out, self.price_cached)

    @property
    def calls_at_a_time(self) -> int:
        """Return the number of concurrent calls."""
        return self.concurrency or CALLS_PER_REPLICA * self.replicas

    @property
    def speed(self) -> Speed:
        """Return the bounds of the speed of the endpoint."""
        return Speed(
            self.calls_at_a_time,
            self.replicas,
            self.tokens_per_second,
            self.requests_per_minute,
            self.tokens_per_minute,
        )

    def with_settings(self, settings: CostSettings) -> Self:
        """Return the judge with the settings of cost and speed of a command.

        Raises:
            UserError: Settings contradict each other.
        """
        changed = self.model_copy(update=settings.overrides)
        check_cost_settings(changed)
        return changed

    def open(self, context: JudgeContext) -> "EndpointJudge":
        """Return the judge, whose answers are stored in the folder of the context."""
        from alignment.judges.kinds.endpoint_judge import EndpointJudge

        store = context.store / f"{self.name}.answers"
        return EndpointJudge(self, context.pairwise, context.engine, store)

    def annotate(
        self, questions: Sequence[Question], output: OutputFile, settings: AnnotationSettings
    ) -> int:
        """Ask the questions that have no answer yet; see `annotate_by_endpoint`."""
        if settings.task == "judge":
            self.check_prompts(prompts_of(questions), "--input")
        from alignment.judges.endpoint_annotation import annotate_by_endpoint

        return annotate_by_endpoint(self.with_settings(settings.cost), questions, output, settings)

    def content_hashes(self) -> dict[str, Any]:
        """Return a hash of the prompt template if it is a file."""
        return self.hash_template(self.template)

    @property
    def report_kind(self) -> str:
        """Return the word for an endpoint in reports."""
        return "http"
