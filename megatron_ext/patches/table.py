"""Table of the patches of Megatron and torch.

This module imports neither of them, so that importing it is fast. `docs/reference/patches.md` has
the same table, which a test compares with this one.
"""

from dataclasses import dataclass
from typing import Literal

Group = Literal[
    "cpu device", "megatron", "gated delta net", "mamba", "multi-token prediction", "optimizer",
    "matrix gradients", "checkpoints", "trainer", "schedule", "fake rank", "dry run",
    "dry-run traffic", "micro-batches",
]  # fmt: skip

GROUPS: dict[Group, str] = {
    "cpu device": "Applied by `megatron_ext.devices.activate` on a machine without CUDA.",
    "megatron": "Applied by `megatron_ext.devices.activate` on every device.",
    "gated delta net": "Applied before a model with Gated DeltaNet layers is built.",
    "mamba": "Applied before a model with Mamba layers is built, where their kernels cannot run.",
    "multi-token prediction": "Applied before a model with depths of prediction is built.",
    "optimizer": "Applied before an optimizer is built: by training and by the dry run.",
    "matrix gradients": "Applied while a model is wrapped for Muon's distributed optimizer.",
    "checkpoints": "Applied before a checkpoint is loaded or saved by training.",
    "trainer": "Applied by `pretrain_et.py` before it starts Megatron's trainer.",
    "schedule": "Applied while Megatron builds the schedule of the learning rate.",
    "fake rank": "Applied while a dry run simulates one rank.",
    "dry run": "Applied while a dry run takes a step without data.",
    "dry-run traffic": "Applied while a dry run counts what ranks send.",
    "micro-batches": "Applied while a dry run takes a step of fewer micro-batches.",
}

_MEGATRON = "megatron-core 0.19.2"
_TORCH = "torch 2.9 to 2.14"
_NOT_REPORTED = "Not reported."
_NO_CPU = "Not a bug: Megatron supports CUDA only."
_UNTIL_CPU = "When Megatron's trainer runs on a device other than CUDA."
_DRY_RUN = "Not a bug: Megatron has no simulated step."
_UNTIL_DRY_RUN = "When Megatron can take a step on meta tensors."


@dataclass(frozen=True)
class Patch:
    """One change of Megatron or torch.

    Attributes:
        group: Name of the patches that are applied together.
        targets: Dotted paths of the replaced attributes, or of items of dictionaries.
        source: `module:function` that returns the replacements by target.
        reason: What fails, or is missing, without the patch.
        removable: When the patch can be removed.
        upstream: Issue or pull request about the problem.
        versions: Versions in which the problem was observed.
        in_submodules: Whether submodules that imported the target get the replacement too.
    """

    group: Group
    targets: tuple[str, ...]
    source: str
    reason: str
    removable: str
    upstream: str = _NOT_REPORTED
    versions: str = _MEGATRON
    in_submodules: bool = False


def _in(owner: str, names: str) -> tuple[str, ...]:
    """Return the dotted paths of several names, separated by spaces, in one owner."""
    return tuple(f"{owner}.{name}" for name in names.split())


FACTORIES = (
    "arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted "
    "empty_strided eye full full_like hamming_window hann_window kaiser_window linspace logspace "
    "normal ones ones_like rand rand_like randint randint_like randn randn_like randperm range "
    "scalar_tensor sparse_compressed_tensor sparse_coo_tensor tensor tril_indices triu_indices "
    "zeros zeros_like"
)
"""Functions of torch that create a tensor on a device, separated by spaces."""

METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"
"""Methods of tensors that create a tensor on a device, separated by spaces."""

