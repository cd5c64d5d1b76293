"""The routed experts of one layer in vLLM, as one operation to torch.compile."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from megatron_ext.vllm.experts import Product, buffer_rows, grouped_experts, loop_over_experts

logger = init_logger("vllm.megatron_ext")


class PackedProducts(QuantizeMethodBase):
    """Preparation of experts for CPUs, which vLLM calls whenever weights were loaded."""

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """Do nothing: the layer has its weights."""

    def apply(self, layer: nn.Module, *inputs: Any, **_: Any) -> Tensor:
        """Return the output of the layer."""
        return layer(*inputs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weights as vLLM packs those of its linear layers, and free them."""
        assert isinstance(layer, StackedExperts)
        weights = dict(layer.named_parameters())
        layer.products = {name: [_pack(w) for w in stack.data] for name, stack in weights.items()}
        for name, parameter in weights.items():
            empty = nn.Parameter(parameter.new_empty(0), requires_grad=False)
            layer.register_parameter(name, empty)


def _pack(weight: Tensor) -> Product:
    """Return the product with a weight `[outputs, inputs]`, by vLLM's kernel for linear layers."""
    linear: Any = nn.Module()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    return lambda x: linear.cpu_linear(x, linear.weight, None)


class StackedExperts(nn.Module):
    """First and second projections of all local experts of a layer."""

    def __init__(
        self, experts: int, inner: int, hidden: int, gated: bool, max_fan_out: int
    ) -> None:
        """Make the parameters.

        Args:
            experts: Number of local experts.
            inner: Inner size of an expert, or this rank's part of it.
            hidden: Hidden size.
            gated: Whether the experts are SwiGLU and not squared ReLU.
            max_fan_out: Cap on fan-out; see :func:`buffer_rows`.
        """
        super().__init__()
        up = torch.empty(experts, inner * (1 + gated), hidden)
        self.up = nn.Parameter(up, requires_grad=False)
        self.down = nn.Parameter(torch.empty(experts, hidden, inner), requires_grad=False)
        self.gated, self.max_fan_out = gated, max_fan_out
        self.products: dict[str, list[Product]] = {}
        if current_platform.is_cpu():
            self.quant_method = PackedProducts()

    def forward(self, tokens: Tensor, weights: Tensor, routing_map: Tensor) -> Tensor:
        """Return the sum over the chosen experts; see :func:`grouped_experts`."""
        count, experts = routing_map.shape
        # Runs that measure memory use made-up tokens, which may be routed to any number of experts.
        measured = get_forward_context().attn_metadata is None
        rows = buffer_rows(count, experts, experts if measured else self.max_fan_out)
        if tokens.device.type != "cpu":
            return grouped_experts(
                tokens, weights, routing_map, self.up, self.down, self.gated, rows
            )
        if rows < count * experts and int(routing_map.sum()) > rows:
            logger.warning_once(
                "A batch was routed to more experts than max_fan_out in config.json, %d, allows. "
                "A server on a GPU would end with an error: raise max_fan_out.",
                self.max_fan_out,
            )
        up, down = self.products["up"], self.products["down"]
        return loop_over_experts(tokens, weights, routing_map, up, down, self.gated)


def _experts(tokens: Tensor, weights: Tensor, routing_map: Tensor, layer_name: str) -> Tensor:
    """Return the sum over experts; one operation to torch.compile, which sees no shapes in it."""
    layer: StackedExperts = get_forward_context().no_compile_layers[layer_name]
    return layer(tokens, weights, routing_map)


def _like_tokens(tokens: Tensor, weights: Tensor, routing_map: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(tokens)


_library = torch.library.Library("megatron_et", "FRAGMENT")
direct_register_custom_op("experts", _experts, fake_impl=_like_tokens, target_lib=_library)
