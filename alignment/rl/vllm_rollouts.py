"""Rollouts by vLLM servers, which receive the weights of the policy before each step.

docs/how-to/vllm.md describes how to start the servers. Prompts and responses are token ids, so that
no text is tokenized twice. Requests override all settings of generation_config.json.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.pool import EndpointPool
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader, on_first_rank
from alignment.rl.served_log_probs import refuse_another_model
from alignment.rl.vllm_completions import completion_body, read_completion
from alignment.rl.vllm_servers import (
    ADVICE,
    RESUME_SECONDS,
    VLLMServer,
    VLLMServers,
    read_json,
    warn_of_public_address,
)
from alignment.rl.weight_transfer import FolderTransfer, WeightTransfer
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

_PROBES, _PROBE_LENGTH = 4, 64  # prompts of a rank that are compared at first, and their tokens


class VLLMRollouts:
    """Source of rollouts with the interface of an engine.

    All ranks make the same calls, and one rank of each share of the data calls its servers.
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
        transfer: WeightTransfer | None = None,
        context: int = 0,
    ) -> None:
        """Prepare the rollouts; a collective.

        Args:
            engine: Engine whose weights are served.
            urls: Addresses of the servers, up to and including /v1. They are divided among the
                shares of the data; a server has several shares if there are fewer servers.
            model: Model name of the servers.
            folder: Folder of the versions of the weights; see `FolderTransfer`.
            ends: Tokens that end a response.
            patience: Seconds to wait for a server that does not answer.
            concurrency: Largest number of concurrent calls of a rank.
            check: Function that all ranks call while they wait. It may raise on all of them.
            transfer: Way in which the servers get the weights. Default: as files in the folder.
            context: Most tokens of a prompt with its response, for which servers must have room.
        """
        self.engine, self.model, self.ends = engine, model, ends
        self.servers = VLLMServers(urls, patience, check)
        self.transfer = transfer or FolderTransfer(engine, folder)
        self.concurrency, self.check = concurrency, check
        self.calls_server = is_share_leader(engine)
        self.context = context
        self._served: int | None = None
        self._compared = False
        if dist.get_rank() == 0:
            warn_of_public_address(self.servers.urls)

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
        if not self._compared:
            self._compare(prompts)
            self._compared = True
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        return self._from_leaders(lambda: self.ask(prompts, sampling, seeds))

    def _from_leaders[T](self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return on all ranks of a share what the rank that calls its servers gets; a collective.

        Raises:
            UserError: The first error of a rank, on all ranks.
        """
        result = problem = None
        try:
            result = run_async_while_polling(work if self.calls_server else None, self.check)
        except UserError as error:
            problem = str(error)
        shares = all_gather_by_data_rank(self.engine, (result, problem))
        if message := next((problem for _, problem in shares if problem), None):
            raise UserError(message)
        value: T = shares[self.engine.data_rank][0]
        return value

    def refresh(self) -> None:
        """Let the servers load the present weights; a collective.

        Raises:
            UserError: A server does not answer within the patience, refuses, or has another model.
        """
        version = self.engine.step
        if self._served == version:
            return
        first = self._served is None
        self.transfer.prepare(version)
        if first:
            self.servers.call(self._check_server)
        while True:
            self.servers.call(VLLMServer.pause)
            self.servers.lost.clear()
            try:
                self.transfer.update_weights(version, self.servers)
                self.servers.call(VLLMServer.reset_prefix_cache)
            except BaseException:
                self.servers.resume_after_failure()
                raise
            self.servers.call(VLLMServer.resume)
            # A server that was restarted meanwhile may have other weights.
            if not on_first_rank(lambda: bool(self.servers.lost)):
                break
        self._served = version

    async def _check_server(self, server: VLLMServer) -> None:
        """Refuse a server that does not have the model or room for its prompts and responses."""
        answer = await server.while_healthy(server.get("/v1/models"))
        try:
            lengths = {model["id"]: model.get("max_model_len") for model in answer["data"]}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{server.url}/models is not that of a vLLM server. {ADVICE}"
            ) from error
        if self.model not in lengths:
            raise UserError(
                f"{server.url} does not serve --rollout-model {self.model}, but "
                f"{', '.join(map(str, lengths))}. Start it with --served-model-name {self.model}."
            )
        length = lengths[self.model]
        if length is not None and length < self.context:
            raise UserError(
                f"{server.url} serves {length} tokens of a prompt with its response, and "
                f"--seq-length is {self.context}. Start it with --max-model-len {self.context}, or "
                "lower --seq-length."
            )

    def _compare(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuse servers whose log-probabilities of prompts are not the engine's; a collective."""
        probes = [list(p[:_PROBE_LENGTH]) for p in prompts if len(p) > 1][:_PROBES]
        log_probs = self._from_leaders(lambda: self._prompt_log_probs(probes))
        refuse_another_model(self.engine, probes, log_probs, self.urls_of_share)

    async def _prompt_log_probs(self, prompts: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Return the log-probabilities of the tokens of prompts after the first, per server."""

        async def ask(server: VLLMServer, prompt: Sequence[int]) -> list[float]:
            body = {
                "model": self.model, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0
            }  # fmt: skip
            answer = await server.while_healthy(server.post("/v1/completions", body))
            try:
                places = answer["choices"][0]["prompt_logprobs"][1:]
                pairs = zip(places, prompt[1:], strict=True)
                return [float(place[str(token)]["logprob"]) for place, token in pairs]
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(
                    f"{server.url} returns no log-probabilities of prompts. Use vLLM 0.10.2 or "
                    "later."
                ) from error

        results: list[list[list[float]]] = []
        for url in self.urls_of_share:
            async with self.servers.connect(url) as server:
                results.append([await ask(server, prompt) for prompt in prompts])
        return results

    @property
    def urls_of_share(self) -> list[str]:
        """Servers of this rank's share of the data."""
        urls, rank = self.servers.urls, self.engine.data_rank
        return urls[rank :: self.engine.data_size] or [urls[rank % len(urls)]]

    async def ask(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        store: AnswerStore | None = None,
        to_record: Callable[[int, GeneratedResponse], tuple[str, Mapping[str, Any]]] | None = None,
    ) -> list[GeneratedResponse]:
        """Return continuations of prompts from the servers of this rank's share; no collective.

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
        responses: dict[int, GeneratedResponse] = {}
        async with AsyncExitStack() as stack:
            servers = [await self._connect(stack, url) for url in self.urls_of_share]
            # All samples of a prompt go to one server, whose prefix cache then has the prompt.
            numbers = {key: n for n, key in enumerate(dict.fromkeys(map(tuple, prompts)))}

            async def call(place: int) -> GeneratedResponse:
                server = servers[numbers[tuple(prompts[place])] % len(servers)]
                body = completion_body(
                    self.model, prompts[place], sampling, seeds[place], self.ends
                )

                def read(content: bytes, _: float | None) -> GeneratedResponse:
                    return read_completion(read_json(content), server.url, self.ends)

                response: GeneratedResponse = await server.post("/v1/completions", body, read)
                return response

            concurrency = self.concurrency * len(servers)
            pool = EndpointPool(call, to_record or _no_record, concurrency, await_calls=False)
            work: Awaitable[None] = pool.ask_many(range(len(prompts)), store, responses.__setitem__)
            for server in servers:
                work = server.while_healthy(
                    work, lambda: f"has sampled {len(responses):,} of {len(prompts):,} responses"
                )
            await work
        return [responses[place] for place in range(len(prompts))]

    async def _connect(self, stack: AsyncExitStack, url: str) -> VLLMServer:
        """Connect to a server, which gets the weights again if it is restarted."""
        lock = asyncio.Lock()

        async def reload_if_lost() -> None:
            async with lock:
                while url in self.servers.lost:
                    await self._reload_lost(url)

        connection = self.servers.connect(url, self.concurrency, reload_if_lost)
        return await stack.enter_async_context(connection)

    async def _reload_lost(self, url: str) -> None:
        assert self._served is not None
        async with self.servers.connect(url) as server:
            await server.pause()  # waits for the server, which is lost until then
            self.servers.lost.discard(url)
            try:
                await self.transfer.reload_lost_server(self._served, server)
                await server.pause()  # another rank may have resumed it, and sent it requests
                await server.reset_prefix_cache()
            except BaseException:
                with suppress(UserError, TimeoutError):  # requests to a paused server hang
                    await asyncio.wait_for(server.resume(), RESUME_SECONDS)
                raise
            await server.resume()


def _no_record(place: int, response: GeneratedResponse) -> tuple[str, Mapping[str, Any]]:
    raise AssertionError("a store needs to_record")