_CPU_DEVICE = (
    Patch(
        group="cpu device",
        targets=("torch._dynamo.config.disable",),
        source="megatron_ext.devices.cpu:compiler_settings",
        reason="Compiling Megatron's fused functions takes minutes and a C++ compiler.",
        removable=_UNTIL_CPU,
        upstream=_NO_CPU,
        versions=_TORCH,
    ),
    Patch(
        group="cpu device",
        targets=(
            *_in(
                "torch.cuda",
                "is_available device_count current_device set_device device device_of "
                "get_device_name get_device_capability get_device_properties is_bf16_supported "
                "synchronize Stream ExternalStream Event stream current_stream default_stream "
                "set_stream is_current_stream_capturing memory_allocated memory_reserved "
                "max_memory_allocated max_memory_reserved reset_peak_memory_stats "
                "reset_max_memory_allocated memory_stats mem_get_info empty_cache ipc_collect "
                "BFloat16Tensor BoolTensor ByteTensor CharTensor DoubleTensor FloatTensor "
                "HalfTensor IntTensor LongTensor ShortTensor",
            ),
        ),
        source="megatron_ext.devices.runtime:replacements",
        reason="Megatron asks `torch.cuda` for its device, streams, events and memory.",
        removable=_UNTIL_CPU,
        upstream=_NO_CPU,
        versions=_TORCH,
        in_submodules=True,
    ),
    Patch(
        group="cpu device",
        targets=(
            *_in("torch.cuda", "_initialized _is_in_bad_fork"),
            *_in("torch.cuda.nvtx", "mark range range_end range_pop range_push range_start"),
            "torch.accelerator.is_available",
        ),
        source="megatron_ext.devices.runtime:states",
        reason="Seeding waits for CUDA to be initialized, and pinning memory needs real hardware.",
        removable=_UNTIL_CPU,
        upstream=_NO_CPU,
        versions=_TORCH,
    ),
    Patch(
        group="cpu device",
        targets=(
            "torch.cuda.default_generators",
            "torch.random.default_generator",
            "torch.default_generator",
            "torch.utils.checkpoint.get_device_states",
            "torch.utils.data.dataloader.DataLoader.__iter__",
            "torch.utils.data.dataloader._BaseDataLoaderIter.__next__",
        ),
        source="megatron_ext.devices.randomness:replacements",
        reason="Megatron keeps the random states of host and device apart; the CPU has only one.",
        removable=_UNTIL_CPU,
        upstream=_NO_CPU,
        versions=_TORCH,
    ),
    Patch(
        group="cpu device",
        targets=(
            *_in("torch.Tensor", f"{METHODS} to type cuda pin_memory record_stream"),
            *_in("torch", FACTORIES),
            "torch.utils._device.DeviceContext.__init__",
        ),
        source="megatron_ext.devices.placement:replacements",
        reason="Megatron places tensors on the device `cuda`.",
        removable=_UNTIL_CPU,
        upstream=_NO_CPU,
        versions=_TORCH,
    ),
    Patch(
        group="cpu device",
        targets=(
            "torch.distributed.all_gather",
            "torch.distributed.distributed_c10d.all_gather",
        ),
        source="megatron_ext.devices.gloo:all_gather_replacements",
        reason="Layer-wise optimizers gather tensors of unequal shapes, which gloo refuses.",
        removable="When gloo gathers tensors of unequal shapes.",
        upstream="Reported as pytorch/pytorch#156627 (open).",
        versions=_TORCH,
    ),
    Patch(
        group="cpu device",
        targets=(
            "torch.distributed.all_to_all_single",
            "torch.distributed.distributed_c10d.all_to_all_single",
        ),
        source="megatron_ext.devices.gloo:all_to_all_replacements",
        reason="Megatron's dispatcher passes split sizes as tensors that are not on a GPU.",
        removable="When Megatron's dispatcher turns split sizes on the CPU into lists.",
        versions=_TORCH,
    ),
)

