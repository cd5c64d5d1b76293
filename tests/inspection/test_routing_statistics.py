"""Tests of routing statistics against loops over single tokens and known results."""

import math
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_ext.inspection.routing_statistics import domain_information, routing_statistics
from megatron_ext.inspection.routing_sums import LOSS_EDGES, LOSS_KINDS, RoutingSums

DOMAINS, LAYERS, EXPERTS = 3, 2, 5


def routing(maps, margins=None, losses=None):
    """Return a substitute for a Routing, whose class needs Megatron."""
    tokens = maps.shape[1]
    return SimpleNamespace(
        maps=maps,
        fan_out=maps.sum(-1),
        margins=maps.float() - 0.5 if margins is None else margins,
        losses=torch.rand(tokens) if losses is None else losses,
    )


def random_windows():
    generator = torch.Generator().manual_seed(0)
    windows = []
    for number in range(12):
        shape = (LAYERS, 5 + 7 * number, EXPERTS)
        margins = torch.randn(shape, generator=generator) * (1 + 4 * (number == 6))
        losses = torch.rand(shape[1], generator=generator) * 12
        losses[0] = torch.nan
        windows.append((number % DOMAINS, routing(margins > 0.4, margins, losses)))
    return windows


@pytest.fixture(scope="module")
def windows():
    return random_windows()


@pytest.fixture(scope="module")
def figures(windows):
    sums = RoutingSums(DOMAINS, LAYERS, EXPERTS)
    for domain, window in windows:
        sums.add(domain, window)
    return routing_statistics(sums, [1, 3], ["a", "b", "c"])


def tokens_of(windows, layer):
    """Return (domain, experts that took it) of every token of a layer."""
    return [
        (domain, set(token.nonzero().flatten().tolist()))
        for domain, window in windows
        for token in window.maps[layer]
    ]


def test_shares_fan_out_and_coactivation_match_loops_over_tokens(windows, figures):
    for layer in range(LAYERS):
        tokens = tokens_of(windows, layer)
        assert figures["tokens"] == len(tokens)
        for number, name in enumerate("abc"):
            own = [experts for domain, experts in tokens if domain == number]
            result = figures["domains"][name]
            assert result["tokens"] == len(own)
            share = [sum(e in experts for experts in own) / len(own) for e in range(EXPERTS)]
            assert result["share"][layer] == pytest.approx(share, abs=1e-5)
            assert result["fan_out"][layer] == pytest.approx(np.mean([*map(len, own)]), abs=1e-5)
        histogram = [sum(len(experts) == n for _, experts in tokens) for n in range(EXPERTS + 1)]
        assert figures["fan_out_histogram"][layer] == histogram
        for i, j in product(range(EXPERTS), repeat=2):
            both = sum({i, j} <= experts for _, experts in tokens)
            assert figures["coactivation"]["together"][layer][i][j] == both
            ratio = figures["coactivation"]["observed_over_expected"][layer][i][j]
            if i == j:
                assert ratio is None
                continue
            one, other = (sum(e in experts for _, experts in tokens) for e in (i, j))
            assert ratio == pytest.approx(both * len(tokens) / (one * other), rel=1e-4)


def test_routing_counts_are_consistent(windows, figures):
    pairs = figures["tokens"] * EXPERTS
    for layer in range(LAYERS):
        total = sum(sum(domain["load"][layer]) for domain in figures["domains"].values())
        by_fan_out = enumerate(figures["fan_out_histogram"][layer])
        assert total == sum(n * count for n, count in by_fan_out)
        margins = figures["margins"][layer]
        assert margins["below"] + sum(margins["counts"]) + margins["above"] == pairs
    predicted = figures["tokens"] - len(windows)  # all but the first of each window
    for kind in LOSS_KINDS:
        assert sum(figures["fan_out_by_loss"][kind]["tokens"]) == predicted


