"""Tests of checkpoints of runs on several ranks: stacked layers, divided tensors, bf16."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.checkpoint import find_checkpoint
from megatron_ext.hf.torch_dist import TorchDistReader
from tests.distributed import run_ranks
from tests.megatron import TINY
from tests.pretraining import train

VOCAB = 127
LLAMA = ["--swiglu", "--et-norm-scale", "--no-et-embedding-norm", "--et-logit-softcap", "0"]
TENSOR_PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
GQA = ["--group-query-attention", "--num-query-groups", "2", "--num-attention-heads", "4"]


def tiny(without=()):
    """Return the flags of the tiny model without some flags and their values."""
    retained, skipping = [], False
    for word in TINY:
        skipping = word in without or (skipping and not word.startswith("--"))
        if not skipping:
            retained.append(word)
    return retained


RUNS = {
    "expert_threshold": [
        *tiny(["--squared-relu", "--untie-embeddings-and-output-weights"]),
        *("--swiglu", "--et-norm-scale", "--et-gate", "relu", "--bf16"),
        *("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
    ],
    "mixtral": [
        *tiny(["--squared-relu", "--qk-layernorm", "--moe-shared-expert-intermediate-size"]),
        *(*LLAMA, *GQA, *TENSOR_PARALLEL, "--router-type", "token-choice"),
        *("--moe-layer-freq", "1", "--moe-router-topk", "2"),
    ],
}


def there_and_back(run, folder):
    from tools import convert_checkpoint

    for source, target, load, save in (
        ("megatron", "hf", run, folder / "hf"),
        ("hf", "megatron", folder / "hf", folder / "back"),
    ):
        flags = ["--from", source, "--to", target, "--load", str(load), "--save", str(save)]
        convert_checkpoint.main([*flags, "--verify"])
    return SimpleNamespace(config=json.loads((folder / "hf" / "config.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("family", RUNS)
def test_conversion_of_a_distributed_checkpoint_is_complete(family, tmp_path):
    run = tmp_path / "run"
    train([*RUNS[family], "--run-dir", run, "--exit-interval", "3"])
    [facts] = run_ranks(there_and_back, 1, run, tmp_path)
    assert facts.config["model_type"] == family
    old, new = (TorchDistReader(find_checkpoint(f)) for f in (run, tmp_path / "back"))
    assert old.shapes.keys() == new.shapes.keys() and old.dtypes == new.dtypes
    for name in old.shapes:
        ours, again = old.read(name), new.read(name)
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            ours, again = ours[:VOCAB], again[:VOCAB]
        assert torch.equal(ours, again), name
