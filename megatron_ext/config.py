"""Configuration of Expert Threshold models: Megatron's fields and those that it lacks."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from megatron.core.transformer import TransformerConfig

from megatron_ext.errors import UserError
from megatron_ext.layer_sizes import check_linear_attention, check_mamba
from megatron_ext.moe.registry import ROUTERS, RouterType, router_type, routers_help
from megatron_ext.moe.thresholds import RoutingRate


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


@dataclass
class ETConfig(TransformerConfig):
    """Expert Threshold options (arXiv 2603.11535), on top of Megatron's TransformerConfig.

    Every field is a command-line flag of the same name, and its docstring is the help text.
    """

    router_type: str = field(
        default="expert-threshold",
        metadata={"argparse_meta": {"choices": ROUTERS, "help": routers_help()}},
    )
    """Name of the router in `megatron_ext.moe.registry.ROUTERS`."""

    et_mean_experts: float | None = None
    """Mean number of routed experts per token; may be fractional. Default: --moe-router-topk."""

    et_threshold_estimator: Literal["ema", "adaptive"] = "ema"
    """Estimate of an expert's next cutoff that is its threshold. ema: a moving average of the
    cutoffs so far (the paper). adaptive: Kalman filters, which follow cutoffs that move and average
    cutoffs that do not, without a decay. Default: ema."""

    et_ema_decay: float = 0.999
    """Decay of the moving average that turns an expert's cutoffs into its threshold, in [0, 1).
    Default: 0.999."""

    et_warmup_iters: int = 4000
    """Number of optimizer steps that route by expert choice before thresholds take over.
    Default: 4000."""

    et_capacity: float | None = field(
        default=0.5, metadata={"argparse_meta": {"type": _number_or_none}}
    )
    """Capacity C in [0, 1), or 'none' for no limit: in training an expert takes between (1 - C) and
    (1 + C) times its mean share of the pool's tokens. Evaluation has no limit. Default: 0.5."""

    et_capacity_pool: Literal["rank", "global"] = "rank"
    """Tokens that the capacity counts. rank: those of each rank, without communication. global:
    those of all ranks, with a few small reductions in each layer's forward pass. Default: rank."""

    et_cutoff_pool: Literal["microbatch", "step"] = "microbatch"
    """Tokens that a cutoff is taken over: each micro-batch of all ranks, then averaged (the paper),
    or all tokens of the optimizer step. Default: microbatch."""

    et_logit_buffer_mb: float = 256.0
    """Size, in MiB per rank, of the buffer of router logits that wait for the search for cutoffs at
    the end of the step. Once it is full, the cutoffs of micro-batches are computed earlier, by a
    few small reductions in the forward pass, and are the same. A layer stores at least one
    micro-batch. Default: 256."""

    et_gate: Literal["sigmoid", "softmax", "relu"] = "sigmoid"
    """Function from a router logit to the weight of an expert's output. The weights are not
    normalized over the selected experts. Default: sigmoid."""

    et_norm_scale: bool = False
    """Give every RMSNorm a learnable scale."""

    et_embedding_norm: bool = True
    """Do not normalize the token embeddings before the first layer."""

    et_logit_softcap: float = 15.0
    """Bound c of the output logits, which become c * tanh(logits / c); 0 turns it off.
    Default: 15."""

    et_init: Literal["paper", "normal"] = "paper"
    """Initial weights. paper: embeddings N(0, 1), output head and projections into the residual
    stream 0, router N(0, 1/d), others scaled by fan-in and fan-out. normal:
    N(0, --init-method-std), residual projections divided by sqrt(2 * layers). Both depend only on
    the seed and the parameter, not on the parallel layout. Default: paper."""

    mamba_layers: list[int] = field(default_factory=list)
    """Layers that are Mamba-2 layers in place of attention: a 0 or a 1 for each layer.
    --hybrid-layer-pattern sets it. Default: none."""

    def __post_init__(self) -> None:
        if self.experimental_attention_variant is not None:
            check_linear_attention(self)
        if self.mamba_layers:
            check_mamba(self, linear_attention_pattern(self))
        if self.num_moe_experts is None:
            # Unused; Megatron refuses others with --moe-router-topk 1.
            self.moe_router_score_function = "sigmoid"
        else:
            if self.uses_thresholds:
                self._check_thresholds()
            self._check_router()
            for name, value in self.router.settings.items():
                setattr(self, name, value)
        super().__post_init__()

    @property
    def router(self) -> RouterType:
        """Description of the router that the MoE layers use."""
        return router_type(self.router_type)

    @property
    def uses_thresholds(self) -> bool:
        """Whether the MoE layers have one threshold per expert."""
        return self.num_moe_experts is not None and self.router.uses_thresholds

    @property
    def mean_experts(self) -> Fraction:
        """Mean number of routed experts per token, exactly as the user wrote it."""
        mean = self.moe_router_topk if self.et_mean_experts is None else self.et_mean_experts
        return Fraction(str(mean))

    @property
    def routing_rate(self) -> RoutingRate:
        """Share of a pool's tokens that an expert takes."""
        assert self.num_moe_experts is not None
        capacity = None if self.et_capacity is None else Fraction(str(self.et_capacity))
        return RoutingRate(self.mean_experts / self.num_moe_experts, capacity)

    @property
    def logit_buffer_bytes(self) -> int:
        """Part of `et_logit_buffer_mb` for each MoE layer of a pipeline stage, in bytes."""
        pattern = moe_layer_pattern(self)
        layers = -(-sum(pattern) // self.pipeline_model_parallel_size)
        layers += pattern[-1] * (self.mtp_num_layers or 0)  # on the last stage
        return int(self.et_logit_buffer_mb * 2**20) // max(layers, 1)

    def _check_thresholds(self) -> None:
        """Refuse values with which thresholds cannot work, naming the flag and the fix."""
        mean, experts = self.mean_experts, self.num_moe_experts
        flag = "--moe-router-topk" if self.et_mean_experts is None else "--et-mean-experts"
        if not 0 < mean <= experts:
            raise UserError(
                f"{flag} {float(mean):g} must be above 0 and at most --num-experts {experts}: it "
                "is the mean number of experts per token. Choose another value."
            )
        if not 0 <= self.et_ema_decay < 1:
            raise UserError(
                f"--et-ema-decay {self.et_ema_decay} must be in [0, 1). Choose another value."
            )
        if self.et_capacity is not None and not 0 <= self.et_capacity < 1:
            raise UserError(
                f"--et-capacity {self.et_capacity} must be in [0, 1). Use none for no limit."
            )
        if self.et_warmup_iters < 0:
            raise UserError(
                f"--et-warmup-iters {self.et_warmup_iters} must not be negative. Use 0 for no "
                "warm-up."
            )
        if self.et_logit_softcap < 0:
            raise UserError(
                f"--et-logit-softcap {self.et_logit_softcap} must not be negative. Use 0 for no "
                "bound."
            )
        if self.et_logit_buffer_mb < 0:
            raise UserError(
                f"--et-logit-buffer-mb {self.et_logit_buffer_mb} must not be negative. Use 0 to "
                "store as little as possible."
            )

    def _check_router(self) -> None:
        """Refuse settings of Megatron with which the router cannot work, with the reason."""
        for name, why in self.router.refusals().items():
            if getattr(self, name, None):
                raise UserError(
                    f"--{name.replace('_', '-')} cannot be used with --router-type "
                    f"{self.router_type}: {why}. Leave it out, or choose another router."
                )
        if not self.router.variable_fan_out:
            return
        if self.moe_token_dispatcher_type == "flex":
            raise UserError(
                "--moe-token-dispatcher-type flex takes a fixed number of experts per token, which "
                f"--router-type {self.router_type} does not have. Use alltoall or allgather."
            )
        if self.cuda_graph_impl != "none":
            captured = {module.name for module in self.cuda_graph_modules}
            if not captured or not captured <= {"attn", "mlp"}:  # none named: whole layers
                raise UserError(
                    f"--cuda-graph-impl {self.cuda_graph_impl} would capture the experts, which "
                    f"take a varying number of tokens with --router-type {self.router_type}. Add "
                    "--cuda-graph-modules attn, and mlp for dense layers."
                )


def moe_layer_pattern(config: ETConfig) -> list[bool]:
    """Return which layers have experts, by `--moe-layer-freq`: every n-th, or a list of 0 and 1."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [i % config.moe_layer_freq == 0 for i in range(config.num_layers)]
    return [bool(flag) for flag in config.moe_layer_freq]


def linear_attention_pattern(config: ETConfig) -> list[bool]:
    """Return which layers are Gated DeltaNet layers, the others having attention.

    `--linear-attention-freq` n makes every n-th layer one with attention; a list has 1 for Gated
    DeltaNet layers.
    """
    frequency = config.linear_attention_freq
    if config.experimental_attention_variant is None or frequency is None:
        return [False] * config.num_layers
    if isinstance(frequency, int):
        return [(i + 1) % frequency != 0 for i in range(config.num_layers)]
    return [bool(flag) for flag in frequency]


def mamba_pattern(config: ETConfig) -> list[bool]:
    """Return which layers are Mamba layers, by `--mamba-layers`."""
    return [bool(flag) for flag in config.mamba_layers or [0] * config.num_layers]


def is_hybrid(config: ETConfig) -> bool:
    """Return whether some layers are Gated DeltaNet or Mamba layers."""
    return any(linear_attention_pattern(config)) or any(mamba_pattern(config))
