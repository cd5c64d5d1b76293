"""Tests of policy losses against their formulas, sample by sample."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import LossSums, TokenScores
from alignment.rl.algorithms import ALGORITHMS, algorithm_by_name
from alignment.rl.policy_loss import PolicyLoss, kl
from megatron_ext.errors import UserError

LENGTHS = [(2, 5), (1, 9), (3, 3), (2, 4), (1, 1), (4, 7)]  # prompt, response


def policy_loss(name: str, **settings: Any) -> Any:
    return algorithm_by_name(name, **settings).loss


def numbers(generator: torch.Generator, count: int, spread: float) -> list[float]:
    return (spread * torch.randn(count, generator=generator)).tolist()


def samples(spread: float = 0.3) -> list[TokenSample]:
    """Return samples with all inputs of any loss; the tokens are the number of the sample."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for number, (prompt, response) in enumerate(LENGTHS):
        size = prompt + response
        old = numbers(generator, size, 1.0)
        near = [[a + b for a, b in zip(old, numbers(generator, size, spread))] for _ in range(3)]
        extras: dict[str, float | list[float]] = {
            "advantage": numbers(generator, 1, 1.0)[0],
            "old_log_probs": old,
            "rollout_log_probs": near[0],
            "reference_log_probs": near[1],
            "log_probs": near[2],
            "entropy": numbers(generator, size, 1.0),
        }
        result.append(TokenSample([number] * size, prompt, extras))
    return result


def scored(batch: TokenBatch) -> tuple[TokenScores, Tensor]:
    log_probs = batch.extras["log_probs"].double().requires_grad_()
    return TokenScores(log_probs, batch.extras["entropy"].double()), log_probs


def by_hand(rule: PolicyLoss, sample: TokenSample, log_probs: list[Tensor]) -> list[Tensor]:
    """Return the loss of each token of a response."""
    extras: Any = sample.extras
    part = {name: extras[name][sample.prompt :] for name in extras if name != "advantage"}
    changes = [new - old for new, old in zip(log_probs, part["old_log_probs"])]
    if rule.ratio_of == "sample":
        mean = torch.stack(changes).mean()
        changes = [mean] * len(changes)
    losses = []
    weights = [old - other for old, other in zip(part["old_log_probs"], part["rollout_log_probs"])]
    if rule.ratio_of == "sample":
        weights = [sum(weights) / len(weights)] * len(weights)
    for place, (change, new) in enumerate(zip(changes, log_probs)):
        ratio, advantage = change.exp(), extras["advantage"]
        gain = ratio * advantage
        if rule.clip is not None:
            low, high = 1 - rule.clip[0], 1 + rule.clip[1]
            gain = min(gain, min(max(ratio, torch.tensor(low)), torch.tensor(high)) * advantage)
        if rule.rollout_bound is not None:
            weight = math.exp(weights[place])
            if rule.rollout_rule == "truncate":
                weight = min(weight, rule.rollout_bound)
            elif not 1 / rule.rollout_bound <= weight <= rule.rollout_bound:
                weight = 0.0
            gain = gain * weight
        loss = -gain - rule.entropy * part["entropy"][place]
        if rule.kl:
            gap = new - part["reference_log_probs"][place]
            estimate = gap**2 / 2 if rule.divergence == "k2" else (-gap).exp() + gap - 1
            loss = loss + rule.kl * estimate
        losses.append(loss)
    return losses


def whole(rule: PolicyLoss, inputs: list[TokenSample]) -> tuple[float, list[list[float]]]:
    """Return the loss of all samples together and its gradients, by the formulas."""
    leaves = [
        [torch.tensor(value, dtype=torch.float64, requires_grad=True)
         for value in sample.extras["log_probs"][sample.prompt :]]  # type: ignore[index]
        for sample in inputs
    ]  # fmt: skip
    tokens = [by_hand(rule, sample, own) for sample, own in zip(inputs, leaves)]
    if rule.aggregation == "token-mean":
        loss = torch.stack([one for each in tokens for one in each]).mean()
    elif rule.aggregation == "sample-mean":
        loss = torch.stack([torch.stack(each).mean() for each in tokens]).mean()
    else:
        sums = [torch.stack(each).sum() / rule.max_tokens for each in tokens]
        loss = torch.stack(sums).mean()
    loss.backward()
    # Clipped tokens have no gradient.
    return loss.item(), [
        [0.0 if leaf.grad is None else leaf.grad.item() for leaf in own] for own in leaves
    ]


