r"""Rollouts by vLLM servers, which receive the weights of the policy as files.

Start each server on a folder that the training writes,

    VLLM_SERVER_DEV_MODE=1 vllm serve RUN/served --served-model-name policy \
        --logprobs-mode processed_logprobs

on a file system that both can read. The training requests a reload of the folder after each step.
Prompts and responses are token ids, so that no text is tokenized twice. Requests override all
settings of generation_config.json, and send the key in MEGATRON_ET_JUDGE_API_KEY, if it is set.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.api_key import read_api_key
from alignment.endpoints.client import CallFailed, EndpointClient, connect
from alignment.endpoints.endpoint_errors import (
    EndpointError,
    ErrorKind,
    error_in,
    load_json,
    message_of,
)
from alignment.endpoints.pool import EndpointPool
from alignment.endpoints.retry import RetryPolicy
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

_WAIT = 2.0  # seconds between tries
_ADVICE = "Start vLLM as docs/how-to/training-judges.md describes."
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}


class VLLMRollouts:
    """Source of rollouts with the interface of an engine.

    All ranks make the same calls, and one rank of each share of the data calls its server.
    """

    def __init__(
        self,
        engine: AlignmentEngine,
        urls: Sequence[str],
        model: str,
        folder: Path,
        ends: frozenset[int],
        patience: float = 600.0,
        concurrency: int = 256,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the rollouts; a collective.

        Args:
            engine: Engine whose weights are served.
            urls: Addresses of the servers, up to and including /v1. Shares of the data are
                assigned to them in turn.
            model: Model name of the servers.
            folder: Folder from which the servers were started.
            ends: Tokens that end a response.
            patience: Seconds to wait for a server that does not answer.
            concurrency: Largest number of concurrent calls of a rank.
            check: Function that all ranks call while they wait. It may raise on all of them.
        """
        self.engine, self.folder, self.model, self.ends = engine, folder, model, ends
        self.urls = [url.rstrip("/") for url in urls]
        self.patience, self.concurrency, self.check = patience, concurrency, check
        self.calls_server = is_share_leader(engine)
        self._served: int | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[GeneratedResponse]:
        """Return responses to prompts, after the servers have loaded the present weights.

        Log-probabilities are those of the sampled distribution if the server was started with
        --logprobs-mode processed_logprobs. The training compares them with its own.

        Args:
            prompts: Token ids of this rank's prompts.
            sampling: Settings of sampling.
            seeds: Seed of each prompt. Default: 0, 1, 2 and so on.

        Raises:
            UserError: A server does not answer within the patience, or refuses.
        """
        self.refresh()
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        responses = problem = None
        try:
            work = (lambda: self.ask(prompts, sampling, seeds)) if self.calls_server else None
            responses = run_async_while_polling(work, self.check)
        except UserError as error:
            problem = str(error)
        shares = all_gather_by_data_rank(self.engine, (responses, problem))
        if message := next((problem for _, problem in shares if problem), None):
            raise UserError(message)
        return shares[self.engine.data_rank][0]

    def refresh(self) -> None:
        """Let the servers load the present weights; a collective.

        Raises:
            UserError: A server does not answer within the patience, or refuses.
        """
        if self._served == self.engine.step:
            return
        self.engine.export(self.folder)
        problem: list[str | None] = [None]
        try:
            run_async_while_polling(self._reload if dist.get_rank() == 0 else None, self.check)
        except UserError as error:
            problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise UserError(problem[0])
        self._served = self.engine.step

    async def _reload(self) -> None:
        """Let every server load the weights while it answers no requests."""
        for url in self.urls:
            async with connect(read_api_key(), 1) as http:
                client = self._client(url, http)
                root = url.removesuffix("/v1")
                # A request in between would mix old keys and values with new weights.
                await self._while_healthy(
                    url, self._post(client, f"{root}/pause?mode=abort", {}, _read_json)
                )
                try:
                    body = {"method": "reload_weights"}
                    weights = self._post(client, f"{root}/collective_rpc", body, _read_json)
                    await self._while_healthy(url, weights)
                    await self._while_healthy(url, self._reset_prefix_cache(client, root))
                except BaseException:
                    with suppress(UserError, TimeoutError):  # requests to a paused server hang
                        await asyncio.wait_for(self._resume(client, root), _WAIT)
                    raise
                await self._while_healthy(url, self._resume(client, root))

    async def _resume(self, client: EndpointClient, root: str) -> None:
        await self._post(client, f"{root}/resume", {}, _read_json)

    async def _reset_prefix_cache(self, client: EndpointClient, root: str) -> None:
        """Empty the prefix cache of a server, which has keys and values of the old weights.

        Raises:
            UserError: The server does not empty it, because it answers other requests.
        """
        begin = time.monotonic()
        while True:
            answer = await self._post(client, f"{root}/reset_prefix_cache", {}, _read_json)
            if not isinstance(answer, dict) or answer.get("success") is not False:
                return
            if time.monotonic() - begin > self.patience:
                raise UserError(
                    f"{root} has not emptied its prefix cache for {self.patience:.0f} s, and would "
                    "answer with the old weights. Let nothing else send it requests, then repeat "
                    "the command, which resumes."
                )
            await asyncio.sleep(min(_WAIT, self.patience / 4))

    async def ask(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        store: AnswerStore | None = None,
        to_record: Callable[[int, GeneratedResponse], tuple[str, Mapping[str, Any]]] | None = None,
    ) -> list[GeneratedResponse]:
        """Return continuations of prompts from the server of this rank's share; no collective.

        Args:
            prompts: Token ids of each prompt.
            sampling: Settings of sampling.
            seeds: Seed of each prompt.
            store: Store to which responses are written when they arrive.
            to_record: Function from the index of a prompt and its response to the key and the
                content of the record. Required with a store.

        Raises:
            UserError: The server refuses, or does not answer within the patience.
        """
        url = self.urls[self.engine.data_rank % len(self.urls)]
        responses: dict[int, GeneratedResponse] = {}
        async with connect(read_api_key(), self.concurrency) as http:
            client = self._client(url, http)

            async def call(place: int) -> GeneratedResponse:
                body = self._body(prompts[place], sampling, seeds[place])

                def read(content: bytes, _: float | None) -> GeneratedResponse:
                    return self._read(_read_json(content), url)

                return await self._post(client, f"{url}/completions", body, read)

            pool = EndpointPool(call, to_record or _no_record, self.concurrency, await_calls=False)
            work = pool.ask_many(range(len(prompts)), store, responses.__setitem__)
            await self._while_healthy(url, work)
        return [responses[place] for place in range(len(prompts))]

    def _client(self, url: str, http: httpx.AsyncClient) -> EndpointClient:
        wait = min(_WAIT, self.patience / 4)
        policy = RetryPolicy(
            patience=self.patience, timeout=None, first_wait=wait, longest_wait=wait
        )

        async def is_permanent(error: EndpointError) -> bool:
            # A server whose engine has died fails its health checks; one that passes them will
            # answer the same request with the same error.
            return error.status == 500 and await self._is_healthy(url)

        return EndpointClient(
            url,
            http,
            policy,
            report=_report,
            flag="--rollout-url",
            advice=_ADVICE,
            is_permanent=is_permanent,
        )

    async def _is_healthy(self, url: str) -> bool:
        try:
            async with httpx.AsyncClient(timeout=self.patience / 10) as http:
                response = await http.get(f"{url.removesuffix('/v1')}/health")
                return response.status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    async def _post[T](
        self,
        client: EndpointClient,
        url: str,
        body: dict[str, Any],
        read: Callable[[bytes, float | None], T],
    ) -> T:
        """Return the answer of a server, after waiting for one that is not available or busy.

        Raises:
            UserError: The server refuses, or does not answer within the patience.
        """
        try:
            return await client.post(url, body, read)
        except CallFailed as error:
            if error.refused:
                raise UserError(f"The endpoint {url} refuses with {error}. {_ADVICE}") from None
            raise self._no_answer(url, str(error)) from None

    async def _while_healthy[T](self, url: str, work: Awaitable[T]) -> T:
        """Return the result of a call, however slow, while the server passes health checks."""
        task = asyncio.ensure_future(work)
        last_sign, interval = time.monotonic(), self.patience / 10
        try:
            async with httpx.AsyncClient(timeout=interval) as http:
                while not (await asyncio.wait([task], timeout=interval))[0]:
                    try:
                        response = await http.get(f"{url.removesuffix('/v1')}/health")
                        reason = f"its health check returned status {response.status_code}"
                        if response.status_code < 500:
                            last_sign = time.monotonic()
                    except (httpx.HTTPError, httpx.InvalidURL) as error:
                        reason = str(error) or type(error).__name__
                    if time.monotonic() - last_sign > self.patience:
                        raise self._no_answer(url, reason)
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _no_answer(self, url: str, reason: str) -> UserError:
        return UserError(
            f"{url} has not answered for {self.patience:.0f} s ({reason}). Check the server, then "
            "repeat the command, which resumes."
        )

    def _body(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
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
            "stop_token_ids": sorted(self.ends) if sampling.stop_at_eod else [],
        }

    def _read(self, answer: Any, url: str) -> GeneratedResponse:
        if error := error_in(answer):
            raise UserError(f"{url} answers with an error: {message_of(error)}. {_ADVICE}")
        try:
            [choice] = answer["choices"]
            tokens = [int(token) for token in choice["token_ids"]]
            log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            ended = choice["finish_reason"] == "stop"
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{url} returns no token ids with log-probabilities. Use vLLM 0.10.2 or later."
            ) from error
        if len(tokens) != len(log_probs):
            raise UserError(
                f"{url} returned {len(tokens)} tokens with {len(log_probs)} log-probabilities. "
                f"{_ADVICE}"
            )
        if ended and not self.ends.intersection(tokens[-1:]):
            raise UserError(
                f"{url} ended a response at {tokens[-1:]}, not at one of the policy's end tokens "
                f"{sorted(self.ends)}. Serve the folder that the training writes."
            )
        return GeneratedResponse(tokens, log_probs, ended)


def _read_json(content: bytes, _: float | None = None) -> Any:
    """Return the JSON value of a response body, or None if it is empty."""
    if not content:
        return None
    try:
        return load_json(content)
    except ValueError as error:
        raise EndpointError(f"an answer is not JSON: {error}", ErrorKind.PASSING) from None


def _no_record(place: int, response: GeneratedResponse) -> tuple[str, Mapping[str, Any]]:
    raise AssertionError("a store needs to_record")


def _report(message: str) -> None:
    console.warn(message)