_OPTIMIZER = "megatron.core.optimizer"
_EVERYWHERE = (
    Patch(
        group="megatron",
        targets=("megatron.core.datasets.utils.compile_helpers",),
        source="megatron_ext.devices.cpu:dataset_helpers",
        reason="The trainer runs `make` in the package; the wheel has the compiled helpers but no "
        "Makefile, and a failing `make` ends the process.",
        removable="When the wheel holds the Makefile, or the trainer uses helpers that exist.",
        upstream="Not reported for Megatron; the same in NVIDIA-NeMo/Automodel#798 (merged).",
    ),
    Patch(
        group="megatron",
        targets=_in(
            f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer",
            "state_dict load_state_dict _set_main_param_and_optimizer_states",
        ),
        source="megatron_ext.devices.torch_optimizer:replacements",
        reason="The distributed optimizer cannot resume in fp32, with torch's Adam, or without "
        "the main parameters that a checkpoint of another layout lacks.",
        removable="When it resumes with torch's Adam and in fp32.",
    ),
    Patch(
        group="megatron",
        targets=(
            "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
            ".async_loop",
            "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
            "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
            ".preload_tensors",
        ),
        source="megatron_ext.devices.async_save:replacements",
        reason="The process that writes a checkpoint outlives a rank that is killed, and on the "
        "CPU it shares its tensors with training.",
        removable="When that process ends with its rank and copies tensors in host memory.",
        upstream="Related to NVIDIA/Megatron-LM#6970 (open): failures of that process are lost.",
    ),
    Patch(
        group="gated delta net",
        targets=_in("megatron.core.ssm.gated_delta_net.common", "HAVE_FLA l2norm"),
        source="megatron_ext.model.gated_delta_net:replacements",
        reason="The layer requires flash-linear-attention, and normalizes keys by its Triton "
        "kernel, in deterministic mode too.",
        removable="When the layer runs without that package in deterministic mode.",
    ),
    Patch(
        group="mamba",
        targets=_in(
            "megatron.core.ssm.mamba_mixer",
            "HAVE_MAMBA_SSM ExtendedRMSNorm mamba_split_conv1d_scan_combined",
        ),
        source="megatron_ext.model.mamba:replacements",
        reason="The layer requires the Triton kernels of mamba-ssm.",
        removable="When the layer has an implementation in torch.",
    ),
    Patch(
        group="multi-token prediction",
        targets=("megatron.core.transformer.multi_token_prediction.roll_tensor",),
        source="megatron_ext.model.multi_token_prediction:replacements",
        reason="Context-parallel ranks divide the loss of a depth by different numbers of tokens.",
        removable="When these numbers are those of all ranks.",
        upstream="NVIDIA/Megatron-LM#7498 (open).",
    ),
)

_TRAINING = (
    Patch(
        group="optimizer",
        targets=(
            f"{_OPTIMIZER}.emerging_optimizers._EMERGING_OPTIMIZERS.muon",
            "megatron.training.training.get_megatron_optimizer_config",
        ),
        source="megatron_ext.optimizer:replacements",
        reason="Megatron's Muon has no learning rates for embeddings, head and routers.",
        removable="When Megatron has a learning rate for each kind of parameter.",
        upstream="Related to NVIDIA/Megatron-LM#1822 (closed): support for Muon.",
    ),
    Patch(
        group="optimizer",
        targets=(
            "megatron.training.models.dist_utils._ddp_wrap",
            f"{_OPTIMIZER}.layer_wise_optimizer.LayerWiseDistributedOptimizer.__init__",
        ),
        source="megatron_ext.optimizer:layer_wise_replacements",
        reason="The layer-wise optimizer reduces all gradients to every rank, and saves fp32 "
        "state in a form that it cannot load.",
        removable="When model builders mark the parameters of the layer-wise optimizer, and it "
        "wraps optimizers in fp32 too.",
    ),
    Patch(
        group="matrix gradients",
        targets=("megatron.training.models.dist_utils.DistributedOptimizer",),
        source="megatron_ext.optimizer:wrapping_replacements",
        reason="The wrapper lays out gradients for the distributed optimizer, not the layer-wise.",
        removable="Together with the patch of `_ddp_wrap`.",
    ),
    Patch(
        group="checkpoints",
        targets=(
            "megatron.core.dist_checkpointing.load_content_metadata",
            f"{_OPTIMIZER}.optimizer.ChainedOptimizer.sharded_state_dict",
            f"{_OPTIMIZER}.optimizer.ChainedOptimizer.load_state_dict",
        ),
        source="megatron_ext.training.resharding:replacements",
        reason="Optimizer state can be loaded only by a layout with the same optimizers.",
        removable="When Megatron loads optimizer state of any layout.",
        upstream="Reported as NVIDIA/Megatron-LM#1517 (closed), for expert parallelism.",
    ),
    Patch(
        group="checkpoints",
        targets=(
            f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero",
        ),
        source="megatron_ext.training.gathering:replacements",
        reason="A save takes host memory of up to nine times the fp32 weights, on every rank.",
        removable="When Megatron gathers the optimizer's state one tensor at a time.",
    ),
    Patch(
        group="checkpoints",
        targets=("megatron.training.checkpointing._maybe_setup_gpt_to_hybrid_load",),
        source="megatron_ext.model.hybrid:load_replacements",
        reason="Loading into a `HybridModel` translates tensor names of `GPTModel`, which are also "
        "this project's.",
        removable="When checkpoints have the names of `HybridModel`.",
        upstream="Not a bug: the names are this project's.",
    ),
    Patch(
        group="checkpoints",
        targets=("megatron.core.dist_checkpointing.save",),
        source="megatron_ext.training.saving:replacements",
        reason="Megatron hashes every file of a checkpoint on rank 0, if at all.",
        removable="When `--verify-integrity` shares the work among the ranks.",
    ),
    Patch(
        group="checkpoints",
        targets=("megatron.core.dist_checkpointing.load",),
        source="megatron_ext.training.estimator_change:replacements",
        reason="A run with filters cannot load a checkpoint that has thresholds alone.",
        removable="When Megatron lets a module load a state dict without some of its tensors.",
        upstream="Not a bug: the tensors are this project's.",
    ),
    Patch(
        group="trainer",
        targets=(
            *_in(
                "megatron.training.training",
                "train_step training_log evaluate evaluate_and_print_results save_checkpoint",
            ),
            "megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper"
            ".clean_metrics_in_tracker",
        ),
        source="megatron_ext.training.trainer:replacements",
        reason="The trainer has no callbacks for thresholds, metrics, failed saves and stalls.",
        removable="When the trainer takes callbacks around these functions.",
        upstream="Not a bug.",
    ),
    Patch(
        group="trainer",
        targets=_in(
            "megatron.training.training",
            "get_optimizer_param_scheduler update_train_iters setup_model_and_optimizer "
            "get_train_valid_test_num_samples",
        ),
        source="megatron_ext.training.schedule:replacements",
        reason="The trainer turns steps into samples by the batch size of the command line, also "
        "for steps that had another one.",
        removable="When the trainer counts samples by the batch size that each step had.",
        upstream="The same in NVIDIA-NeMo/Megatron-Bridge#2609 (open).",
    ),
    Patch(
        group="schedule",
        targets=("megatron.training.training.get_args",),
        source="megatron_ext.training.schedule:arguments",
        reason="The schedule is built from global arguments, here a copy that counts in samples.",
        removable="Together with the patch of `get_optimizer_param_scheduler`.",
        upstream="The same in NVIDIA-NeMo/Megatron-Bridge#2609 (open).",
    ),
)

