"""Tests of training with Megatron on the CPU device."""

import sys
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint

from tests.devices.on_cpu import on_cpu
from tests.distributed import run_ranks


def _pretrain(*flags):
    """Train with Megatron's own `pretrain` and return the parameters of this rank."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_ext.devices import device_default_args
    from megatron_ext.training.data_loading import forward_step, train_valid_test_datasets

    models: list[torch.nn.Module] = []

    def remembering(iterator, model, *args):
        models[:] = [model]
        return forward_step(iterator, model, *args)

    with mock.patch.object(sys, "argv", ["pretrain", *device_default_args(), *MOE, *flags]):
        args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        remembering,
    )
    return {name: p.detach().float() for name, p in models[0].named_parameters()}


MOE = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--num-workers", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--split", "90,5,5"),
    *("--train-iters", "4", "--lr", "1e-2", "--lr-decay-iters", "8"),
    *("--eval-iters", "1", "--eval-interval", "3", "--log-interval", "1"),
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"),
    *("--moe-aux-loss-coeff", "0.01", "--expert-model-parallel-size", "2"),
    *("--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--no-create-attention-mask-in-dataloader"),
    *("--moe-token-dispatcher-type", "alltoall", "--use-distributed-optimizer"),
    *("--ckpt-format", "torch_dist", "--save-interval", "2"),
]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable", "--ckpt-fully-parallel-save"]


def _different(left, right):
    """Return, by rank, the parameters that are not equal in every bit."""
    return [
        [name for name in ours if not torch.equal(ours[name], theirs[name])]
        for ours, theirs in zip(left, right)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return every rank's parameters after a run with dropout, and the checkpoints' folder."""
    folder = tmp_path_factory.mktemp("trained")
    return run_ranks(_pretrain, 2, *RESHARDABLE, "--save", str(folder)), folder


@on_cpu
@pytest.mark.slow
def test_megatron_resumes_exactly(trained):
    parameters, folder = trained
    resumed = run_ranks(_pretrain, 2, *RESHARDABLE, "--load", str(folder), "--ckpt-step", "2")
    assert _different(parameters, resumed) == [[], []]


@on_cpu
@pytest.mark.slow
def test_megatron_resumes_exactly_in_bf16(tmp_path):
    straight = run_ranks(_pretrain, 2, "--bf16", "--save", str(tmp_path))
    resumed = run_ranks(_pretrain, 2, "--bf16", "--load", str(tmp_path), "--ckpt-step", "2")
    assert _different(straight, resumed) == [[], []]


@on_cpu
@pytest.mark.slow
def test_megatron_trains_equally_with_recomputation(trained):
    how = ["full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    recomputed = run_ranks(_pretrain, 2, "--recompute-granularity", *how)
    assert _different(trained[0], recomputed) == [[], []]


@on_cpu
@pytest.mark.slow
def test_megatron_trains_equally_with_either_dispatcher(trained):
    gathered = run_ranks(_pretrain, 2, "--moe-token-dispatcher-type", "allgather")
    for ours, theirs in zip(trained[0], gathered):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
