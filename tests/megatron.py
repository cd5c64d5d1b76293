"""A tiny model on real ranks, for tests that need Megatron's modules but not its training loop."""

from argparse import Namespace
from typing import Any

TINY = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--max-position-embeddings", "32"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--split", "90,5,5"),
    *("--train-iters", "6", "--lr", "1e-2", "--min-lr", "1e-3", "--lr-decay-style", "linear"),
    *("--eval-iters", "1", "--eval-interval", "1000", "--log-interval", "1", "--num-workers", "0"),
    *("--num-experts", "4", "--moe-router-topk", "1", "--moe-layer-freq", "[0,1]"),
    *("--moe-ffn-hidden-size", "48", "--ffn-hidden-size", "96"),
    *("--moe-shared-expert-intermediate-size", "48"),
    *("--squared-relu", "--no-bias-gelu-fusion", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--qk-layernorm"),
    *("--hidden-dropout", "0", "--attention-dropout", "0"),
    *("--et-warmup-iters", "2", "--et-ema-decay", "0.5", "--et-init", "normal"),
    *("--moe-token-dispatcher-type", "alltoall"),
]
"""A decoder with one dense and one MoE layer; weights of both kinds of projections are not 0."""


DELTA_NET = (
    *("--linear-num-key-heads", "4", "--linear-num-value-heads", "8", "--linear-key-head-dim", "6"),
    *("--linear-value-head-dim", "5", "--linear-conv-kernel-dim", "3"),
)
"""Sizes of Gated DeltaNet layers that 4 ranks can share; all of them differ."""


MAMBA = (
    *("--mamba-state-dim", "6", "--mamba-head-dim", "5", "--mamba-num-heads", "8"),
    *("--mamba-num-groups", "2"),
)
"""Sizes of Mamba layers that 4 ranks can share; all of them differ."""


def start(*flags: str) -> tuple[Namespace, Any, list[Any]]:
    """Parse the flags, start Megatron on this rank and build the model, in training mode.

    Call it inside `run_ranks`, once a process: Megatron's state is global.
    """
    from megatron_ext.devices import activate

    activate()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    from megatron_ext.arguments import parse_args
    from megatron_ext.model.language_model import language_model_config

    args, config = parse_args([*TINY, *flags])
    initialize_megatron()
    model_config = language_model_config(args, config)
    builder = model_config.get_builder_cls()(model_config)
    model = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    return args, config, model
