"""Root mean square normalization that works under sequence parallelism on every device."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_ext.config import ETConfig


class RMSNorm(torch.nn.Module):
    """`x / rms(x)` over the last dimension, with a learnable scale if the configuration has one.

    Megatron's local norm refuses sequence parallelism; this one marks its scale, so that its
    gradient is summed over the tensor-parallel ranks, which have different tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        # The layer behind the norm has weights of this type, also if the residual stream is fp32.
        self.dtype = config.params_dtype if config.fp32_residual_connection else None
        self.weight: torch.nn.Parameter | None = None
        if isinstance(config, ETConfig) and config.et_norm_scale:
            self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
            self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x [..., hidden_size]` in its dtype."""
        weight = self.weight if self.weight is None else self.weight.to(x.dtype)
        y = F.rms_norm(x, self.shape, weight, self.eps)
        return y if self.dtype is None else y.to(self.dtype)