def test_margin_histogram_matches_single_margins(windows, figures):
    for layer in range(LAYERS):
        result = figures["margins"][layer]
        first = windows[0][1].margins[layer].abs().max()
        limit = result["limit"]
        assert first * 1.25 <= limit <= first * 2.5
        values = torch.cat([window.margins[layer].flatten() for _, window in windows]).double()
        inside = values[values.abs() <= limit].numpy()
        counts, _ = np.histogram(inside, bins=len(result["counts"]), range=(-limit, limit))
        assert result["counts"] == counts.tolist()
        assert (result["below"], result["above"]) == (
            int((values < -limit).sum()), int((values >= limit).sum()),
        )  # fmt: skip
        assert result["above"] > 0  # a later window is wider


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_fan_out_by_loss_matches_the_tokens_of_each_bucket(windows, figures, kind):
    result = figures["fan_out_by_loss"][kind]
    for layer in range(LAYERS + 1):
        for bucket, (low, high) in enumerate(pairwise(LOSS_EDGES)):
            values = []
            for _, window in windows:
                fan_out = window.fan_out.double()
                fan_out = fan_out.mean(0) if layer == LAYERS else fan_out[layer]
                for at in range(1, len(window.losses)):
                    if low <= window.losses[at] < high:
                        values.append(float(fan_out[at - 1 if kind == "next" else at]))
            assert result["tokens"][bucket] == len(values)
            mean, error = (result[name][layer][bucket] for name in ("mean", "standard_error"))
            if not values:
                assert mean is None
                continue
            assert mean == pytest.approx(np.mean(values), abs=1e-4)
            if len(values) > 1:
                expected = np.std(values, ddof=1) / math.sqrt(len(values))
                assert error == pytest.approx(expected, abs=1e-4)


def test_specialization_matches_its_definitions(windows, figures):
    for layer in range(LAYERS):
        joint = np.zeros((DOMAINS, EXPERTS))
        share = np.zeros((DOMAINS, EXPERTS))
        for domain, experts in tokens_of(windows, layer):
            for expert in experts:
                joint[domain, expert] += 1
        for domain in range(DOMAINS):
            share[domain] = joint[domain] / figures["domains"]["abc"[domain]]["tokens"]
            joint[domain] /= joint[domain].sum() * DOMAINS
        information = sum(
            p * math.log(p * DOMAINS / joint[:, e].sum())
            for (_, e), p in np.ndenumerate(joint)
            if p
        )
        of_expert = joint.sum(axis=0)
        bound = min(math.log(DOMAINS), -sum(p * math.log(p) for p in of_expert))
        result = figures["specialisation"]
        assert result["nmi"][layer] == pytest.approx(information / bound, rel=1e-4)
        for expert in range(EXPERTS):
            p = share[:, expert] / share[:, expert].sum()
            score = 1 + sum(x * math.log(x) for x in p if x) / math.log(DOMAINS)
            assert result["experts"][layer][expert] == pytest.approx(score, abs=1e-5)


def sums_of_shares(shares, tokens=4000):
    """Return sums of tokens that experts take with probability `shares [domains][experts]`."""
    shares = torch.tensor(shares)
    sums = RoutingSums(len(shares), 1, shares.shape[1])
    generator = torch.Generator().manual_seed(1)
    for domain, share in enumerate(shares):
        uniform = torch.rand(1, tokens, len(share), generator=generator)
        sums.add(domain, routing(uniform < share))
    return sums


def test_specialization_of_exclusive_and_of_indifferent_experts():
    special = routing_statistics(
        sums_of_shares([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]), [0], ["a", "b"]
    )
    assert special["specialisation"]["nmi"] == pytest.approx([1.0])
    assert special["specialisation"]["experts"][0] == pytest.approx([1.0] * 4)
    even = routing_statistics(sums_of_shares([[0.25] * 4] * 2), [0], ["a", "b"])["specialisation"]
    assert even["nmi"][0] < 6 * even["nmi_by_chance"][0] < 2e-3
    assert max(even["experts"][0]) < 2e-3


@pytest.mark.parametrize("pairs", [(20_000, 20_000), (200_000, 2_000), (100_000, 50_000, 1_000)])
def test_information_by_chance_is_that_of_experts_drawn_without_regard_to_the_domain(pairs):
    random = np.random.default_rng(0)
    sums = RoutingSums(len(pairs), 100, 8)  # a hundred layers for one mean
    draws = [random.multinomial(count, [1 / 8] * 8, size=100) for count in pairs]
    sums.load[:] = draws
    nmi, chance = domain_information(sums)
    assert nmi.mean() == pytest.approx(chance.mean(), rel=0.15)


def test_undefined_statistics_are_none():
    sums = sums_of_shares([[0.0, 0.5, 0.5]])
    figures = routing_statistics(sums, [0], ["only"])
    assert figures["specialisation"]["nmi"] == [None]
    assert figures["specialisation"]["experts"] == [[None] * 3]
    assert figures["coactivation"]["observed_over_expected"][0][0] == [None] * 3
    sums.add(0, routing(torch.ones(1, 1, 3, dtype=torch.bool), torch.full((1, 1, 3), torch.inf)))
    assert routing_statistics(sums, [0], ["only"])["margins"][0]["above"] == 3
