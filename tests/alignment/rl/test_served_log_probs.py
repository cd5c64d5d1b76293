"""Tests that log-probabilities of rollouts and of training have the same distribution."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.rl.algorithms import algorithm_by_name
from alignment.rl.served_log_probs import check_served_log_probs, refuse_sampling
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from tests.alignment.engines.engine_runs import error_message_of
from tests.distributed import run_ranks
from tests.hf.models import make

# Temperature, top-k and top-p.
SETTINGS = [
    (1.0, 0, 1.0), (0.3, 0, 1.0), (1.7, 0, 1.0), (1.0, 20, 1.0), (0.7, 1, 1.0), (1.0, 0, 0.5),
    (0.7, 20, 0.95),
]  # fmt: skip


def gaps(folder, name):
    """Return the loss weights of each setting for a policy that has not changed."""
    from alignment.engines.deepspeed import DeepSpeedEngine
    from alignment.engines.megatron import MegatronEngine
    from alignment.engines.protocol import TokenScores
    from alignment.rl.metrics import rollout_gap

    engine: Any = {"megatron": MegatronEngine, "deepspeed": DeepSpeedEngine}[name](folder)
    result = []
    for setting in SETTINGS:
        temperature = setting[0]
        sampling = Sampling(6, *setting, stop_at_eod=False, score_temperature=temperature)
        samples = engine.generate([[5, 6, 7]] * 4, sampling, range(4))
        batch = TokenBatch.of(
            [
                TokenSample(
                    [5, 6, 7, *g.tokens],
                    3,
                    {"advantage": 1.0, "rollout_log_probs": [0.0] * 3 + g.log_probs},
                )
                for g in samples
            ]
        )
        scores = engine.log_probs(batch, temperature=temperature).log_probs.cpu()
        batch.extras["old_log_probs"] = scores  # type: ignore[index]
        loss = algorithm_by_name("grpo", rollout_bound=1.01, rollout_rule="mask").loss(
            TokenScores(scores), batch
        )
        result.append(
            (rollout_gap(engine, [batch])["rollout_gap_max"], float(loss.total / loss.weight))
        )
    return result


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_rollout_gap_of_an_engine_is_rounding_with_every_sampling_setting(tmp_path, engine):
    make("llama", tmp_path, vocab_size=128, num_hidden_layers=1)
    [result] = run_ranks(gaps, 1, tmp_path, engine)
    for setting, (gap, loss) in zip(SETTINGS, result):
        assert gap < 1e-4 and loss == pytest.approx(-1, abs=1e-3), setting


def check_on_one_rank():
    """Return the messages about log-probabilities of servers with several start options."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(64, 32, generator=generator)

    def table(temperature, top_k=32):
        lowest = logits.topk(top_k).values[:, -1:]
        retained = torch.where(logits >= lowest, logits, -torch.inf)
        return (retained / temperature).log_softmax(-1)

    def scores(batch, temperature):
        values = table(temperature).gather(1, batch.tokens[:, 1:].T)[:, 0]
        return SimpleNamespace(log_probs=torch.cat([torch.zeros(1), values])[None])

    engine: Any = SimpleNamespace(
        data_rank=0,
        data_size=1,
        log_probs=lambda batch, temperature, **_: scores(batch, temperature),
    )

    def refusal(temperature, served, top_k=32, fresh=True, thorough=True):
        drawn_from = table(temperature, top_k).exp()
        tokens = torch.multinomial(drawn_from, 1, generator=generator)[:, 0]
        values = served.gather(1, tokens[:, None])[:, 0].tolist()
        sample = TokenSample([0, *tokens.tolist()], 1, {"rollout_log_probs": [0.0, *values]})
        batch = TokenBatch.of([sample])
        batch.extras["old_log_probs"] = scores(batch, temperature).log_probs  # type: ignore[index]
        return error_message_of(
            lambda: check_served_log_probs(
                engine, [batch], temperature, fresh=fresh, thorough=thorough
            )
        )

    noise = 0.02 * torch.randn(logits.shape, generator=generator)  # as of bf16
    return {
        "same": refusal(0.7, table(0.7)),
        "rounded": refusal(0.9, table(0.9) + noise),
        "raw": refusal(0.9, table(1.0) + noise),
        "raw at 1": refusal(1.0, table(1.0)),
        "not looked at closely": refusal(0.9, table(1.0), thorough=False),
        "truncated": refusal(1.0, table(1.0, top_k=4), top_k=4),
        "far": refusal(1.0, table(1.0) + 0.5),
        "of other weights, as they may be": refusal(1.0, table(1.0) + 0.5, fresh=False),
        "raw of other weights": refusal(0.7, table(1.0) + noise, fresh=False),
    }


def test_served_log_probs_of_another_distribution_are_refused():
    [result] = run_ranks(check_on_one_rank, 1)
    for name in ("same", "rounded", "raw at 1", "not looked at closely",
                 "of other weights, as they may be"):  # fmt: skip
        assert not result[name], name
    assert "those of temperature 1" in result["raw of other weights"]
    assert "those of temperature 1, and responses are sampled at --temperature 0.9" in result["raw"]
    assert "--logprobs-mode processed_logprobs" in result["raw"]
    assert "+0.5 nats per token on average" in result["far"]
    assert "nats per token on average" in result["truncated"]


def test_sampling_by_servers_that_training_cannot_score_is_refused():
    refuse_sampling(0.01, 0, 1.0)
    for top_k, top_p, flag in ((20, 1.0, "--top-k 20"), (0, 0.9, "--top-p 0.9")):
        with pytest.raises(UserError, match=f"{flag} is incompatible with --rollout-url"):
            refuse_sampling(1.0, top_k, top_p)
    with pytest.raises(UserError, match=r"--temperature 0.005 is incompatible .* at least 0.01"):
        refuse_sampling(0.005, 0, 1.0)
