"""Checks that servers and training report log-probabilities of the same distribution.

Training computes log-probabilities over the whole vocabulary at the sampling temperature, and so do
the samplers of both engines, for any --top-k and --top-p. The start options of a vLLM server decide
what it reports: with `--logprobs-mode processed_logprobs` log-probabilities at
the request's temperature, renormalized over the tokens that top-k and top-p leave; by default
log-probabilities at temperature 1.
"""

from collections.abc import Sequence
from dataclasses import replace

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine
from alignment.rl.metrics import rollout_gap
from megatron_ext.errors import UserError

# Nats per token. Rounding in bf16, with the routing that it flips, stays well below `_TOO_FAR`.
_COMPARABLE, _TOO_FAR = 1e-3, 0.1
_ADVICE = (
    "Start the servers with --logprobs-mode processed_logprobs on the folder that the training "
    "writes, and run the same command again."
)


def refuse_truncation(top_k: int, top_p: float) -> None:
    """Refuse sampling by servers from a part of the vocabulary.

    Raises:
        UserError: A limit is set.
    """
    if top_k or top_p < 1:
        flag = f"--top-k {top_k}" if top_k else f"--top-p {top_p}"
        raise UserError(
            f"{flag} is incompatible with --rollout-url: a server's log-probabilities are then "
            "over the remaining tokens, those of training over all tokens, and every ratio of the "
            "two is wrong. Leave out --top-k and --top-p, or leave out --rollout-url to let the "
            "engine sample."
        )


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
