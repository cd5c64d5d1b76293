"""A dense model as an Expert Threshold model that computes nearly the same at the start.

The dense block f has d_ff intermediate channels. Cut into G slices of d_ff / G, f is the sum of its
slices, f = f_1 + ... + f_G: each channel contributes alone. An expert is a copy of one slice with
its down-projection scaled, so that a token that gets a copy of every slice gets f. That is the
"virtual group" of fine-grained upcycling (He et al., arXiv 2410.07524, section 3; copies of the
whole block, G = 1, are Komatsuzaki et al.'s, arXiv 2212.05055). They scale all three matrices of a
SwiGLU block by a cube root, which changes its function; here the down-projection takes it all.

Expert i holds slice i mod S of the S slices that are routed, so there are n / S copies of each.
With a mean fan-out of m a token gets m / S copies of a slice on average, each weighted by the gate,
and the scale is S / (m * gate(0)): router rows are small, so every gate begins near gate(0).

A top-k router finds exactly one copy of each slice by giving the copies of a group the same rows.
Thresholds act on each expert alone. So the rows of q = n / m copies of a slice (all of them where
that is no whole number that divides their count) are drawn with a sum of 0: the more a token is for
one of them, the less it is for the others.

* q = 2: the two rows are r and -r, and each takes half of the tokens: every token gets exactly one
  of the two, whatever the text, and the model is the dense one up to the gates' distance from
  gate(0), which vanishes with the rows.
* q > 2: half-spaces cannot part the tokens into more than two regions, so some tokens get two
  copies of a slice and some none. The mean over tokens is the dense block, a single token's not.

Slices of a shared expert see every token and are exact. When all are shared, the routed experts are
copies with a down-projection of 0, and the model is the dense one for any number of experts, at the
price of their computation; they learn from the first step on.
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
    """How a dense model becomes one with experts.

    Attributes:
        experts: routed experts of a layer, n.
        granularity: slices of the dense block, G.
        shared_slices: how many of them a shared expert holds; all: see above.
        mean_experts: routed experts of a token on average, m. Default: the routed slices, S.
        moe_layers: for each layer, whether it gets experts.
        gate: what makes a weight of a logit; sigmoid or softmax.
        router_std: standard deviation of the first logits, were the normalised input's channels
            independent.
        noise: standard deviation of what is added to the experts' weights, in those of the weights.
        seed: of router and noise.
        ema_decay: of the thresholds, for training.
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
        return self.shared_slices == self.granularity

    @property
    def routed_slices(self) -> int:
        """S."""
        return self.granularity - (0 if self.all_shared else self.shared_slices)

    @property
    def mean(self) -> float:
        """m."""
        return self.routed_slices if self.mean_experts is None else self.mean_experts

    @property
    def group(self) -> int:
        """q: how many copies of a slice have rows with a sum of 0; 1 for no such group."""
        copies = self.experts // self.routed_slices
        wanted = self.experts / self.mean
        return int(wanted) if wanted.is_integer() and copies % wanted == 0 else copies

    @property
    def scale(self) -> float:
        """What multiplies an expert's down-projection."""
        gate_at_0 = {"sigmoid": 0.5, "softmax": 1.0 / self.experts}[self.gate]
        return 0.0 if self.all_shared else self.routed_slices / (self.mean * gate_at_0)

    def architecture(self, dense: Architecture) -> Architecture:
        """What the dense model becomes.

        Raises:
            UserError: it cannot be cut like this, naming the flag.
        """
        n, granularity, slices = self.experts, self.granularity, self.routed_slices
        if granularity < 1 or dense.ffn % granularity:
            raise UserError(
                f"--granularity {granularity} does not divide the {dense.ffn} intermediate "
                "channels: give a divisor"
            )
        if not 0 <= self.shared_slices <= granularity:
            raise UserError(
                f"--shared-slices {self.shared_slices} must be from 0 to --granularity "
                f"{granularity}"
            )
        if n < 1 or n % slices:
            raise UserError(
                f"--num-experts {n} must be a multiple of the {slices} slices that are routed"
            )
        if not 0 < self.mean <= n:
            raise UserError(f"--mean-experts {self.mean:g} must be above 0 and at most {n}")
        if self.router_std <= 0 or self.noise < 0:
            raise UserError("--router-std must be above 0 and --noise not negative")
        if not any(self.moe_layers) or len(self.moe_layers) != dense.layers:
            raise UserError(
                f"--moe-layer-freq names {sum(self.moe_layers)} of {len(self.moe_layers)} layers, "
                f"and the model has {dense.layers}: give one number a layer"
            )
        whole = float(self.mean).is_integer()
        return replace(
            dense,
            router="expert-threshold",
            moe_layers=self.moe_layers,
            experts=n,
            moe_ffn=dense.ffn // granularity,
            shared_ffn=self.shared_slices * (dense.ffn // granularity),
            topk=int(self.mean) if whole else max(1, round(self.mean)),
            mean_experts=None if whole else self.mean,
            gate=self.gate,
            ema_decay=self.ema_decay,
        )


def upcycled(dense: Source, plan: Upcycling) -> Source:
    """The Expert Threshold model made of a dense one; its thresholds have no value yet.

    Raises:
        UserError: it cannot be made like this, naming the flag.
    """
    model = plan.architecture(dense.model)
    tensors = _UpcycledTensors(dense.tensors, dense.place, model, plan)
    return Source(dense.place, model, OWN, tensors, dense.carry_tokenizer)


class _UpcycledTensors:
    """Made of the dense tensors when they are read."""

    def __init__(self, dense: Tensors, place: Path, model: Architecture, plan: Upcycling) -> None:
        self._dense, self._plan, self._model = dense, plan, model
        self._read = lru_cache(maxsize=2)(dense.read)  # experts take turns at the same matrices
        links = OWN.links(model)
        self.shapes = {name: shape for link in links for name, shape in link.parts}
        weights = dense.dtypes["model.embed_tokens.weight"]
        special = {AVERAGE: torch.float32, UPDATES: torch.int64}
        self.dtypes = {
            name: next((dtype for end, dtype in special.items() if name.endswith(end)), weights)
            for name in self.shapes
        }

    def read(self, name: str) -> Tensor:
        if match := _MLP.fullmatch(name):
            return self._slices(name, match)
        if match := _ROUTER.fullmatch(name):
            return self._router(name, match["layer"])
        if name.endswith((AVERAGE, UPDATES)):
            return torch.zeros(self.shapes[name], dtype=self.dtypes[name])
        return self._dense.read(name)

    def _slices(self, name: str, match: re.Match[str]) -> Tensor:
        """An expert's matrix, or the shared expert's."""
        plan, down = self._plan, match["matrix"] == "down_proj"
        whole = self._read(f"{match['mlp']}{match['matrix']}.weight")
        width = whole.shape[down] // plan.granularity  # channels are columns of the down-projection
        if match["shared"]:
            return whole.narrow(int(down), 0, plan.shared_slices * width)
        first = 0 if plan.all_shared else plan.shared_slices
        number = first + int(match["expert"]) % plan.routed_slices
        part = whole.narrow(int(down), number * width, width)
        if not plan.noise and not down:
            return part
        exact = part.float()
        if down:
            exact = exact * plan.scale
        if plan.noise:
            exact = exact + self._normal(name, exact.shape) * plan.noise * exact.std()
        return exact.to(part.dtype)

    def _router(self, name: str, layer: str) -> Tensor:
        """Rows whose logits have the wanted spread, `[experts, hidden]`."""
        plan, model = self._plan, self._model
        groups = plan.experts // plan.routed_slices // plan.group
        rows = self._normal(name, torch.Size((plan.experts, model.hidden)))
        # Expert i is copy i // S of slice i % S.
        rows = rows.view(groups, plan.group, plan.routed_slices, model.hidden)
        if plan.group > 1:
            rows = rows - rows.mean(dim=1, keepdim=True)
            rows[:, -1] = -rows[:, :-1].sum(dim=1)  # to the bit where there are two
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
