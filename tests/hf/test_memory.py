"""Tests that conversion holds a few tensors at a time, and never the model."""

import gc
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.distributed import run_ranks

LARGEST = 40_000 * 128 * 4  # bytes of the embedding; ten layers weigh six times that


def private_memory():
    """Return the bytes of this process without files that are mapped into it."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x]
    return int(line.split()[1]) * 1024


def growth(conversion):
    """Return the peak growth of memory, in bytes, while tensors are written."""
    gc.collect()
    before, most = private_memory(), 0

    def done(_):
        nonlocal most
        most = max(most, private_memory() - before)

    conversion.write(done)
    return most


def both_ways(folder):
    from transformers import LlamaConfig

    from megatron_ext.hf.convert import to_hf, to_megatron
    from megatron_ext.hf.families import family_named, read_config
    from megatron_ext.hf.safetensors_folder import PlannedTensor, write_safetensors

    config = LlamaConfig(
        vocab_size=40_000,
        hidden_size=128,
        intermediate_size=8_000,
        num_hidden_layers=10,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    for name in ("hf", "checkpoints", "back"):
        (folder / name).mkdir()
    config.save_pretrained(folder / "hf")
    links = family_named("llama").links(read_config(config))
    plan = [
        PlannedTensor(name, shape, torch.float32) for link in links for name, shape in link.parts
    ]
    tensors = (torch.ones(entry.shape) for entry in plan)
    write_safetensors(folder / "hf", plan, tensors, 10**7 * 6, lambda _: None)
    assert len(list((folder / "hf").glob("*.safetensors"))) > 1
    ours = folder / "checkpoints"
    into = growth(to_megatron(folder / "hf", ours, ours))
    return sum(e.bytes for e in plan), into, growth(to_hf(ours / "release", folder / "back"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_conversion_memory_is_bounded_by_the_largest_tensor(tmp_path):
    [(total, into_megatron, into_hf)] = run_ranks(both_ways, 1, tmp_path)
    assert total > 5 * LARGEST
    slack = 4e6  # of the allocator, and of Python's own
    copies = 1.3 if Version(torch.__version__) >= Version("2.13") else 2.3  # of the older writer
    assert into_megatron < copies * LARGEST + slack
    assert into_hf < 1.3 * LARGEST + slack
