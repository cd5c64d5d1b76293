"""Rollout and training log-probabilities of a ratio are taken over the same distribution.

Training computes log-probabilities over the whole vocabulary at the sampling temperature, and so do
the samplers of both engines, whatever --top-k and --top-p leave to draw from. A vLLM server reports
what its start options say: with `--logprobs-mode processed_logprobs` at the request's temperature,
renormalized over the tokens that top-k and top-p leave; by default at temperature 1.
"""

from collections.abc import Sequence
from dataclasses import replace

from alignment.engines.batch import TokenBatch
from alignment.engines.protocol import AlignmentEngine
from alignment.rl.step_metrics import rollout_gap
from megatron_ext.errors import UserError

# Nats. Rounding in bf16, and routing that it flips, stays well below the second one.
_COMPARABLE, _TOO_FAR = 1e-3, 0.1


def refuse_truncation(top_k: int, top_p: float) -> None:
    """Refuse to let servers draw from a part of the vocabulary.

    Raises:
        UserError: a limit is set.
    """
    if top_k or top_p < 1:
        flag = f"--top-k {top_k}" if top_k else f"--top-p {top_p}"
        raise UserError(
            f"{flag} is incompatible with --rollout-url: a server's log-probabilities are then of "
            "the tokens that are left, those of training of all tokens, and every ratio of the two "
            "is wrong. Leave out --top-k and --top-p, or leave out --rollout-url to let the engine "
            "sample"
        )


def check_served_log_probs(
    engine: AlignmentEngine,
    batches: Sequence[TokenBatch],
    temperature: float,
    *,
    fresh: bool,
    thorough: bool,
) -> None:
    """Refuse log-probabilities of servers that are clearly of another distribution; a collective.

    Args:
        batches: with `old_log_probs` at the temperature, and `rollout_log_probs`.
        temperature: of sampling.
        fresh: the servers had the weights that `old_log_probs` are of.
        thorough: compare with temperature 1 too, which takes a forward pass.

    Raises:
        UserError: they are of temperature 1, or far from those of training.
    """
    found = rollout_gap(engine, batches)
    advice = (
        "Start the servers with --logprobs-mode processed_logprobs, on the folder that the "
        "training writes, and give the same command"
    )
    if thorough and temperature != 1 and found["rollout_gap"] > _COMPARABLE:
        raw = rollout_gap(engine, [_at_temperature_one(engine, batch) for batch in batches])
        if raw["rollout_gap"] < found["rollout_gap"] / 2:
            raise UserError(
                "the log-probabilities of --rollout-url are those of temperature 1, and responses "
                f"are drawn at --temperature {temperature:g}. {advice}"
            )
    if fresh and abs(found["rollout_kl"]) > _TOO_FAR:
        raise UserError(
            "the log-probabilities of --rollout-url differ from those of training by "
            f"{found['rollout_kl']:+.3g} nats a token on average, with equal weights: they are of "
            f"another distribution or of other weights. {advice}"
        )


def _at_temperature_one(engine: AlignmentEngine, batch: TokenBatch) -> TokenBatch:
    values = engine.log_probs(batch, temperature=1.0).log_probs.cpu()
    return replace(batch, extras={**batch.extras, "old_log_probs": values})
