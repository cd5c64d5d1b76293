"""Maps between the tensors of a Megatron checkpoint and those of a Hugging Face folder.

A rule names one tensor of Megatron and the Hugging Face tensors that contain the same numbers.
`{l}` is replaced by the number of a layer and `{e}` by the number of an expert. In Megatron's
checkpoint the experts of a layer are one tensor, whose first dimension is the expert.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.hf.architecture import Architecture


class TensorLayout(Enum):
    """Arrangement of Hugging Face tensors in a tensor of Megatron."""

    SAME = auto()  # one tensor, unchanged
    ROWS = auto()  # concatenated along the first dimension
    QKV = auto()  # for each KV head its queries, its key and its value
    VOCABULARY = auto()  # one tensor, padded by rows of zeros


@dataclass(frozen=True)
class HFTensor:
    """Tensor of a Hugging Face folder: its name, and its shape as names of dimensions."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class NameRule:
    """Correspondence of one tensor of Megatron, per model or per layer, to Hugging Face tensors.

    Attributes:
        key: Name in Megatron.
        parts: The Hugging Face tensors.
        layout: Arrangement of the parts in Megatron's tensor.
        where: Layers that have the tensor, or "model".
        when: Property of the architecture that is required for the tensor to exist.
    """

    key: str
    parts: tuple[HFTensor, ...]
    layout: TensorLayout = TensorLayout.SAME
    where: Literal["model", "layer", "attention", "delta", "dense", "moe", "expert"] = "model"
    when: str | None = None


