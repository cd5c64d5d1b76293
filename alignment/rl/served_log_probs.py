"""Checks that servers and training report log-probabilities of the same distribution.

Training computes log-probabilities over the whole vocabulary at the sampling temperature, and so do
the samplers of both engines, for any --top-k and --top-p. The start options of a vLLM server decide
what it reports: with `--logprobs-mode processed_logprobs` log-probabilities at
the request's temperature, renormalized over the tokens that top-k and top-p leave; by default
log-probabilities at temperature 1.
"""

from collections.abc import Sequence
from dataclasses import replace

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import all_reduce_max, raise_on_all_ranks
from alignment.rl.metrics import rollout_gap
from megatron_ext.errors import UserError

# Nats per token. Rounding in bf16, with the routing that it flips, stays well below `_TOO_FAR`.
_COMPARABLE, _TOO_FAR = 1e-3, 0.1
_ANOTHER_MODEL = 0.3
_LEAST_TEMPERATURE = 0.01  # vLLM replaces lower ones by it, with a warning in its log
_ADVICE = (
    "Start the servers with --logprobs-mode processed_logprobs on --model or on RUN/served/latest, "
    "which the training writes, and run the same command again."
)


def refuse_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings with which servers sample from another distribution than training scores.

    Raises:
        UserError: The vocabulary is limited, or vLLM would raise the temperature.
    """
    if temperature < _LEAST_TEMPERATURE:
        raise UserError(
            f"--temperature {temperature:g} is incompatible with --rollout-url: vLLM samples at "
            f"temperatures of at least {_LEAST_TEMPERATURE:g}. Raise --temperature, or leave out "
            "--rollout-url."
        )
    if top_k or top_p < 1:
        flag = f"--top-k {top_k}" if top_k else f"--top-p {top_p}"
        raise UserError(
            f"{flag} is incompatible with --rollout-url: a server's log-probabilities are then "
            "over the remaining tokens, those of training over all tokens, and every ratio of the "
            "two is wrong. Leave out --top-k and --top-p, or leave out --rollout-url to let the "
            "engine sample."
        )


def refuse_another_model(
    engine: AlignmentEngine,
    prompts: Sequence[Sequence[int]],
    served: Sequence[Sequence[Sequence[float]]],
    urls: Sequence[str],
) -> None:
    """Refuse servers that have another model, by the log-probabilities of prompts; a collective.

    Args:
        engine: Engine whose weights the servers have loaded.
        prompts: Prompts of this share, each of at least two tokens.
        served: Log-probabilities of the prompts' tokens after the first, at temperature 1, in
            nats, from each server of this share.
        urls: Addresses of these servers.

    Raises:
        UserError: The log-probabilities of a server are not those of the engine, on all ranks.
    """
    length = all_reduce_max(max(map(len, prompts), default=0))
    if not length:
        return
    batch = TokenBatch.of([TokenSample(prompt) for prompt in prompts], length)
    scores = engine.log_probs(batch).log_probs.cpu()

    def check() -> None:
        for url, values in zip(urls, served, strict=True):
            gaps = [
                abs(float(scores[row, place]) - value)
                for row, of_prompt in enumerate(values)
                for place, value in enumerate(of_prompt, 1)
            ]
            mean = sum(gaps) / max(1, len(gaps))
            if mean > _ANOTHER_MODEL:
                raise UserError(
                    f"{url} serves another model than the policy: with the policy's weights its "
                    f"log-probabilities of the prompts differ by {mean:.3g} nats per token from "
                    f"those of training. {_ADVICE}"
                )

    raise_on_all_ranks(check)


def check_served_log_probs(
    engine: AlignmentEngine,
    batches: Sequence[TokenBatch],
    temperature: float,
    *,
    fresh: bool,
    thorough: bool,
) -> None:
    """Refuse log-probabilities of servers that clearly are of another distribution; a collective.

    Args:
        engine: Engine whose weights the servers have.
        batches: Batches with `old_log_probs` at the temperature, and `rollout_log_probs`.
        temperature: Temperature of sampling.
        fresh: Whether the servers had the weights of `old_log_probs`.
        thorough: Whether to compare with temperature 1 as well, which takes a forward pass.

    Raises:
        UserError: They have temperature 1, or differ from those of training.
    """
    gap = rollout_gap(engine, batches)
    if thorough and temperature != 1 and gap["rollout_gap"] > _COMPARABLE:
        raw = rollout_gap(engine, [_at_temperature_one(engine, batch) for batch in batches])
        if raw["rollout_gap"] < gap["rollout_gap"] / 2:
            raise UserError(
                "The log-probabilities of --rollout-url are those of temperature 1, and responses "
                f"are sampled at --temperature {temperature:g}. {_ADVICE}"
            )
    if fresh:
        refuse_distant(gap["rollout_kl"])


def refuse_distant(divergence: float) -> None:
    """Refuse log-probabilities that differ from those of training with equal weights.

    Args:
        divergence: The metric `rollout_kl`, in nats per token.

    Raises:
        UserError: They differ by more than rounding can explain.
    """
    if abs(divergence) > _TOO_FAR:
        raise UserError(
            "The log-probabilities of --rollout-url differ from those of training by "
            f"{divergence:+.3g} nats per token on average, with equal weights. They are of another "
            f"distribution or of other weights. {_ADVICE}"
        )


def _at_temperature_one(engine: AlignmentEngine, batch: TokenBatch) -> TokenBatch:
    values = engine.log_probs(batch, temperature=1.0, trained_only=True).log_probs.cpu()
    return replace(batch, extras={**batch.extras, "old_log_probs": values})
