"""Upcycling: conversion of a dense model to an Expert Threshold model of nearly equal outputs.

The dense block f has d_ff intermediate channels. If it is cut into G slices of d_ff / G channels, f
is the sum of its slices, f = f_1 + ... + f_G, because each channel contributes independently. An
expert is a copy of one slice with its down-projection scaled, so that a token that is routed to a
copy of every slice gets f. This is the "virtual group" of fine-grained upcycling (He et al., arXiv
2410.07524, section 3); Komatsuzaki et al. (arXiv 2212.05055) copy the whole block, G = 1. He et al.
scale all three matrices of a SwiGLU block by a cube root, which changes its function; here the
scale is applied to the down-projection alone.

Expert i contains slice i mod S of the S slices that are routed, so that there are n / S copies of
each slice. With a mean fan-out of m, a token gets m / S copies of a slice on average, each weighted
by the gate, and the scale is S / (m * gate(0)): router rows are small, so that every gate begins
near gate(0).

A top-k router selects exactly one copy of each slice if the copies of a group have the same rows.
Thresholds act on each expert independently. Therefore the rows of q = n / m copies of a slice (of
all copies if q is not an integer that divides their number) are drawn with a sum of 0: the larger a
token's logit for one of them, the smaller its logits for the others.

* q = 2: the two rows are r and -r, and each expert takes half of the tokens. Every token gets
  exactly one of the two, whatever the text, and the model equals the dense one except for the
  gates' distance from gate(0), which vanishes with the rows.
* q > 2: half-spaces cannot divide the tokens into more than two regions, so that some tokens get
  two copies of a slice and some get none. The mean over tokens equals the dense block; the output
  of a single token does not.

Slices of a shared expert process every token and are exact. If all slices are shared, the routed
experts are copies with a down-projection of 0, and the model equals the dense one for any number of
experts, at the cost of their computation; the experts learn from the first step on.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture
from megatron_ext.hf.families import OWN
from megatron_ext.hf.sources import AVERAGE, UPDATES, Source, Tensors

_MLP = re.compile(
    r"(?P<mlp>model\.layers\.(?P<layer>\d+)\.mlp\.)"
    r"(?:experts\.(?P<expert>\d+)|(?P<shared>shared_expert))\.(?P<matrix>\w+_proj)\.weight"
)
_ROUTER = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class Upcycling:
    """Settings of upcycling.

    Attributes:
        experts: Number of routed experts in a layer, n.
        moe_layers: For each layer, whether it gets experts.
        granularity: Number of slices of the dense block, G.
        shared_slices: Number of slices in a shared expert.
        mean_experts: Mean fan-out, m. Default: the number of routed slices, S.
        gate: Function from router logits to weights, "sigmoid" or "softmax".
        router_std: Standard deviation of the initial logits, assuming that the channels of the
            normalized input are independent.
        noise: Standard deviation of the noise on the experts' weights, relative to that of the
            weights.
        seed: Seed of the router and the noise.
        ema_decay: Decay of the thresholds' moving average, for training.
    """

    experts: int
    moe_layers: tuple[bool, ...]
    granularity: int = 1
    shared_slices: int = 0
    mean_experts: float | None = None
    gate: str = "sigmoid"
    router_std: float = 0.1
    noise: float = 0.0
    seed: int = 0
    ema_decay: float = 0.999

    @property
    def all_shared(self) -> bool:
        """Whether the shared expert contains the whole dense block."""
        return self.shared_slices == self.granularity

    @property
    def routed_slices(self) -> int:
        """Number of slices that are routed, S."""
        return self.granularity - (0 if self.all_shared else self.shared_slices)

    @property
    def mean(self) -> float:
        """Mean fan-out, m."""
        return self.routed_slices if self.mean_experts is None else self.mean_experts

    @property
    def group(self) -> int:
        """Number of copies of a slice whose rows sum to 0, q; 1 if there are no such groups."""
        copies = self.experts // self.routed_slices
        size = self.experts / self.mean
        return int(size) if size.is_integer() and copies % size == 0 else copies

    @property
    def scale(self) -> float:
        """Scale of an expert's down-projection."""
        gate_at_0 = {"sigmoid": 0.5, "softmax": 1.0 / self.experts}[self.gate]
        return 0.0 if self.all_shared else self.routed_slices / (self.mean * gate_at_0)

    def architecture(self, dense: Architecture) -> Architecture:
        """Return the architecture of the upcycled model.

        Args:
            dense: Architecture of the dense model.

        Raises:
            UserError: The settings do not fit the dense model.
        """
        n, granularity, slices = self.experts, self.granularity, self.routed_slices
        if granularity < 1 or dense.ffn % granularity:
            raise UserError(
                f"--granularity {granularity} does not divide the {dense.ffn} intermediate "
                "channels of the dense block. Choose a divisor."
            )
        if not 0 <= self.shared_slices <= granularity:
            raise UserError(
                f"--shared-slices {self.shared_slices} is out of range. Choose a number from 0 to "
                f"--granularity {granularity}."
            )
        if n < 1 or n % slices:
            raise UserError(
                f"--num-experts {n} is not divisible by the {slices} slices that are routed. "
                f"Choose a multiple of {slices}."
            )
        if not 0 < self.mean <= n:
            raise UserError(
                f"--mean-experts {self.mean:g} is out of range. Set it above 0 and to at most "
                f"--num-experts {n}."
            )
        if self.router_std <= 0:
            raise UserError(f"--router-std {self.router_std:g} is not above 0. Set it above 0.")
        if self.noise < 0:
            raise UserError(f"--noise {self.noise:g} is negative. Set it to 0 or more.")
        if not any(self.moe_layers) or len(self.moe_layers) != dense.layers:
            raise UserError(
                f"--moe-layer-freq selects {sum(self.moe_layers)} of {len(self.moe_layers)} "
                f"layers, and the model has {dense.layers}. Give one number per layer, at least "
                "one of them 1."
            )
        has_integer_mean = float(self.mean).is_integer()
        return replace(
            dense,
            router="expert-threshold",
            moe_layers=self.moe_layers,
            experts=n,
            moe_ffn=dense.ffn // granularity,
            shared_ffn=self.shared_slices * (dense.ffn // granularity),
            topk=int(self.mean) if has_integer_mean else max(1, round(self.mean)),
            mean_experts=None if has_integer_mean else self.mean,
            gate=self.gate,
            ema_decay=self.ema_decay,
        )


def upcycled(dense: Source, plan: Upcycling) -> Source:
    """Return the Expert Threshold model of a dense model; its thresholds have no value yet.

    Args:
        dense: The dense model.
        plan: Settings.

    Raises:
        UserError: The settings do not fit the dense model.
    """
    model = plan.architecture(dense.model)
    tensors = _UpcycledTensors(dense.tensors, dense.place, model, plan)
    return Source(dense.place, model, OWN, tensors, dense.carry_tokenizer)


class _UpcycledTensors:
    """Reader that computes each tensor from the dense ones on request."""

    def __init__(self, dense: Tensors, place: Path, model: Architecture, plan: Upcycling) -> None:
        self._dense, self._plan, self._model = dense, plan, model
        self._read = lru_cache(maxsize=2)(dense.read)  # experts read the same matrices in turn
        links = OWN.links(model)
        self.shapes = {name: shape for link in links for name, shape in link.parts}
        self.dtypes = {name: self._dtype(name) for name in self.shapes}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        if match := _MLP.fullmatch(name):
            return self._slices(name, match)
        if match := _ROUTER.fullmatch(name):
            return self._router(name, match["layer"])
        if name.endswith((AVERAGE, UPDATES)):
            return torch.zeros(self.shapes[name], dtype=self.dtypes[name])
        return self._dense.read(name)

    def _dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor: that of the dense one from which it is computed."""
        if name.endswith(AVERAGE):
            return torch.float32
        if name.endswith(UPDATES):
            return torch.int64
        if match := _MLP.fullmatch(name):
            name = f"{match['mlp']}{match['matrix']}.weight"
        # Routers have no dense tensor, and the type of most weights.
        return self._dense.dtypes.get(name, self._dense.dtypes["model.embed_tokens.weight"])

    def _slices(self, name: str, match: re.Match[str]) -> Tensor:
        """Return a matrix of an expert or of the shared expert."""
        plan, down = self._plan, match["matrix"] == "down_proj"
        matrix = self._read(f"{match['mlp']}{match['matrix']}.weight")
        # Channels are columns of the down-projection.
        width = matrix.shape[down] // plan.granularity
        if match["shared"]:
            return matrix.narrow(int(down), 0, plan.shared_slices * width)
        first = 0 if plan.all_shared else plan.shared_slices
        number = first + int(match["expert"]) % plan.routed_slices
        part = matrix.narrow(int(down), number * width, width)
        if not plan.noise and not down:
            return part
        exact = part.float()
        if down:
            exact = exact * plan.scale
        if plan.noise:
            exact = exact + self._normal(name, exact.shape) * plan.noise * exact.std()
        return exact.to(part.dtype)

    def _router(self, name: str, layer: str) -> Tensor:
        """Return router rows whose logits have the standard deviation, `[experts, hidden]`."""
        plan, model = self._plan, self._model
        groups = plan.experts // plan.routed_slices // plan.group
        rows = self._normal(name, torch.Size((plan.experts, model.hidden)))
        # Expert i is copy i // S of slice i % S.
        rows = rows.view(groups, plan.group, plan.routed_slices, model.hidden)
        if plan.group > 1:
            rows = rows - rows.mean(dim=1, keepdim=True)
            rows[:, -1] = -rows[:, :-1].sum(dim=1)  # exact to the bit for groups of two
            rows = rows * (plan.group / (plan.group - 1)) ** 0.5
        spread = 1.0
        if model.norm_scale:
            norm = self._dense.read(f"model.layers.{layer}.post_attention_layernorm.weight")
            spread = float(norm.float().square().mean().sqrt())
        rows = rows.reshape(plan.experts, model.hidden)
        return (rows * (plan.router_std / (spread * model.hidden**0.5))).to(self.dtypes[name])

    def _normal(self, name: str, shape: torch.Size) -> Tensor:
        digest = hashlib.sha256(f"{self._plan.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(shape, generator=generator)