@dataclass(frozen=True)
class TensorLink:
    """Rule for one layer and expert, with shapes.

    Attributes:
        key: Name in Megatron.
        expert: Index along the first dimension of Megatron's tensor, or None.
        parts: Names and shapes of the Hugging Face tensors.
        layout: Arrangement of the parts in Megatron's tensor.
    """

    key: str
    expert: int | None
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    layout: TensorLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of Megatron's tensor, or of this expert's part of it, without padding."""
        first = self.parts[0][1]
        if len(self.parts) == 1:
            return first
        return (sum(shape[0] for _, shape in self.parts), *first[1:])


def expand(rules: tuple[NameRule, ...], model: Architecture) -> list[TensorLink]:
    """Return every tensor of a model, in the order of its layers."""
    links = [link for rule in rules if rule.where == "model" for link in _links(rule, model)]
    per_layer = [rule for rule in rules if rule.where != "model"]
    for layer in range(model.layers):
        moe = model.router is not None and model.moe_layers[layer]
        mixer = "delta" if model.hybrid and model.delta_layers[layer] else "attention"
        kinds = {"layer", mixer, *(("moe", "expert") if moe else ("dense",))}
        for rule in per_layer:
            if rule.where in kinds:
                links += _links(rule, model, layer)
    return links


def _links(rule: NameRule, model: Architecture, layer: int | None = None) -> list[TensorLink]:
    if rule.when is not None and not getattr(model, rule.when):
        return []
    dims = model.dims
    experts = range(model.experts) if rule.where == "expert" else [None]

    def named(text: str, expert: int | None) -> str:
        return text.replace("{l}", str(layer)).replace("{e}", str(expert))

    return [
        TensorLink(
            named(rule.key, expert),
            expert,
            tuple((named(p.name, expert), tuple(dims[d] for d in p.shape)) for p in rule.parts),
            rule.layout,
        )
        for expert in experts
    ]


def join(
    link: TensorLink, parts: list[Tensor], model: Architecture, rows: int | None = None
) -> Tensor:
    """Return Megatron's tensor, assembled from Hugging Face tensors.

    Args:
        link: The correspondence.
        parts: The tensors, in the order and of the shapes of the link.
        model: Architecture, for the number of heads.
        rows: Rows of the vocabulary with its padding of zeros.
    """
    if link.layout is TensorLayout.SAME:
        return parts[0]
    if link.layout is TensorLayout.VOCABULARY:
        assert rows is not None
        padded = parts[0].new_zeros(rows, *parts[0].shape[1:])
        padded[: parts[0].shape[0]] = parts[0]
        return padded
    full = parts[0].new_empty(link.shape)
    for view, part in zip(_views(link, full, model), parts):
        view.copy_(part.view(view.shape))
    return full


def split(link: TensorLink, full: Tensor, model: Architecture) -> list[Tensor]:
    """Return the Hugging Face tensors that make up a tensor of Megatron, as views if possible."""
    views = _views(link, full, model)
    return [view.reshape(shape) for view, (_, shape) in zip(views, link.parts)]


def _views(link: TensorLink, full: Tensor, model: Architecture) -> list[Tensor]:
    if link.layout is TensorLayout.SAME:
        return [full]
    if link.layout is TensorLayout.VOCABULARY:
        return [full[: link.shape[0]]]
    if link.layout is TensorLayout.ROWS:
        return list(torch.split(full, [shape[0] for _, shape in link.parts]))
    queries = model.heads // model.kv_heads
    grouped = full.view(model.kv_heads, queries + 2, model.head_dim, *full.shape[1:])
    return [grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]]


_LAYER, _HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."


def _attention() -> tuple[NameRule, ...]:
    megatron, hf = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
    sizes = {"q": "q", "k": "kv", "v": "kv"}
    weights = tuple(HFTensor(f"{hf}{x}_proj.weight", (size, "hidden")) for x, size in sizes.items())
    biases = tuple(HFTensor(f"{hf}{x}_proj.bias", (size,)) for x, size in sizes.items())
    output = HFTensor(f"{hf}o_proj.weight", ("hidden", "q"))
    return (
        NameRule(megatron + "linear_qkv.weight", weights, TensorLayout.QKV, "attention"),
        NameRule(megatron + "linear_qkv.bias", biases, TensorLayout.QKV, "attention", "qkv_bias"),
        NameRule(megatron + "linear_proj.weight", (output,), where="attention"),
        *(
            NameRule(
                f"{megatron}{x}_layernorm.weight",
                (HFTensor(f"{hf}{x}_norm.weight", ("head_dim",)),),
                where="attention",
                when="qk_norm_scale",
            )
            for x in "qk"
        ),
    )


def _delta_net() -> tuple[NameRule, ...]:
    """Return the rules of a Gated DeltaNet layer, whose fused matrices Megatron saves in parts."""
    megatron, hf = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
    keys, values, heads = "delta_keys", "delta_values", "delta_value_heads"
    parts = {"query": ("q", keys), "key": ("k", keys), "value": ("v", values)}
    gates = {"z": ("z", values), "beta": ("b", heads), "alpha": ("a", heads)}
    tensors = {
        f"in_proj.weight.{part}": HFTensor(f"{hf}{name}_proj.weight", (size, "hidden"))
        for part, (name, size) in (parts | gates).items()
    }
    tensors |= {
        f"conv1d.weight.{part}": HFTensor(f"{hf}{name}_conv.weight", (size, "one", "delta_kernel"))
        for part, (name, size) in parts.items()
    }
    tensors |= {name: HFTensor(hf + name, (heads,)) for name in ("A_log", "dt_bias")}
    tensors["out_proj.weight"] = HFTensor(hf + "o_proj.weight", ("hidden", values))
    norm = HFTensor(hf + "norm.weight", ("delta_value_dim",))
    return (
        *(NameRule(megatron + key, (tensor,), where="delta") for key, tensor in tensors.items()),
        NameRule(megatron + "out_norm.weight", (norm,), where="delta", when="norm_scale"),
    )


def _norm(key: str, name: str, where: Literal["model", "layer"]) -> NameRule:
    return NameRule(key, (HFTensor(name, ("hidden",)),), where=where, when="norm_scale")


def _mlp(
    key: str,
    hf: str,
    size: str,
    where: Literal["dense", "moe", "expert"],
    when: str | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    gated: bool = True,
) -> tuple[NameRule, NameRule]:
    """Return the rules of a feed-forward block; its first matrix contains two when it is gated."""
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    inner = [HFTensor(name, (size, "hidden")) for name in ((gate, up) if gated else (up,))]
    layout = TensorLayout.ROWS if gated else TensorLayout.SAME
    return (
        NameRule(key + "linear_fc1.weight", tuple(inner), layout, where, when),
        NameRule(
            key + "linear_fc2.weight",
            (HFTensor(down, ("hidden", size)),),
            TensorLayout.SAME,
            where,
            when,
        ),
    )


def _experts(hf: str, names: tuple[str, str, str], gated: bool = True) -> tuple[NameRule, ...]:
    key = _LAYER + "mlp.experts.experts."
    return _mlp(key, hf + "experts.{e}.", "moe_ffn", "expert", names=names, gated=gated)


def _router(hf: str) -> NameRule:
    gate = HFTensor(hf + "gate.weight", ("experts", "hidden"))
    return NameRule(_LAYER + "mlp.router.weight", (gate,), where="moe")


_ENDS = (
    NameRule(
        "embedding.word_embeddings.weight",
        (HFTensor("model.embed_tokens.weight", ("vocab", "hidden")),),
        TensorLayout.VOCABULARY,
    ),
    _norm("decoder.final_layernorm.weight", "model.norm.weight", "model"),
    NameRule(
        "output_layer.weight",
        (HFTensor("lm_head.weight", ("vocab", "hidden")),),
        TensorLayout.VOCABULARY,
        when="untied",
    ),
)
_BLOCK = (
    _norm(_LAYER + "input_layernorm.weight", _HF_LAYER + "input_layernorm.weight", "layer"),
    *_attention(),
    _norm(
        _LAYER + "pre_mlp_layernorm.weight", _HF_LAYER + "post_attention_layernorm.weight", "layer"
    ),
)
_MLP, _HF_MLP = _LAYER + "mlp.", _HF_LAYER + "mlp."
_USUAL = ("gate_proj", "up_proj", "down_proj")

DENSE = (*_ENDS, *_BLOCK, *_mlp(_MLP, _HF_MLP, "ffn", "dense"))
QWEN3_MOE = (*DENSE, _router(_HF_MLP), *_experts(_HF_MLP, _USUAL))
_MIXTRAL_BLOCK = _HF_LAYER + "block_sparse_moe."
MIXTRAL = (*_ENDS, *_BLOCK, _router(_MIXTRAL_BLOCK), *_experts(_MIXTRAL_BLOCK, ("w1", "w3", "w2")))


def expert_threshold(gated: bool) -> tuple[NameRule, ...]:
    """Return the map of this project's family, which adds thresholds and a shared expert."""
    thresholds = {"average": ("experts",), "updates": ()}
    return (
        *_ENDS,
        *_BLOCK,
        *_delta_net(),
        *_mlp(_MLP, _HF_MLP, "ffn", "dense", gated=gated),
        _router(_HF_MLP),
        *(
            NameRule(
                f"{_MLP}router.thresholds.{name}",
                (HFTensor(f"{_HF_MLP}gate.threshold_{name}", shape),),
                where="moe",
                when="thresholds",
            )
            for name, shape in thresholds.items()
        ),
        *_mlp(
            _MLP + "shared_experts.",
            _HF_MLP + "shared_expert.",
            "shared_ffn",
            "moe",
            "shared",
            gated=gated,
        ),
        *_experts(_HF_MLP, _USUAL, gated),
    )
