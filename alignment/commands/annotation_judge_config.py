"""Flags of the judge of `et-align annotate`, `evaluate` and `monitor`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignment.commands.config_groups import Thinking
from alignment.endpoints.api_key import API_KEY_VARIABLE
from alignment.endpoints.retry import MAX_WAIT
from alignment.judges.formats.scale import check_scale
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag


@dataclass(frozen=True, kw_only=True)
class AnnotationJudgeConfig:
    """Judge."""

    judge: str = flag("", metavar="URL")
    """Judge: http://HOST:PORT/v1 of an OpenAI-compatible endpoint; rule or rule:NAME;
    function:FILE.py:NAME, a function from a Response to a score; numeric-answer:COLUMN or another
    verifier; or FILE.yaml, which describes a judge of any kind."""
    model: str = flag("", metavar="NAME")
    """Name under which the endpoint serves the model; required for an endpoint."""
    revision: str = flag("", metavar="TEXT")
    """Revision of the model, which distinguishes the answers of models served under one name."""
    api_key_variable: str = flag(API_KEY_VARIABLE, metavar="NAME")
    """Environment variable with the key of the endpoint."""
    rule_text: str | None = flag(None, metavar="FILE")
    """Text that --judge rule regards as fluent, as JSONL, Parquet or plain text; required for a
    rule. Default: none."""
    scale: tuple[float, float] | None = flag(None, metavar="LOW HIGH")
    """Lowest and highest score of a function, whose scores are mapped to 0 to 9. Default: 0 9."""
    samples: int = flag(1, metavar="N", at_least=1)
    """Number of answers to each question."""
    template: str | None = flag(None, metavar="NAME")
    """Template of the judge's prompt: pointwise or pairwise, optionally with the suffix -rubric or
    -reference, or a file. Default: pointwise for responses, pairwise for pairs."""
    thinking: Thinking = flag("none")
    """Whether the judge thinks in <think> before its label. By choice: it does not think, its
    prompt asks it to think, or the model's chat template has opened <think>."""
    expected_score: bool = flag(False)
    """Take as score the mean of the labels 0 to 9, weighted by their probabilities at the place of
    the label. Without the flag the score is the label that the judge writes."""
    temperature: float = flag(0.0, at_least=0)
    """Sampling temperature of the answers; 0 always takes the likeliest token."""
    top_p: float | None = flag(None, metavar="P", above=0, at_most=1)
    """Sample only from the likeliest tokens that together have this probability. Default: that of
    the endpoint."""
    top_k: int | None = flag(None, metavar="N", at_least=0)
    """Sample from this number of likeliest tokens only. Default: that of the endpoint."""
    max_tokens: int = flag(8192, metavar="TOKENS", at_least=1)
    """Maximum length of an answer, with its thinking, in tokens."""
    reasoning_effort: str | None = flag(None, metavar="LEVEL")
    """Reasoning effort for models that support it, such as low, medium or high. Default: that of
    the endpoint."""
    seed: int | None = flag(None, at_least=0)
    """Seed of the first answer to a question; each further answer uses the next seed. Default: no
    seed is sent."""
    concurrency: int | None = flag(None, metavar="N", at_least=1)
    """Maximum number of calls that are in progress at a time. Default: 64 for each of
    --replicas."""
    replicas: int | None = flag(None, metavar="N", at_least=1)
    """Number of replicas of the model behind the address. Default: 1."""
    tokens_per_second: float | None = flag(None, metavar="N", above=0)
    """Number of answer tokens that one replica generates per second with 64 calls at a time, from
    which the duration is estimated. Default: unknown."""
    requests_per_minute: float | None = flag(None, metavar="N", above=0)
    """Maximum number of calls per minute. Default: no limit."""
    tokens_per_minute: float | None = flag(None, metavar="N", above=0)
    """Maximum number of tokens, of prompts and answers together, per minute. Default: no limit."""
    timeout: float | None = flag(None, metavar="SECONDS", above=0)
    """Time limit of one call in seconds. Default: 600 for an endpoint, 60 for a function."""
    tries: int = flag(7, metavar="N", at_least=1)
    """Maximum number of attempts at a call; after the last one the call counts as failed."""
    first_wait: float = flag(1.0, metavar="SECONDS", at_least=0)
    """Maximum wait after the first failed attempt at a call, in seconds. It doubles with each
    further attempt."""
    max_wait: float = flag(MAX_WAIT, metavar="SECONDS", at_least=0)
    """Maximum wait that the endpoint may request, in seconds. If it requests a longer one, the run
    ends."""
    max_failed: float = flag(0.05, metavar="SHARE", at_least=0, at_most=1)
    """Share of the questions that may end without a result, from 0 to 1. If more do, the command
    ends with status 3."""
    price_in: float | None = flag(None, metavar="DOLLARS", at_least=0)
    """Price in dollars of a million prompt tokens. Default: unknown; no cost is reported."""
    price_out: float | None = flag(None, metavar="DOLLARS", at_least=0)
    """Price in dollars of a million answer tokens. Default: unknown; no cost is reported."""
    price_cached: float | None = flag(None, metavar="DOLLARS", at_least=0)
    """Price in dollars of a million prompt tokens that the endpoint had cached. Default: that of
    --price-in."""
    max_cost: float | None = flag(None, metavar="DOLLARS", above=0)
    """Maximum cost of all answers in dollars, including those of earlier runs in the same --cache.
    The run ends with status 4 before it would exceed this limit. To resume it, raise the limit.
    Default: no limit."""
    answer_tokens: float | None = flag(None, metavar="TOKENS", above=0)
    """Expected number of tokens of an answer, from which the cost is estimated. Default: the mean
    of the answers in --cache. If there are none: 8 for a label alone, otherwise 1500."""
    tokenizer: str | None = flag(None, metavar="DIR")
    """Folder of the tokenizer of the judge's model, which counts the tokens of prompts. Default:
    that of --model, if it is a folder or in the cache of Hugging Face; otherwise tokens are
    estimated from characters."""
    cache: str | None = flag(None, metavar="FILE")
    """File that stores the answers. Several runs can use it, but not at the same time. Default:
    OUTPUT.answers.jsonl."""

    @property
    def at_endpoint(self) -> bool:
        """Whether the judge is a model at an address."""
        return self.judge.startswith(("http://", "https://"))

    def check(self, generate: bool = False, rubrics: bool = False) -> None:
        """Check the flags of the judge against each other.

        Args:
            generate: Whether responses are generated.
            rubrics: Whether rubrics are written.

        Raises:
            UserError: Flags are incompatible.
        """
        if self.cache and Path(self.cache).is_dir():
            raise UserError(f"--cache {self.cache} is a folder. Give a file.")
        if self.scale:
            if not self.judge.startswith("function:"):
                raise UserError(
                    "--scale requires --judge function:...: other judges score from 0 to 9."
                )
            check_scale(self.scale, "--scale")
        if not self.at_endpoint:
            self._check_program(generate, rubrics)
            return
        self._check_address()
        if not self.model:
            raise UserError(
                f"--judge {self.judge} requires --model, the name that the endpoint serves."
            )
        if rubrics and (generate or self.samples > 1 or self.template):
            raise UserError(
                "--rubrics is incompatible with --generate, --template and --samples above 1."
            )
        if self.expected_score and (rubrics or generate):
            task = "--rubrics" if rubrics else "--generate"
            raise UserError(f"--expected-score is incompatible with {task}, which does not judge.")
        if self.rule_text:
            raise UserError("--rule-text requires --judge rule.")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples {self.samples} at --temperature 0 would pay for the same answer again. "
                "Give a temperature above 0, for example 0.7."
            )

    def check_unused(self) -> None:
        """Check that no flag of a judge is set, for a command without one.

        Raises:
            UserError: A flag would have no effect.
        """
        for entry in fields(self):
            # Verdicts in files, too, may have failed.
            if entry.name != "max_failed" and getattr(self, entry.name) != entry.default:
                option = f"--{entry.name.replace('_', '-')}"
                raise UserError(f"{option} requires --judge. Add it, or leave {option} out.")

    def _check_program(self, generate: bool, rubrics: bool) -> None:
        """Refuse flags of an endpoint for a judge that is not at an endpoint."""
        if "://" in self.judge:
            raise UserError(
                f"--judge {self.judge} is neither http://HOST:PORT/v1, nor rule, rule:NAME, "
                "function:FILE.py:NAME or FILE.yaml."
            )
        used: dict[str, Any] = {
            "--model": self.model, "--generate": generate, "--rubrics": rubrics,
            "--expected-score": self.expected_score, "--cache": self.cache,
            "--template": self.template,
        }  # fmt: skip
        in_file = self.judge.endswith((".yaml", ".yml"))
        if in_file:  # of a judge whose kind is not known here
            used = {"--model": self.model, "--expected-score": self.expected_score,
                    "--template": self.template}  # fmt: skip
        for option, value in used.items():
            if value:
                fix = "Write it into the file" if in_file else "Leave it out"
                raise UserError(
                    f"{option} requires a judge at an endpoint, and --judge is {self.judge}. {fix}."
                )

    def _check_address(self) -> None:
        try:
            parts = urlsplit(self.judge)
            valid = parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid or parts.query or parts.fragment:
            raise UserError(
                f"--judge {self.judge} is neither http://HOST:PORT/v1, nor rule, rule:NAME, "
                "function:FILE.py:NAME or FILE.yaml."
            )
        if parts.username or parts.password:
            raise UserError(
                "--judge must not contain a key, which others could read. Set "
                f"{API_KEY_VARIABLE} instead."
            )
