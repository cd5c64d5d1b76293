"""Requests for completions and answers of vLLM servers, in token ids."""

from collections.abc import Collection, Sequence
from typing import Any

from alignment.endpoints.endpoint_errors import EndpointError, ErrorKind, error_in, message_of
from alignment.engines.protocol import GeneratedResponse
from alignment.rl.vllm_servers import ADVICE
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

_NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}


def completion_body(
    model: str, prompt: Sequence[int], sampling: Sampling, seed: int, ends: Collection[int]
) -> dict[str, Any]:
    """Return the body of a request for one response.

    Args:
        model: Name of the model.
        prompt: Token ids.
        sampling: Settings of sampling. They replace all settings of generation_config.json.
        seed: Seed of the response.
        ends: Tokens that end a response.
    """
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        # vLLM reads missing settings from generation_config.json. Some of these files penalize
        # repetition, which would change the distribution.
        **_NEUTRAL,
        "seed": seed % (1 << 31),
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
        # vLLM would also end responses at the end tokens of its files. It must use those of
        # the policy only.
        "ignore_eos": True,
        "stop_token_ids": sorted(ends) if sampling.stop_at_eod else [],
    }


def read_completion(answer: Any, url: str, ends: frozenset[int]) -> GeneratedResponse:
    """Return the response in an answer.

    Args:
        answer: JSON value of the answer.
        url: Address of the server, for error messages.
        ends: Tokens that may end a response.

    Raises:
        UserError: The answer has no response with log-probabilities, or one that another token
            ended.
        EndpointError: The server aborted the response, which may be requested again.
    """
    if error := error_in(answer):
        raise UserError(f"{url} answers with an error: {message_of(error)}. {ADVICE}")
    try:
        [choice] = answer["choices"]
        tokens = [int(token) for token in choice["token_ids"]]
        log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        reason = choice["finish_reason"]
        if reason in ("abort", "error"):  # somebody has paused the server, for example
            raise EndpointError(f"the response ended with {reason}", ErrorKind.PASSING, status=200)
        ended = reason == "stop"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{url} returns no token ids with log-probabilities. Use vLLM 0.10.2 or later."
        ) from error
    if len(tokens) != len(log_probs):
        raise UserError(
            f"{url} returned {len(tokens)} tokens with {len(log_probs)} log-probabilities. {ADVICE}"
        )
    if ended and not ends.intersection(tokens[-1:]):
        raise UserError(
            f"{url} ended a response at {tokens[-1:]}, not at one of the policy's end tokens "
            f"{sorted(ends)}. Serve --model or RUN/served/latest."
        )
    return GeneratedResponse(tokens, log_probs, ended)
