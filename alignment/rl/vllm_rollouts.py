r"""Rollouts by vLLM servers, which receive the weights of the policy as files.

Start each server on a folder that the training writes,

    VLLM_SERVER_DEV_MODE=1 vllm serve RUN/served --served-model-name policy \
        --logprobs-mode processed_logprobs

on a file system that both can read. The training requests a reload of the folder after each step.
Prompts and responses are token ids, so that no text is tokenized twice. Requests override all
settings of generation_config.json, and send the key in MEGATRON_ET_JUDGE_API_KEY, if it is set.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.endpoint_errors import error_in, message_of
from alignment.endpoints.pool import EndpointPool
from alignment.engines.protocol import AlignmentEngine, GeneratedResponse
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader
from alignment.rl.vllm_servers import ADVICE, VLLMServer, VLLMServers, read_json
from alignment.rl.weight_transfer import FolderTransfer, WeightTransfer
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

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
        transfer: WeightTransfer | None = None,
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
            transfer: Way in which the servers get the weights. Default: as files in the folder.
        """
        self.engine, self.model, self.ends = engine, model, ends
        self.servers = VLLMServers(urls, patience, check)
        self.transfer = transfer or FolderTransfer(engine, folder)
        self.concurrency, self.check = concurrency, check
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
        version = self.engine.step
        if self._served == version:
            return
        self.transfer.prepare(version)
        self.servers.call(VLLMServer.pause)
        try:
            self.transfer.update_weights(version, self.servers)
            self.servers.call(VLLMServer.reset_prefix_cache)
        except BaseException:
            self.servers.resume_after_failure()
            raise
        self.servers.call(VLLMServer.resume)
        self._served = version

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
        url = self.servers.urls[self.engine.data_rank % len(self.servers.urls)]
        responses: dict[int, GeneratedResponse] = {}
        async with self.servers.connect(url, self.concurrency) as server:

            async def call(place: int) -> GeneratedResponse:
                body = self._body(prompts[place], sampling, seeds[place])

                def read(content: bytes, _: float | None) -> GeneratedResponse:
                    return self._read(read_json(content), url)

                return await server.post("/v1/completions", body, read)

            pool = EndpointPool(call, to_record or _no_record, self.concurrency, await_calls=False)
            work = pool.ask_many(range(len(prompts)), store, responses.__setitem__)
            await server.while_healthy(work)
        return [responses[place] for place in range(len(prompts))]

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
            raise UserError(f"{url} answers with an error: {message_of(error)}. {ADVICE}")
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
                f"{ADVICE}"
            )
        if ended and not self.ends.intersection(tokens[-1:]):
            raise UserError(
                f"{url} ended a response at {tokens[-1:]}, not at one of the policy's end tokens "
                f"{sorted(self.ends)}. Serve the folder that the training writes."
            )
        return GeneratedResponse(tokens, log_probs, ended)


def _no_record(place: int, response: GeneratedResponse) -> tuple[str, Mapping[str, Any]]:
    raise AssertionError("a store needs to_record")
