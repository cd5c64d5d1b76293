"""Adapter of checkpoints of this project to EleutherAI's lm-evaluation-harness.

Importing this module registers the model `megatron-et`; see `tools.eval_harness`. Call `activate`
of `megatron_ext.devices` before.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_ext.errors import UserError
from megatron_ext.evaluation.log_likelihoods import BATCH_TOKENS, ScoringRequest, merged
from megatron_ext.evaluation.models import MegatronModel
from megatron_ext.hf.tokenizer_export import as_transformers
from megatron_ext.inference.generation import generate
from megatron_ext.inference.loading import DTYPES, ParallelLayout, load_model
from megatron_ext.inference.row import Completion
from megatron_ext.inference.sampling import Sampling
from megatron_ext.quiet import quiet_megatron

_CONTEXT = 4  # number of tokens before a continuation that affect its spelling

Tokenized = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as text and as tokens."""


@register_model("megatron-et")
class MegatronLM(TemplateLM):
    """Checkpoint with any layout, as a model of the harness.

    The harness treats it as one process: every rank gets all requests, the replicas of the model
    share them, and every rank gets all results.

    Args:
        load: Run directory, folder of checkpoints, or folder of one iteration.
        tensor_model_parallel_size: Tensor parallel size.
        pipeline_model_parallel_size: Pipeline parallel size.
        expert_model_parallel_size: Expert parallel size.
        dtype: "fp32", "bf16" or "fp16". Default: that of training on a GPU, fp32 on a CPU.
        tokenizer_model: File or folder of the tokenizer. Default: the one that training used.
        max_length: Maximum length of a sequence, in tokens. Default: the context length.
        prefix_token_id: Token that precedes the beginning of a text. Default: the token that the
            tokenizer adds there, or else the token that ends a document.
        batch_size: Number of sequences of full length in a batch, or "auto".
        max_batch_size: Ignored; the harness passes it.
        device: Ignored; the harness passes it.
    """

    def __init__(
        self,
        load: str,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        dtype: str | None = None,
        tokenizer_model: str | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise UserError(
                f"--model_args dtype={dtype} is not supported. Choose one of {', '.join(DTYPES)}."
            )
        layout = ParallelLayout(
            tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size
        )
        with quiet_megatron():
            trained = load_model(
                str(load),
                layout,
                dtype=DTYPES[dtype] if dtype else None,
                tokenizer_model=tokenizer_model,
            )
        self.model = MegatronModel(trained)
        # Only tokenizers of transformers parse the control tokens that a chat template writes.
        inner = as_transformers(trained.tokenizer)
        self.tokenizer = None if getattr(inner, "split_special_tokens", True) else inner
        self.max_length = max_length or self.model.max_length
        if self.max_length > self.model.max_length:
            raise UserError(
                f"--model_args max_length={max_length} is above the model's context length of "
                f"{self.model.max_length} tokens. Set it to at most that."
            )
        self._prefix = prefix_token_id
        auto = str(batch_size).startswith("auto")
        self.batch_rows = max(1, BATCH_TOKENS // self.max_length) if auto else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document."""
        end = self.model.codec.end
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """Token that precedes the beginning of a text."""
        return self.model.codec.prefix if self._prefix is None else self._prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, by default with the tokenizer's special tokens."""
        return self.model.codec.encode(string, special=add_special_tokens is not False)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer and its chat template in the harness's cache of requests."""
        return str(self.model.trained.args.tokenizer_model).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the tokenizer's chat template.

        Args:
            chat_history: Messages with role and content.
            add_generation_prompt: Whether the assistant's next message is begun. Otherwise the last
                message is left open.

        Raises:
            UserError: There is no template, or it rejects the messages.
        """
        tokenizer: Any = self.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                "The model's tokenizer has no chat template. Remove --apply_chat_template, or "
                "convert a model whose transformers tokenizer has one."
            )
        try:
            return tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template may raise anything, to refuse a role for example
            raise UserError(
                f"The chat template rejects the messages of the task: {error}. Remove "
                "--system_instruction or --apply_chat_template."
            ) from error

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokenized], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self.model.score(
            [self._request(context, continuation) for _, context, continuation in requests],
            self.batch_rows * self.max_length,
        )
        answers = [(-score.loss, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _request(self, context: list[int], continuation: list[int]) -> ScoringRequest:
        if not context:  # of white space only, which the harness moves to the continuation
            context = [self.prefix_token_id]
            if continuation[:1] == context:
                continuation = continuation[1:]
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"A continuation has {len(continuation):,} tokens, and the model scores 1 to "
                f"{self.max_length:,}. Leave its task or document out, or raise --model_args "
                "max_length if the model's context is longer."
            )
        # The last token is only predicted, so that one more fits.
        tokens = np.array([*context, *continuation][-self.max_length - 1 :], dtype=np.int32)
        return ScoringRequest(tokens, len(tokens) - len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows of the model's length."""
        windows: list[ScoringRequest] = []
        ends = []
        for request in requests:
            pairs = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            windows += [self._request(*make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        scores = self.model.score(windows, self.batch_rows * self.max_length)
        answers = []
        for request, start, end in zip(requests, [0, *ends], ends):
            answers.append(-sum(score.loss for score in scores[start:end]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string, a number of tokens or the end of the document.

        A context that leaves too little room for the new tokens loses tokens at its beginning.
        """
        jobs: dict[Sampling, list[int]] = {}
        prompts = []
        for i, request in enumerate(requests):
            context, options = request.args
            sampling = _sampling(options)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks {sampling.max_new_tokens} leaves no room for a context in the "
                    f"model's {self.max_length} tokens. Set a smaller number with --gen_kwargs."
                )
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            jobs.setdefault(sampling, []).append(i)
        local_texts: dict[int, str] = {}
        replicas = self.model.replicas
        for sampling, members in jobs.items():
            members.sort(key=lambda i: len(prompts[i]))
            turn = self.batch_rows * replicas.number
            for start in range(0, len(members), turn):
                first = start + replicas.index * self.batch_rows
                batch = members[first : first + self.batch_rows]
                # Replicas without prompts take part if others need their experts.
                if batch or replicas.in_step:
                    texts = generate(
                        self.model.trained, [prompts[i] for i in batch], sampling, batch
                    )
                    local_texts.update(
                        (i, self._shown(prompts[i], completion, sampling))
                        for i, completion in zip(batch, texts)
                    )
        texts_of = merged(local_texts)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts_of[i])
        return [texts_of[i] for i in range(len(requests))]

    def _shown(self, prompt: list[int], completion: Completion, sampling: Sampling) -> str:
        """Return the text of a continuation without special tokens, as the harness expects it."""
        codec = self.model.codec
        tokens = codec.without_special(completion.tokens)
        ended = completion.tokens[-1:] if completion.finish == "eod" else []
        if tokens + ended == completion.tokens or tokens == completion.tokens:
            return completion.text
        # The preceding tokens determine whether the text begins with a space.
        before = codec.without_special(prompt)[-_CONTEXT:]
        text = codec.decode(before + tokens)[len(codec.decode(before)) :]
        cuts = [position for stop in sampling.stop if (position := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def get_model_info(self) -> dict[str, Any]:
        """Return information that the harness writes next to its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.trained.model.parameters()),
            "model_dtype": self.model.description["dtype"],
            "model_iteration": self.model.description["iteration"],
        }


def _sampling(options: dict[str, Any]) -> Sampling:
    """Return the sampling settings for generation options of the harness."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(options))
    stop = tuple(text for text in settings["until"] if text)
    if not settings["do_sample"]:
        return Sampling(settings["max_gen_toks"], greedy=True, stop=stop)
    return Sampling(
        settings["max_gen_toks"],
        temperature=settings.get("temperature") or 1.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        stop=stop,
    )
