"""Rollouts by a vLLM server with the weights of the policy, which are handed over as files.

The server is started on a folder that the training writes,

    VLLM_SERVER_DEV_MODE=1 vllm serve RUN/served --served-model-name policy \\
        --logprobs-mode processed_logprobs

and reads it again when it is told to: token ids go in and come out, so that nothing is encoded
twice. Both see the folder, over a shared file system. Requests leave nothing to its
generation_config.json, and have the key that is in MEGATRON_ET_JUDGE_API_KEY, if any.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist

from alignment.commands.judge_flags import KEY
from alignment.endpoints.client import connect, until
from alignment.endpoints.endpoint_errors import (
    EndpointError,
    Kind,
    error_in,
    error_of_status,
    load_json,
    message_of,
)
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.judges.endpoint_annotator import api_key
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

_WAIT = 2.0  # seconds between tries
_REPORTED = 60.0  # seconds between reports of a wait
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}


class VLLMRollouts:
    """Generates as an engine does. Ranks make the same calls; one of each share asks."""

    def __init__(
        self,
        engine: AlignmentEngine,
        urls: Sequence[str],
        model: str,
        folder: Path,
        ends: frozenset[int],
        patience: float = 600.0,
        at_once: int = 256,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """See the class.

        Args:
            engine: whose weights are served.
            urls: of the servers, each up to and with /v1; shares of the data take turns.
            model: the name that they serve.
            folder: that they were started on.
            ends: the tokens that end a response.
            patience: seconds to wait for a server that does not answer.
            at_once: calls under way of a rank.
            check: called on all ranks now and then while they wait; may raise on all of them.
        """
        self.engine, self.folder, self.model, self.ends = engine, folder, model, ends
        self.urls = [url.rstrip("/") for url in urls]
        self.patience, self.at_once, self.check = patience, at_once, check
        self.asks = is_share_leader(engine)
        self._served: int | None = None
        self._reported = float("-inf")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[GeneratedResponse]:
        """See `alignment.engines.protocol.Engine`; first the servers get the present weights.

        Log-probabilities are as the server reports them: of the distribution that was drawn from,
        if it was started with --logprobs-mode processed_logprobs. `alignment.rl.train` checks that
        they are those of training.

        Raises:
            UserError: a server does not answer within the patience, or refuses.
        """
        self.refresh()
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        found = problem = None
        try:
            asked = (lambda: self.ask(prompts, sampling, seeds)) if self.asks else None
            found = run_async_while_polling(asked, self.check)
        except UserError as error:
            problem = str(error)
        shares = all_gather_by_data_rank(self.engine, (found, problem))
        if told := next((problem for _, problem in shares if problem), None):
            raise UserError(told)
        return shares[self.engine.data_rank][0]

    def refresh(self) -> None:
        """Hand the present weights over; a collective.

        Raises:
            UserError: a server does not answer within the patience, or refuses.
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
        async with connect(api_key(KEY), 1) as http:
            for url in self.urls:
                root = url.removesuffix("/v1")
                weights = self._post(http, f"{root}/collective_rpc", {"method": "reload_weights"})
                await self._while_alive(url, weights)
                await self._while_alive(url, self._forget_old_weights(http, root))

    async def _forget_old_weights(self, http: httpx.AsyncClient, root: str) -> None:
        """Empty the server's prefix cache: its keys and values are those of the old weights.

        Raises:
            UserError: the server keeps them, as it does while it answers other requests.
        """
        begin = time.monotonic()
        while True:
            answer = await self._post(http, f"{root}/reset_prefix_cache", {})
            if not isinstance(answer, dict) or answer.get("success") is not False:
                return
            if time.monotonic() - begin > self.patience:
                raise UserError(
                    f"{root} has not emptied its prefix cache for {self.patience:.0f} s, and would "
                    "answer by the old weights: let nobody else send it requests, then give the "
                    "same command"
                )
            await asyncio.sleep(min(_WAIT, self.patience / 4))

    async def ask(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        keep: Callable[[int, GeneratedResponse], Awaitable[None]] | None = None,
    ) -> list[GeneratedResponse]:
        """Let this share's server continue prompts, with the weights it has; no collective.

        Args:
            keep: stores a response as it comes, by the place of its prompt.

        Raises:
            UserError: see `generate`.
        """
        url = self.urls[self.engine.data_rank % len(self.urls)]
        slots = asyncio.Semaphore(self.at_once)
        async with connect(api_key(KEY), self.at_once) as http:

            async def one(place: int, prompt: Sequence[int], seed: int) -> GeneratedResponse:
                async with slots:
                    body = self._body(prompt, sampling, seed)
                    answer = await self._post(http, f"{url}/completions", body)
                found = self._read(answer, url)
                if keep is not None:
                    await keep(place, found)
                return found

            every = asyncio.gather(*map(one, range(len(prompts)), prompts, seeds))
            return list(await self._while_alive(url, every))

    async def _while_alive[T](self, url: str, work: Awaitable[T]) -> T:
        """What comes of work at a server, which may take its time while it tells its health."""
        task = asyncio.ensure_future(work)
        heard, often = time.monotonic(), self.patience / 10
        try:
            async with httpx.AsyncClient(timeout=often) as http:
                while not (await asyncio.wait([task], timeout=often))[0]:
                    try:
                        response = await http.get(f"{url.removesuffix('/v1')}/health")
                        reason = f"status {response.status_code} of its health"
                        if response.status_code < 500:
                            heard = time.monotonic()
                    except (httpx.HTTPError, httpx.InvalidURL) as error:
                        reason = str(error) or type(error).__name__
                    if time.monotonic() - heard > self.patience:
                        raise self._given_up(url, reason)
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _report_wait(self, url: str, reason: str) -> None:
        """Say once a minute, of all calls under way, for what they wait and until when."""
        now = time.monotonic()
        if now - self._reported >= _REPORTED:
            self._reported = now
            print(
                f"waiting for {url} until {until(self.patience)} at most: {reason}",
                file=sys.stderr,
                flush=True,
            )

    def _given_up(self, url: str, reason: str) -> UserError:
        return UserError(
            f"{url} has not answered for {self.patience:.0f} s ({reason}): see the server, then "
            "give the same command, which goes on"
        )

    def _body(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            # What is not said vLLM takes from generation_config.json, some of which penalise
            # repetition: the responses would be of another distribution than the policy's.
            **_NEUTRAL,
            "seed": seed % (1 << 31),
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            # It also ends responses at the end tokens that it finds in files. It is told to ignore
            # them, and given the policy's.
            "ignore_eos": True,
            "stop_token_ids": sorted(self.ends) if sampling.stop_at_eod else [],
        }

    def _read(self, answer: Any, url: str) -> GeneratedResponse:
        if error := error_in(answer):
            raise UserError(f"{url} answers with an error: {message_of(error)}")
        try:
            [choice] = answer["choices"]
            tokens = [int(token) for token in choice["token_ids"]]
            log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            ended = choice["finish_reason"] == "stop"
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{url} gives no token ids with log-probabilities: vLLM of version 0.10.2 or later "
                "does"
            ) from error
        if len(tokens) != len(log_probs):
            raise UserError(f"{url} gives {len(tokens)} tokens and {len(log_probs)} values")
        if ended and not self.ends.intersection(tokens[-1:]):
            raise UserError(
                f"{url} ended a response at {tokens[-1:]}, not at one of the policy's end tokens "
                f"{sorted(self.ends)}: it serves another tokenizer or generation_config.json"
            )
        return GeneratedResponse(tokens, log_probs, ended)

    async def _post(self, http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Any:
        """The answer; waits for a server that is away or busy."""
        begin = time.monotonic()
        while True:
            try:
                response = await http.post(url, json=body)
                if response.status_code < 300:
                    return load_json(response.content) if response.content else None
                problem = error_of_status(response.status_code, response.content, None)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise UserError(f"--rollout-url {url} is no address: {error}") from error
            except (httpx.HTTPError, ValueError) as error:
                reason = str(error) or type(error).__name__
                problem = EndpointError(reason, Kind.PASSING)
            if problem.kind is not Kind.PASSING:
                raise UserError(
                    f"{url} refuses ({problem}): start vLLM as docs/how-to/training-judges.md says"
                )
            if time.monotonic() - begin > self.patience:
                raise self._given_up(url, str(problem))
            self._report_wait(url, str(problem))
            await asyncio.sleep(min(_WAIT, self.patience / 4))
