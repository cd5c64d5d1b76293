"""Tests of upcycled dense models: the same function at the start, and trainable."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_ext.errors import UserError
from tests.distributed import run_ranks
from tests.hf.models import VOCAB, add_tokenizer, make
from tests.pretraining import train

TOKENS = torch.arange(240).reshape(8, 30) * 7919 % 450
# Family, flags, and how far logits may be from the dense model's, whose spread is about 1.
CASES = {
    "qwen2": (["--num-experts", "8", "--granularity", "4", "--router-std", "1e-5"], 1e-3),
    "llama-tied": (
        ["--num-experts", "8", "--granularity", "2", "--shared-slices", "2"]
        + ["--mean-experts", "1.5", "--gate", "softmax", "--moe-layer-freq", "[0,1,1]"],
        1e-4,
    ),
    "qwen3": (
        ["--num-experts", "8", "--granularity", "3", "--shared-slices", "1"]
        + ["--mean-experts", "4", "--gate", "softmax", "--router-std", "1e-5"],
        1e-3,
    ),
}


def to_checkpoint(folder):
    """Write, on a rank, a dense checkpoint of this project."""
    from tools import convert_checkpoint

    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(folder / "dense")])


def upcycle(folder, load, flags):
    """Upcycle, calibrate and convert a model on a rank, and run it through Megatron."""
    from megatron_ext.checkpoint import find_checkpoint
    from megatron_ext.hf.recalibrate import use_thresholds, with_thresholds
    from megatron_ext.hf.verify import hf_logits, largest_difference
    from megatron_ext.inference.calibration import calibrate, measure_routing
    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.loading import load_model
    from tools import convert_checkpoint
    from tools import upcycle as tool

    raw, ready, back = folder / "raw", folder / "ready", folder / "back"
    tool.main(["--load", str(load), "--save", str(raw), *flags])
    trained = load_model(raw, with_thresholds=use_thresholds)
    cutoffs = calibrate(trained, TOKENS)
    ready.mkdir()
    with_thresholds(find_checkpoint(raw), ready, ready, cutoffs).write(lambda _: None)
    again = load_model(ready)
    logits = full_logits(again, TOKENS)
    assert logits is not None
    measured = measure_routing(again, TOKENS)
    convert_checkpoint.main(
        ["--from", "megatron", "--to", "hf", "--load", str(ready), "--save", str(back)]
    )
    return SimpleNamespace(
        ours=logits[..., :VOCAB],
        dense=hf_logits(folder / "hf", TOKENS),
        fan_out=[measured.fan_out(layer) for layer in measured.load],
        mean=float(again.model.config.mean_experts),
        converted=largest_difference(ready, back),
        kind=json.loads((back / "config.json").read_text())["model_type"],
    )


@pytest.mark.parametrize("name", CASES)
def test_upcycled_model_has_the_logits_of_the_dense_model(name, tmp_path):
    flags, tolerance = CASES[name]
    make(name, tmp_path / "hf")
    load = tmp_path / "hf"
    if name == "llama-tied":  # a model may have several types of weights
        for file in load.glob("*.safetensors"):
            weights = load_file(file)
            norms = {n: w.bfloat16() for n, w in weights.items() if n.endswith("norm.weight")}
            save_file(weights | norms, file, {"format": "pt"})
    if name == "qwen3":  # a checkpoint of this project serves as well
        run_ranks(to_checkpoint, 1, tmp_path)
        load = tmp_path / "dense"
    [facts] = run_ranks(upcycle, 1, tmp_path, load, flags)
    assert facts.dense.std() > 0.5
    torch.testing.assert_close(facts.ours, facts.dense, atol=tolerance, rtol=0)
    assert facts.fan_out == pytest.approx([facts.mean] * len(facts.fan_out), abs=2 / 240)
    assert facts.converted < 5e-5 and facts.kind == "expert_threshold"
    [file] = (tmp_path / "back").glob("*.safetensors")
    types = {weight.dtype for weight in load_file(file).values()}
    assert (torch.bfloat16 in types) == (name == "llama-tied")


def tensors_of(folder, **options):
    """Return the tensors of the dense model and of the upcycled one."""
    from megatron_ext.hf.sources import open_dense
    from megatron_ext.hf.upcycling import Upcycling, upcycled

    dense = open_dense(folder)
    return dense.tensors, upcycled(dense, Upcycling(moe_layers=(True,) * 3, **options)).tensors


def block(tensors, prefix, x):
    gate, up, down = (tensors.read(f"{prefix}.{m}_proj.weight") for m in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("shared", range(4))
def test_upcycled_slices_sum_to_the_dense_block(shared, tmp_path):
    """Any copies of the slices do; if all slices are shared, routed experts return 0."""
    make("llama-tied", tmp_path)
    slices = 3 - shared or 3
    options = {"experts": slices * 4, "granularity": 3, "shared_slices": shared}
    [outputs] = run_ranks(blocks, 1, tmp_path, options, slices)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


def blocks(folder, options, slices):
    dense, moe = tensors_of(folder, **options)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    copies = [2, 0, 3]
    prefix = "model.layers.1.mlp"
    output = sum(
        0.5 * block(moe, f"{prefix}.experts.{copies[s] * slices + s}", x) for s in range(slices)
    )
    if options["shared_slices"]:
        output = output + block(moe, f"{prefix}.shared_expert", x)
    return block(dense, prefix, x), output


def routers(folder):
    """Return router rows of several seeds and plans, as `[groups, group, slices, hidden]`."""
    name = "model.layers.2.mlp.gate.weight"
    pairs = {"experts": 8, "granularity": 4}
    same = [tensors_of(folder, **pairs, seed=seed)[1].read(name) for seed in (1, 1, 2)]
    fours = tensors_of(folder, experts=8, granularity=2, router_std=0.5)[1].read(name)
    twos = tensors_of(folder, experts=8, granularity=2, mean_experts=4)[1].read(name)
    noisy = [
        tensors_of(folder, **pairs, noise=noise)[1].read(
            "model.layers.0.mlp.experts.5.up_proj.weight"
        )
        for noise in (0.0, 0.1)
    ]
    return same, fours, twos, noisy


def test_upcycled_router_rows_sum_to_zero_and_depend_on_the_seed(tmp_path):
    make("qwen3", tmp_path)
    [(same, fours, twos, noisy)] = run_ranks(routers, 1, tmp_path)
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert torch.equal(same[0][:4], -same[0][4:])  # exactly opposite: every token has an expert
    copies = fours.view(4, 2, 64)
    torch.testing.assert_close(copies.sum(0), torch.zeros(2, 64), atol=1e-6, rtol=0)
    assert not torch.allclose(copies[:2].sum(0), torch.zeros(2, 64), atol=1e-3)
    assert torch.equal(twos.view(2, 2, 2, 64)[:, 0], -twos.view(2, 2, 2, 64)[:, 1])
    added = (noisy[1] - noisy[0]) / noisy[0].std()
    assert 0.08 < float(added.std()) < 0.12


@pytest.mark.slow
def test_training_continues_from_an_upcycled_model(tmp_path):
    make("llama", tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    flags = ["--num-experts", "8", "--granularity", "4"]
    run_ranks(upcycle, 1, tmp_path, tmp_path / "hf", flags)
    train(
        [
            *("--load", tmp_path / "ready", "--run-dir", tmp_path / "run"),
            *("--mock-data", "--split", "90,5,5", "--tokenizer-type", "NullTokenizer"),
            *("--vocab-size", str(VOCAB), "--num-layers", "3", "--hidden-size", "64"),
            *("--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2"),
            *("--seq-length", "64", "--max-position-embeddings", "64", "--rotary-base", "500000"),
            *("--num-experts", "8", "--moe-router-topk", "4", "--moe-ffn-hidden-size", "24"),
            *("--ffn-hidden-size", "96", "--swiglu", "--disable-bias-linear"),
            *("--no-bias-gelu-fusion", "--untie-embeddings-and-output-weights", "--et-norm-scale"),
            *("--no-et-embedding-norm", "--et-logit-softcap", "0", "--norm-epsilon", "1e-5"),
            *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
            *("--hidden-dropout", "0", "--attention-dropout", "0"),
            *("--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "8"),
            *("--lr", "1e-2", "--lr-decay-style", "constant", "--et-warmup-iters", "3"),
            *("--eval-iters", "1", "--eval-interval", "100", "--log-interval", "1"),
            *("--expert-model-parallel-size", "2"),
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 8 and rows[-1]["loss"] < rows[0]["loss"] - 0.1
    # Expert choice for two more steps, then thresholds, which stay near their share.
    fan_out = [row["moe/layer_01/fan_out"] for row in rows]
    assert fan_out[:2] == [4.0, 4.0] and fan_out[2] != 4.0
    assert all(2.5 < value < 5.5 for value in fan_out)


def refusals(folder):
    """Return, on a rank, the error messages of plans and models."""
    from tools import upcycle as tool

    plain = ["--num-experts", "8", "--granularity", "4"]
    cases = [
        (folder / "hf", ["--num-experts", "8", "--granularity", "5"]),
        (folder / "hf", ["--num-experts", "6", "--granularity", "4"]),
        (folder / "hf", [*plain, "--shared-slices", "5"]),
        (folder / "hf", [*plain, "--mean-experts", "9"]),
        (folder / "hf", [*plain, "--moe-layer-freq", "[1,1]"]),
        (folder / "moe", plain),
        (folder / "nowhere", plain),
    ]
    messages = []
    for load, flags in cases:
        with pytest.raises(UserError) as refused:
            tool.main(["--load", str(load), "--save", str(folder / "saved" / "et"), *flags])
        messages.append(str(refused.value))
    return messages


def test_upcycling_refusals_write_nothing(tmp_path):
    make("qwen2", tmp_path / "hf")
    make("mixtral", tmp_path / "moe")
    add_tokenizer(tmp_path / "hf", 450)
    [messages] = run_ranks(refusals, 1, tmp_path)
    expected = [
        "--granularity 5 does not divide the 96 intermediate channels",
        "--num-experts 6 is not divisible by the 4 slices",
        "--shared-slices 5 is out of range. Choose a number from 0 to --granularity 4",
        "--mean-experts 9 is out of range. Set it above 0 and to at most --num-experts 8",
        "selects 2 of 2 layers, and the model has 3",
        "has experts already",
        "is not a folder",
    ]
    for text, message in zip(expected, messages, strict=True):
        assert text in message
    assert not (tmp_path / "saved").exists()
