"""Tests of generation by models with recurrent layers, against full forward passes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import megatron
from tests.closeness import rounding
from tests.distributed import run_ranks
from tests.inference.checkpoint import MAX_LENGTH, hybrid_run_dir, mamba_run_dir  # noqa: F401
from tests.inference.test_generation import (
    GREEDY,
    PROMPTS,
    greedy_by_full_forwards,
    logits_with_cache_and_in_full,
    plain,
)
from tests.megatron import MAMBA

# One row begins, ends or moves to another slot while others run; a prompt may have one token.
RAGGED = [list(range(9, 9 + MAX_LENGTH - 3)), PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]]


def in_two_slots(trained: Any) -> list[Any]:
    """Generate the rows of RAGGED in a cache for two rows at a time."""
    from megatron_ext.inference.engine import GenerationEngine
    from megatron_ext.inference.row import GenerationRow

    rows = [GenerationRow(trained, prompt, GREEDY, 0) for prompt in RAGGED]
    engine, waiting = GenerationEngine(trained, max_slots=2, prompt_tokens=5), list(rows)
    while waiting or engine.rows:
        while waiting and engine.free:
            engine.add(waiting.pop(0))
        engine.step()
    return plain([row.completion for row in rows])


def on_one_rank(path: Any) -> SimpleNamespace:
    from megatron_ext.inference.loading import load_model

    trained = load_model(path)
    return SimpleNamespace(
        logits=logits_with_cache_and_in_full(trained),
        completions=in_two_slots(trained),
        step_by_step=[greedy_by_full_forwards(trained, prompt) for prompt in RAGGED[1:]],
    )


@pytest.fixture(scope="module", params=["hybrid_run_dir", "mamba_run_dir"])
def one_rank(request: pytest.FixtureRequest) -> SimpleNamespace:
    run_dir = request.getfixturevalue(request.param)
    [facts] = run_ranks(on_one_rank, 1, run_dir, timeout=240)
    facts.run_dir = run_dir
    return facts


def test_hybrid_logits_with_a_cache_are_those_of_the_full_forward(
    one_rank: SimpleNamespace,
) -> None:
    with_cache, full = one_rank.logits
    assert full[full.isfinite()].std() > 1  # a trained model
    torch.testing.assert_close(with_cache, full, atol=rounding(full, 1e-5), rtol=0)


def check_tokens(completions: list[Any], step_by_step: list[Any]) -> None:
    assert len(completions[0].tokens) == 3  # the length of the model
    for completion, (tokens, log_probs) in zip(completions[1:], step_by_step, strict=True):
        assert completion.tokens == tokens
        assert completion.log_probs == pytest.approx(log_probs, abs=rounding(log_probs, 1e-5))


def test_hybrid_rows_in_changing_slots_are_those_of_full_forwards(
    one_rank: SimpleNamespace,
) -> None:
    check_tokens(one_rank.completions, one_rank.step_by_step)


def on_two_ranks(path: Any, sizes: dict[str, int]) -> list[Any]:
    from megatron_ext.inference.loading import ParallelLayout, load_model

    return in_two_slots(load_model(path, ParallelLayout(**sizes)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_hybrid_generation_on_two_ranks_equals_one_rank(
    one_rank: SimpleNamespace, sizes: dict[str, int]
) -> None:
    for completions in run_ranks(on_two_ranks, 2, one_rank.run_dir, sizes):
        check_tokens(completions, one_rank.step_by_step)


def mamba_layer_in_parts() -> None:
    """On a rank: a row that continues its state has the outputs of one pass over all tokens."""
    _, _, [model] = megatron.start("--hybrid-layer-pattern", "M-ME", *MAMBA)
    mixer = model.decoder.layers[0].self_attention
    random = torch.Generator().manual_seed(0)
    tokens = 150  # two chunks of 64 and a part
    projected = torch.randn(2, tokens, mixer.in_proj.weight.shape[0], generator=random)
    with torch.no_grad():
        empty = [part.repeat(2, *[1] * (part.dim() - 1)) for part in mixer._empty_states(projected)]
        whole, *last = mixer._advance(projected, *empty)
        for sizes in ([1] * tokens, [1, 100, 2, 47]):
            parts, states = [], empty
            for part in projected.split(sizes, dim=1):
                output, *states = mixer._advance(part, *states)
                parts.append(output.view(2, part.shape[1], -1))
            together = torch.cat(parts, dim=1).flatten(0, 1)
            close = rounding(whole, 1e-5)
            torch.testing.assert_close(together, whole, atol=close, rtol=0)
            for ours, expected in zip(states, last, strict=True):
                torch.testing.assert_close(ours, expected, atol=close, rtol=0)


def test_mamba_layer_continues_its_state() -> None:
    run_ranks(mamba_layer_in_parts, 1)


def rule_against_its_definition() -> None:
    from megatron_ext.devices import activate

    activate()
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    from megatron_ext.model.gated_delta_net import normalize, recurrent_step

    random = torch.Generator().manual_seed(0)
    rows, tokens, heads, keys, values = 2, 70, 3, 8, 5  # more than one chunk of 64
    q, k = (normalize(torch.randn(rows, tokens, heads, keys, generator=random)) for _ in "qk")
    v = torch.randn(rows, tokens, heads, values, generator=random)
    decay = -torch.rand(rows, tokens, heads, generator=random)
    beta = torch.rand(rows, tokens, heads, generator=random)
    first = torch.randn(rows, heads, keys, values, generator=random)
    chunked, last = torch_chunk_gated_delta_rule(
        q, k, v, g=decay, beta=beta, initial_state=first, output_final_state=True
    )
    state, outputs = first, []
    for t in range(tokens):
        at = slice(t, t + 1)
        output, state = recurrent_step(
            q[:, at], k[:, at], v[:, at], decay[:, at], beta[:, at], state
        )
        outputs.append(output)
    torch.testing.assert_close(
        torch.cat(outputs, dim=1), chunked, atol=rounding(chunked, 1e-5), rtol=0
    )
    torch.testing.assert_close(state, last, atol=rounding(last, 1e-5), rtol=0)
    # The paper's equation for one row and head: S <- a S (I - b k k^T) + b v k^T, o = S q.
    matrix, row, head = first[1, 2].T, 1, 2
    for t in range(tokens):
        key, b = k[row, t, head], beta[row, t, head]
        forget = torch.eye(keys) - b * torch.outer(key, key)
        matrix = decay[row, t, head].exp() * matrix @ forget
        matrix = matrix + b * torch.outer(v[row, t, head], key)
        expected = matrix @ q[row, t, head] * keys**-0.5
        close = rounding(chunked[row, :, head], 1e-5)
        torch.testing.assert_close(chunked[row, t, head], expected, atol=close, rtol=0)


def test_recurrent_step_equals_the_chunked_rule_and_the_paper() -> None:
    run_ranks(rule_against_its_definition, 1)
