"""Summaries of the routing metrics of all layers: means, extremes, and a picture of the loads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_PIXELS = 8  # width and height of an expert in the picture
_BRIGHTEST = 3.0  # load, divided by the mean, from which the color is the brightest


def summarize_layers(layers: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Return metrics of the whole model from those of its MoE layers.

    Args:
        layers: Metrics by layer, see `megatron_ext.moe.routing_metrics.layer_metrics`.

    Returns:
        The mean of each number over the layers, by its name; and `largest_load`, the load of the
        busiest expert of any layer divided by the mean load, and `all_dead_experts`, the number of
        experts without a token in all layers. Empty without layers.
    """
    if not layers:
        return {}
    first = next(iter(layers.values()))
    names = [name for name, value in first.items() if isinstance(value, int | float)]
    means = {name: float(np.mean([layer[name] for layer in layers.values()])) for name in names}
    return means | {
        "largest_load": max(layer["load_max_over_mean"] for layer in layers.values()),
        "all_dead_experts": float(sum(layer["dead_experts"] for layer in layers.values())),
    }


def load_picture(layers: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """Return a picture of the experts' loads: a row for each layer, a column for each expert.

    Black is no token, and the brightest color at least three times the mean load.

    Args:
        layers: Metrics by layer, at least one, with `experts/load`.

    Returns:
        uint8 `[height, width, 3]`.
    """
    from matplotlib import colormaps

    loads = np.array([layers[number]["experts/load"] for number in sorted(layers)])
    relative = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-12) / _BRIGHTEST
    colors = colormaps["inferno"](np.clip(relative, 0, 1))[..., :3]
    pixels = (255 * colors).round().astype(np.uint8)
    return np.ascontiguousarray(pixels.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1))