LOSSES: dict[str, Any] = {name: algorithm.loss for name, algorithm in ALGORITHMS.items()}
RULES = {
    **LOSSES,
    "constant divisor": replace(LOSSES["dr-grpo"], max_tokens=9),
    "near a reference, k3": replace(LOSSES["grpo"], kl=0.1),
    "near a reference, k2": replace(LOSSES["dapo"], kl=0.1, divergence="k2"),
    "entropy": replace(LOSSES["ppo"], entropy=0.05),
    "rollout weights cut": replace(LOSSES["grpo"], rollout_bound=1.2),
    "rollout weights masked": replace(LOSSES["dapo"], rollout_bound=1.2, rollout_rule="mask"),
    "samples' weights cut": replace(LOSSES["gspo"], rollout_bound=1.1),
    "samples' weights masked": replace(LOSSES["gspo"], rollout_bound=1.1, rollout_rule="mask"),
}
LAYOUTS: dict[str, Callable[[list[TokenSample]], list[TokenBatch]]] = {
    "a row each": lambda inputs: [TokenBatch.of(inputs)],
    "packed": lambda inputs: [TokenBatch.packed(inputs, 14)],
    "micro-batches": lambda inputs: [
        TokenBatch.of(inputs[:1], 20),
        TokenBatch.packed(inputs[1:4], 11),
        TokenBatch.of_rows([[], inputs[4:]]),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RULES)
def test_policy_loss_matches_the_formulas_on_every_layout(name: str, layout: str) -> None:
    rule, inputs = RULES[name], samples()
    loss, gradients = whole(rule, inputs)
    batches = LAYOUTS[layout](inputs)
    result: list[tuple[LossSums, Tensor, TokenBatch]] = []
    for batch in batches:
        scores, log_probs = scored(batch)
        result.append((rule(scores, batch), log_probs, batch))
    weight = sum(int(sums.weight) for sums, _, _ in result)
    assert sum(sums.total.item() for sums, _, _ in result) / weight == pytest.approx(loss, rel=1e-5)
    by_sample: dict[int, list[float]] = {}
    for sums, log_probs, batch in result:
        (gradient,) = torch.autograd.grad(sums.total / weight, log_probs)
        assert not gradient[~batch.loss_mask].any()
        for token, value in zip(batch.tokens[batch.loss_mask], gradient[batch.loss_mask]):
            by_sample.setdefault(int(token), []).append(float(value))
    for number, expected in enumerate(gradients):
        assert by_sample[number] == pytest.approx(expected, rel=1e-4, abs=1e-8)


GRID = list(
    itertools.product(
        ("grpo", "gspo", "rloo"),
        ("token-mean", "sample-mean", "sample-sum"),
        ((None, "truncate"), (1.1, "truncate"), (1.1, "mask")),
        ((0.0, "k3"), (0.1, "k3"), (0.1, "k2")),
    )
)


@pytest.mark.parametrize("name, aggregation, weights, divergence", GRID)
def test_policy_loss_gradient_is_that_of_its_value(name, aggregation, weights, divergence) -> None:
    """The reference is finite differences in fp64, with advantages that differ within a sample."""
    (bound, how), (weight, estimator) = weights, divergence
    rule = policy_loss(
        name, aggregation=aggregation, max_tokens=9, entropy=0.01, kl=weight,
        divergence=estimator, rollout_bound=bound, rollout_rule=how,
    )  # fmt: skip
    batch = TokenBatch.packed(samples(0.05), 14)
    extras = {name: values.double() for name, values in batch.extras.items()}
    extras["advantage"] = extras["advantage"] + 0.1 * batch.positions
    batch = replace(batch, extras=extras)

    def value(log_probs: Tensor) -> Tensor:
        sums = rule(TokenScores(log_probs, extras["entropy"]), batch)
        return sums.total / sums.weight

    point = extras["log_probs"].clone().requires_grad_()
    assert torch.autograd.gradcheck(value, point, eps=1e-7, atol=1e-6, rtol=1e-4)


def test_clip_removes_the_gradient_only_beyond_the_bound() -> None:
    rule = PolicyLoss(clip=(0.2, 0.3))
    for ratio, advantage, pulls in (
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (1.29, 1.0, True),
        (0.81, -1.0, True),
    ):
        extras = {"advantage": advantage, "old_log_probs": 0.0}
        batch = TokenBatch.of([TokenSample([1, 2], 1, extras)])
        log_probs = torch.full((1, 2), math.log(ratio), requires_grad=True)
        sums = rule(TokenScores(log_probs), batch)
        sums.total.backward()
        assert bool(log_probs.grad[0, 1]) is pulls  # type: ignore[index]
        assert float(sums.metrics["clipped"][0]) == (not pulls)
        assert float(sums.metrics["ratio"][0]) == pytest.approx(ratio)


def test_kl_estimators_match_the_divergence_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(2)
    ours, others = (torch.randn(8, generator=generator).double().log_softmax(0) for _ in range(2))
    truth = float((ours.exp() * (ours - others)).sum())
    for estimator in ("k1", "k3"):
        estimates = kl(ours, others, estimator)  # type: ignore[arg-type]
        assert float((ours.exp() * estimates).sum()) == pytest.approx(truth)
    assert (kl(ours, others, "k3") >= 0).all()


def test_policy_loss_ignores_prompt_tokens_far_from_the_reference() -> None:
    """Tokens that are not trained may be far from the reference."""
    values = {"rollout_log_probs": 0.0, "old_log_probs": 0.0, "reference_log_probs": -0.1}
    extras: dict[str, Any] = {name: [value] * 4 for name, value in values.items()}
    extras["advantage"] = 1.0
    batch = TokenBatch.of([TokenSample([1, 2, 3, 4], 2, extras)])
    log_probs = torch.tensor([[0.0, -95.0, -0.2, -0.2]], requires_grad=True)
    sums = replace(LOSSES["grpo"], kl=0.1)(TokenScores(log_probs), batch)
    sums.total.backward()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()


def test_policy_loss_refuses_wrong_settings() -> None:
    with pytest.raises(UserError, match=r"no algorithm 'grop'\. Choose one of grpo, "):
        policy_loss("grop")
    with pytest.raises(UserError, match="k1 has no gradient"):
        policy_loss("grpo", kl=0.1, divergence="k1")
    with pytest.raises(UserError, match="must be at least 1"):
        policy_loss("grpo", rollout_bound=0.5)
    with pytest.raises(UserError, match="a share below 1"):
        policy_loss("grpo", clip=(1.0, 0.2))
    assert policy_loss("dapo", kl=0.5).kl == 0.5