_SIMULATION = "megatron_ext.planning.dry_run"
_DRY_RUNS = (
    Patch(
        group="fake rank",
        targets=("torch.distributed.Backend.backend_capability.fake",),
        source=f"{_SIMULATION}.simulated_rank:backend",
        reason="torch's fake process group refuses tensors on the meta device.",
        removable="When it accepts meta tensors.",
        versions=_TORCH,
    ),
    Patch(
        group="dry run",
        targets=(
            "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
            "._maybe_dtoh_and_synchronize",
            "megatron.core.transformer.moe.token_dispatcher.MoEAllGatherTokenDispatcher"
            ".dispatch_postprocess",
            "torch.nn.functional.scaled_dot_product_attention",
            f"{_OPTIMIZER}.clip_grads.multi_tensor_applier",
        ),
        source=f"{_SIMULATION}.fakes:replacements",
        reason="These functions read the data of tensors, which have only shapes.",
        removable=_UNTIL_DRY_RUN,
        upstream=_DRY_RUN,
    ),
    Patch(
        group="dry-run traffic",
        targets=(
            *_in(
                "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup",
                "start_grad_sync start_param_sync",
            ),
            f"{_OPTIMIZER}.emerging_optimizers.TensorParallelMuon.step",
        ),
        source=f"{_SIMULATION}.simulated_rank:traffic_replacements",
        reason="The purpose of a collective is not visible in its call.",
        removable="When Megatron names the purpose of its collectives.",
        upstream=_DRY_RUN,
    ),
    Patch(
        group="micro-batches",
        targets=("megatron.training.training.get_num_microbatches",),
        source=f"{_SIMULATION}.simulated_rank:step_length",
        reason="The trainer takes the number of micro-batches from a global calculator.",
        removable=_UNTIL_DRY_RUN,
        upstream=_DRY_RUN,
    ),
)

PATCHES: tuple[Patch, ...] = (*_CPU_DEVICE, *_EVERYWHERE, *_TRAINING, *_DRY_RUNS)
