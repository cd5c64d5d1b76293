"""Statistics of routing: shares, specialization, margins, fan-out by loss, co-activation.

Shapes: D domains, L MoE layers, E experts. Entropies are in nats, with `0 log 0 = 0`.
"""

from typing import Any

import numpy as np

from megatron_ext.inspection.routing_sums import LOSS_EDGES, LOSS_KINDS, Floats, RoutingSums

FORMULAS = {
    "share": "tokens of the domain that the expert takes / tokens of the domain: the domain "
    "specialization of OLMoE (arXiv 2409.02060, section 5)",
    "nmi": "I(domain; expert) / min(H(domain), H(expert)) per layer, for p(domain, expert) = "
    "1/D * load(domain, expert) / load(domain), which gives every domain the same weight. 0: "
    "experts do not distinguish domains; 1: one determines the other (NMI_min of Vinh, Epps and "
    "Bailey, JMLR 11, 2010)",
    "nmi_by_chance": "(D - 1)(E - 1) / (2 D * pairs of a domain) / min(H(domain), H(expert)), with "
    "the harmonic mean of the domains' pairs: approximately the value for independent pairs of "
    "token and expert. Pairs of one text are not independent, so that it is a lower bound",
    "expert_specialisation": "1 - H(domain | expert) / log D, for p(domain | expert) = share / sum "
    "of the expert's shares. 0: the expert takes the same share of every domain; 1: it takes "
    "tokens of one domain only",
    "margin": "logit - threshold (token choice: score - k-th largest score of the other experts), "
    "above 0 where the expert takes the token",
    "fan_out_by_loss": "mean fan-out of the tokens in a range of losses (next: loss of the token "
    "that is predicted here; own: loss of the token itself), with a standard error that assumes "
    "independent tokens",
    "coactivation": "tokens that both experts take * tokens / (tokens of one * tokens of the "
    "other): 1 for independent experts",
}


def routing_statistics(sums: RoutingSums, layers: list[int], domains: list[str]) -> dict[str, Any]:
    """Return all statistics as JSON values, with None for undefined ones.

    Args:
        sums: Sums over the tokens of all domains.
        layers: Numbers of the MoE layers, `[L]`.
        domains: Names of the domains, `[D]`.
    """
    share = shares(sums)
    nmi, chance = domain_information(sums)
    return {
        "formulas": FORMULAS,
        "layers": layers,
        "experts": sums.load.shape[2],
        "tokens": int(sums.tokens.sum()),
        "domains": {
            name: {
                "tokens": int(sums.tokens[i]),
                "load": sums.load[i].tolist(),
                "share": plain(share[i]),
                "fan_out": plain(share[i].sum(axis=-1)),
            }
            for i, name in enumerate(domains)
        },
        "specialisation": {
            "nmi": plain(nmi),
            "nmi_by_chance": plain(chance),
            "experts": plain(expert_specialisation(sums)),
        },
        "fan_out_histogram": sums.fan_out.tolist(),
        "margins": [
            {"limit": float(limit), "below": int(row[0]), "counts": row[1:-1].tolist()}
            | {"above": int(row[-1])}
            for limit, row in zip(margin_limits(sums), sums.margins)
        ],
        "fan_out_by_loss": {
            "edges": plain(LOSS_EDGES),
            **{
                kind: {
                    "tokens": sums.by_loss[i, 0, :, 0].astype(int).tolist(),
                    "mean": plain(mean),
                    "standard_error": plain(error),
                }
                for i, (kind, (mean, error)) in enumerate(zip(LOSS_KINDS, fan_out_by_loss(sums)))
            },
        },
        "coactivation": {
            "together": sums.together.tolist(),
            "observed_over_expected": plain(coactivation(sums)),
        },
    }


def shares(sums: RoutingSums) -> Floats:
    """Return the share of a domain's tokens that each expert takes, `[D, L, E]`."""
    return sums.load / sums.tokens[:, None, None]


def domain_information(sums: RoutingSums) -> tuple[Floats, Floats]:
    """Return the normalized mutual information of domain and expert, `[L]`, and that by chance.

    The second array, `[L]`, approximates the value for independent pairs of token and expert. Both
    are NaN where a layer routes no token of a domain, or if there is only one domain.
    """
    domains, _, experts = sums.load.shape
    pairs = sums.load.sum(axis=2, keepdims=True)  # [D, L, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = sums.load / pairs / domains  # [D, L, E]
        of_expert = joint.sum(axis=0, keepdims=True)
        information = _entropy(of_expert[0]) + np.log(domains) - _entropy(joint, axis=(0, 2))
        bound = np.minimum(np.log(domains), _entropy(of_expert[0]))
        # Domains have equal weights, so that the noise of the smallest counts most.
        of_domain = domains / (1 / pairs).sum(axis=(0, 2))
        chance = (domains - 1) * (experts - 1) / (2 * domains * of_domain) / bound
        nmi = np.where(bound > 1e-12, information / bound, 0.0)
    undefined = np.isnan(information) | (domains == 1)
    chance = np.where(bound > 1e-12, chance, np.nan)
    return np.where(undefined, np.nan, nmi.clip(0, 1)), np.where(undefined, np.nan, chance)


def expert_specialisation(sums: RoutingSums) -> Floats:
    """Return how far each expert specializes in one domain, `[L, E]` in [0, 1].

    The value is NaN for an expert without tokens, or if there is only one domain.
    """
    share = shares(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_domain = share / share.sum(axis=0)  # [D, L, E]
        score = 1 - _entropy(of_domain, axis=0) / np.log(len(share))
    return np.where(len(share) == 1, np.nan, score)


def fan_out_by_loss(sums: RoutingSums) -> list[tuple[Floats, Floats]]:
    """Return mean fan-out and its standard error, `[L + 1, buckets]`, for each of `LOSS_KINDS`.

    The last layer is the mean over layers. Values that need more tokens are NaN.
    """
    result = []
    for count, total, squares in np.moveaxis(sums.by_loss, -1, 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / count
            variance = (squares - count * mean**2).clip(0) / np.where(count > 1, count - 1, np.nan)
            result.append((mean, np.sqrt(variance / count)))
    return result


def coactivation(sums: RoutingSums) -> Floats:
    """Return the number of tokens that two experts share over the expected number, `[L, E, E]`.

    The value is NaN on the diagonal, and where an expert has no token.
    """
    taken = np.diagonal(sums.together, axis1=1, axis2=2).astype(float)  # [L, E]
    expected = taken[:, :, None] * taken[:, None, :] / sums.tokens.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums.together / expected
    ratio[:, np.eye(ratio.shape[-1], dtype=bool)] = np.nan
    return ratio


def margin_limits(sums: RoutingSums) -> Floats:
    """Return the largest margin within the bins of each layer, `[L]`."""
    assert sums.margin_limits is not None, "no text was added"
    return sums.margin_limits


def _entropy(p: Floats, axis: int | tuple[int, ...] = -1) -> Floats:
    logs = np.log(np.where(p > 0, p, 1.0))  # NaN stays NaN in p
    return -(p * logs).sum(axis=axis)


def plain(values: Floats) -> Any:
    """Return nested lists of numbers, to six digits, with None for infinities and NaN."""
    if values.ndim:
        return [plain(row) for row in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None
