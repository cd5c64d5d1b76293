"""Loading of a trained model for inference, with any layout of ranks.

Call `activate` of `megatron_ext.devices` before importing this module.
"""

import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments

from megatron_ext.arguments import explained
from megatron_ext.checkpoint import damage, read_common_state, readable
from megatron_ext.config import ETConfig
from megatron_ext.data.run_tokenizer import locate_tokenizer
from megatron_ext.data.tokenizer_identity import check_tokenizer_content
from megatron_ext.devices import device_default_args, is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import record_end_tokens
from megatron_ext.inference.plain_linear import simplify_linear_layers
from megatron_ext.model.language_model import language_model_config
from megatron_ext.model_location import locate_model
from megatron_ext.moe.thresholds import FILTER
from megatron_ext.quiet import quiet_libraries

# Temporary folders with tokenizers of Hugging Face folders, which exist until the process ends.
_TOKENIZERS: list[tempfile.TemporaryDirectory[str]] = []

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel sizes of a model; the remaining ranks have data-parallel replicas of it.

    Attributes:
        tensor: Tensor parallel size.
        pipeline: Pipeline parallel size.
        expert: Expert parallel size.
        expert_tensor: Tensor parallel size within an expert. Default: `tensor`.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None


@dataclass(frozen=True)
class TrainedModel:
    """Model in evaluation mode with its tokenizer and settings.

    Attributes:
        module: This rank's pipeline stage, in Megatron's wrapper if it is not fp32.
        tokenizer: Tokenizer of Megatron, with `tokenize`, `detokenize`, `eod` and `vocab_size`.
        args: Arguments of the training run, adapted to this layout and device.
        checkpoint: Folder of the iteration that was loaded.
        iteration: Number of optimizer steps of the training.
    """

    module: torch.nn.Module
    tokenizer: Any
    args: Namespace
    checkpoint: Path
    iteration: int

    @property
    def model(self) -> HybridModel:
        """Pipeline stage without its wrapper."""
        return unwrap_model(self.module)

    @property
    def groups(self) -> ProcessGroupCollection:
        """Process groups of the model."""
        return self.model.pg_collection

    @property
    def max_length(self) -> int:
        """Context length: maximum length of prompt and continuation, in tokens."""
        return self.args.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer; the model may have more, as padding."""
        return self.tokenizer.vocab_size


def load_model(
    path: str | os.PathLike[str],
    layout: ParallelLayout | None = None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_model: str | None = None,
    with_thresholds: Callable[[Namespace], None] | None = None,
) -> TrainedModel:
    """Load weights, thresholds and tokenizer. Every rank that torchrun started must call it.

    Args:
        path: Run directory, folder of checkpoints, folder of one iteration, or Hugging Face folder;
            see `megatron_ext.model_location.locate_model`.
        layout: Parallel sizes, which may differ from those of training. Default: one rank.
        dtype: Data type of the weights. Default: that of training on a GPU, fp32 on a CPU.
        tokenizer_model: File or folder of the tokenizer. Default: the one that training used.
        with_thresholds: Function that changes the run's arguments to those of a model with
            thresholds. The thresholds then have no value.

    Raises:
        UserError: There is no checkpoint, it is incomplete or from another project, the tokenizer
            differs from that of training, or the layout does not fit the ranks or the model.
    """
    location = locate_model(path)
    checkpoint = location.folder
    source = state = None
    if location.kind == "hf":
        source, args = _open_hf(checkpoint)
    else:
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if problem := damage(checkpoint, rank, ranks):
            raise UserError(f"{checkpoint} is incomplete or damaged: {problem}")
        state = read_common_state(checkpoint)
        args = state["args"]
    if with_thresholds is not None:
        with_thresholds(args)
    for_inference(args, layout or ParallelLayout(), dtype)
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
        check_tokenizer_content(checkpoint, args)
    else:
        locate_tokenizer(args, checkpoint)
    tokenizer = _build_tokenizer(args)
    place = args.tokenizer_model
    if args.tokenizer_type == "NullTokenizer":
        place = checkpoint if source is not None else checkpoint.parent
    record_end_tokens(tokenizer, place)
    config: ETConfig = explained(lambda: core_transformer_config_from_args(args, ETConfig))
    explained(lambda: _start_ranks(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_config = language_model_config(args, config)
    builder = model_config.get_builder_cls()(model_config)
    [module] = explained(
        lambda: builder.build_distributed_models(
            groups, wrap_with_ddp=False, data_parallel_random_init=False
        )
    )
    module.eval().requires_grad_(False)
    if source is not None:
        from megatron_ext.hf.live import LiveTensors

        tensors = LiveTensors([unwrap_model(module)], source.model, source.family)
        tensors.load((name, source.tensors.read(name)) for name in tensors.needed)
    else:
        assert state is not None
        _load_weights(module, checkpoint, state, with_thresholds is None)
    simplify_linear_layers(module)
    return TrainedModel(module, tokenizer, args, checkpoint, state["iteration"] if state else 0)


def _open_hf(folder: Path) -> tuple[Any, Namespace]:
    """Return the source of a Hugging Face folder and the arguments of a run of its model."""
    from megatron_ext.hf.release import release_arguments
    from megatron_ext.hf.sources import open_hf

    source = open_hf(folder)
    # Megatron reads tokenizers from files, which exist until the process ends.
    place = tempfile.TemporaryDirectory(prefix="megatron-et-tokenizer-")
    _TOKENIZERS.append(place)
    tokenizer = source.carry_tokenizer(Path(place.name))
    return source, release_arguments(source.model, source.dtype, tokenizer, Path(place.name))


def _load_weights(
    module: torch.nn.Module, checkpoint: Path, state: dict[str, Any], thresholds: bool
) -> None:
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=state)
    weights: dict[str, Any] = module.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
    weights = {name: part for name, part in weights.items() if not name.endswith(FILTER)}
    if not thresholds:
        weights = {name: part for name, part in weights.items() if ".thresholds." not in name}
    sharded = {"model": weights}
    loaded = readable(checkpoint, lambda: dist_checkpointing.load(sharded, str(checkpoint)))
    module.load_state_dict(loaded["model"], strict=thresholds)


def for_inference(args: Namespace, layout: ParallelLayout, dtype: torch.dtype | None) -> None:
    """Change the training run's arguments to those of inference on this layout and device.

    Args:
        args: Arguments of the training run, which are modified.
        layout: Parallel sizes.
        dtype: Data type of the weights; see `load_model`.
    """
    parser = add_megatron_arguments(ArgumentParser(add_help=False, allow_abbrev=False))
    needed = vars(parser.parse_args(device_default_args()))
    defaults = vars(parser.parse_args([]))
    vars(args).update({name: v for name, v in needed.items() if v != defaults[name]})
    if is_cpu_device():
        dtype = dtype or torch.float32
        args.moe_grouped_gemm = False
        args.bias_swiglu_fusion = False  # slower than separate operations
    dtype = dtype or args.params_dtype
    vocab = args.padded_vocab_size  # its rows are shared by the tensor-parallel ranks
    padded_vocab = vocab and -(-vocab // layout.tensor) * layout.tensor
    expert_tensor = layout.expert_tensor or layout.tensor
    vars(args).update(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        fp8=None,
        fp4=None,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=expert_tensor,
        # Megatron's validation derives these from the sizes above.
        tensor_parallel_num_weight_shards=layout.tensor,
        expert_tensor_parallel_num_weight_shards=expert_tensor,
        gtp_weight_remat_size=1,
        expert_gtp_weight_remat_size=1,
        padded_vocab_size=padded_vocab,
        context_parallel_size=1,
        mtp_num_layers=None,  # further tokens are predicted in training only
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        # A single new token per row cannot be divided along the sequence.
        sequence_parallel=False,
        tp_comm_overlap=False,
        # This dispatcher permits different numbers of tokens on different ranks.
        moe_token_dispatcher_type="alltoall",
        # A capacity would drop tokens depending on the other tokens of the batch.
        moe_expert_capacity_factor=None,
        moe_pad_expert_input_to_capacity=False,
        moe_shared_expert_overlap=False,
        overlap_moe_expert_parallel_comm=False,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        cuda_graph_impl="none",
        cpu_offloading_num_layers=0,
        fine_grained_activation_offloading=False,
    )


def _build_tokenizer(args: Namespace) -> Any:
    try:
        tokenizer = build_tokenizer(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(
            f"The tokenizer {args.tokenizer_model or args.tokenizer_type} cannot be loaded: "
            f"{error}. Give its file or folder with --tokenizer-model."
        ) from error
    if args.tokenizer_type == "HuggingFaceTokenizer":
        # Megatron reads the end token from this attribute, which it does not set from the files.
        inner = tokenizer._tokenizer
        inner.eos_token = inner.tokenizer.eos_token
    return tokenizer


def _start_ranks(args: Namespace) -> None:
    """Initialize torch.distributed and model parallelism unless they are initialized."""
    if not dist.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "gloo" if is_cpu_device() else "nccl"
        with quiet_libraries():
            if "WORLD_SIZE" in os.environ:
                dist.init_process_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    sizes = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size,
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size,
    }
    if not parallel_state.model_parallel_is_initialized():
        with quiet_libraries():
            parallel_state.initialize_model_parallel(
                **{name: getattr(args, name) for name in sizes}
            )
    for name, present in sizes.items():
        if present() != getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} does not match this process, "
                f"which was initialized with {present()}. Set it to {present()}."
            )
    model_parallel_cuda_manual_seed(args.seed)
