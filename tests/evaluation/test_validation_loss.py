"""Tests of losses by routing against transformers, training's validation, and other layouts.

The reference routing is written again on top of transformers' forward pass.
"""

import json
import math
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.json_numbers import dump_json
from tests.distributed import run_ranks
from tests.hf.models import make
from tests.inference.checkpoint import MAX_LENGTH, MODEL

ROUTINGS = ["et", "ec", "tc", "et-capacity"]
WINDOWS, POOL, TOPK, EXPERTS, CAPACITY = 9, 3, 2, 8, 0.5


def measure(run, data, *flags):
    from tools import validation_loss

    out = run.parent / f"validation-{abs(hash(flags))}.json"
    validation_loss.main(["--load", str(run), "--data", str(data), "--out", str(out), *flags])
    return out


def on_ranks(run, data, stream, sizes):
    layout = [f"--{name}-model-parallel-size={size}" for name, size in sizes.items()]
    pooled = ["--routing", *ROUTINGS, "--pool-tokens", str(POOL * MAX_LENGTH)]
    files = SimpleNamespace(
        # Whole pools, the whole data with an odd end, and one long document.
        whole=measure(run, data, *pooled, "--max-sequences", str(WINDOWS), *layout),
        ragged=measure(run, data, *pooled, *layout),
        stream=measure(run, stream, *layout),
    )
    with pytest.raises(UserError, match=r"--pool-tokens 65 is not divisible"):
        measure(run, data, "--pool-tokens", "65", *layout)
    return files


def read(files):
    return SimpleNamespace(**{k: json.loads(v.read_text()) for k, v in vars(files).items()})


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Return the prefix of a dataset of one document, whose windows shuffling leaves unchanged."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("stream") / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    tokens = (np.arange(8 * MAX_LENGTH + 1) * 3) % 450 + 20
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def one_rank(run_dir, data, stream):
    [files] = run_ranks(on_ranks, 1, run_dir, data, stream, {})
    return read(files)


def capped(logits, thresholds, pool):
    k = TOPK * pool // EXPERTS
    least, most = math.floor(k * (1 - CAPACITY)), math.floor(k * (1 + CAPACITY))
    chosen = np.zeros(logits.shape, dtype=bool)
    for expert in range(EXPERTS):
        column = logits[:, expert]
        required = min(max(int((column > thresholds[expert]).sum()), least), most)
        chosen[np.argsort(-column, kind="stable")[:required], expert] = True
    return chosen


def by_hand(name, logits, thresholds):
    """Return the routing by numpy on all logits of a pool, `[tokens, experts]`."""
    if name == "et":
        return logits > thresholds
    if name == "et-capacity":
        return capped(logits, thresholds, len(logits))
    chosen = np.zeros(logits.shape, dtype=bool)
    if name == "ec":
        for expert in range(EXPERTS):
            best = np.argsort(-logits[:, expert], kind="stable")
            chosen[best[: TOPK * len(logits) // EXPERTS], expert] = True
        return chosen
    for token in range(len(logits)):
        chosen[token, np.argsort(-logits[token], kind="stable")[:TOPK]] = True
    return chosen


@pytest.mark.parametrize("name", ROUTINGS)
def test_losses_and_loads_equal_those_of_transformers_routed_by_hand(
    name, one_rank, data, hf_model, monkeypatch
):
    maps = []

    def forward(router, x):
        logits = torch.nn.functional.linear(x.float(), router.weight.float())
        chosen = torch.from_numpy(by_hand(name, logits.numpy(), router.thresholds.numpy()))
        maps.append(chosen)
        return torch.sigmoid(logits), chosen

    gate = hf_model.model.layers[1].mlp.gate
    monkeypatch.setattr(type(gate), "forward", forward)
    tokens = torch.from_numpy(np.fromfile(f"{data}.bin", dtype=np.uint16).astype(np.int64))
    inputs = tokens[: WINDOWS * MAX_LENGTH].view(WINDOWS, MAX_LENGTH)
    targets = tokens[1 : WINDOWS * MAX_LENGTH + 1].view(WINDOWS, MAX_LENGTH)
    losses = []
    for pool, required in zip(inputs.split(POOL), targets.split(POOL)):
        with torch.no_grad():
            logits = hf_model(pool, use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits.mT, required, reduction="none"))
    by_window = torch.cat(losses).double().mean(dim=1)
    [row] = [row for row in one_rank.whole["routings"] if row["routing"] == name]
    assert row["loss"] == pytest.approx(float(by_window.mean()), abs=1e-5)
    error = float(by_window.std()) / math.sqrt(WINDOWS)
    assert row["standard_error"] == pytest.approx(error, rel=1e-3)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    load = torch.stack([torch.cat(maps[layer::2]).sum(dim=0) for layer in (0, 1)]).double()
    assert row["fan_out"] == pytest.approx(float(load.sum() / 2 / (WINDOWS * MAX_LENGTH)))
    assert row["max_load"] == pytest.approx(float((load.amax(1) / load.mean(1)).max()))


def test_routings_differ_and_the_gap_is_from_the_first(one_rank):
    rows = one_rank.whole["routings"]
    assert [row["routing"] for row in rows] == ROUTINGS
    assert len({row["loss"] for row in rows}) == len(ROUTINGS)
    for row in rows:
        assert row["gap"] == pytest.approx(row["loss"] - rows[0]["loss"])
    # Windows are hard or easy under every routing alike.
    assert rows[0]["gap_standard_error"] == 0
    assert 0 < rows[1]["gap_standard_error"] < rows[1]["standard_error"]
    fan_outs = {row["routing"]: row["fan_out"] for row in rows}
    assert fan_outs["ec"] == fan_outs["tc"] == TOPK and fan_outs["et"] != TOPK


def test_validation_bytes_equal_those_of_the_text(one_rank, data, hf_tokenizer):
    tokens = np.fromfile(f"{data}.bin", dtype=np.uint16)[1:].tolist()
    documents = " ".join(map(str, tokens)).split(f" {hf_tokenizer.eos_token_id} ")
    size = 0
    for document in documents:
        ids = [i for i in map(int, document.split()) if i != hf_tokenizer.eos_token_id]
        size += len(hf_tokenizer.decode(ids).encode())
    assert one_rank.ragged["bytes"] == size and one_rank.ragged["tokens"] == len(tokens)
    for row in one_rank.ragged["routings"]:
        assert row["nats_per_byte"] == pytest.approx(row["loss"] * len(tokens) / size)


@pytest.mark.parametrize("sizes", [{"expert": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_validation_loss_on_two_ranks_equals_one_rank(sizes, one_rank, run_dir, data, stream):
    files = read(run_ranks(on_ranks, 2, run_dir, data, stream, sizes)[0])
    for name in ("whole", "ragged", "stream"):
        ours, alone = getattr(files, name), getattr(one_rank, name)
        assert ours["tokens"] == alone["tokens"] and ours["bytes"] == alone["bytes"]
        for row, expected in zip(ours["routings"], alone["routings"]):
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert row["standard_error"] == pytest.approx(expected["standard_error"], abs=1e-5)
            assert row["layers"] == expected["layers"]


def of_other_families(folder, data, name):
    """Return the loss of a converted model, and with the flags of dropping tokens."""
    from megatron_ext.inference import loading
    from tools import convert_checkpoint, validation_loss

    save, out = folder / "checkpoints", folder / "loss.json"
    flags = ["--from", "hf", "--to", "megatron", "--load", str(folder / "hf")]
    convert_checkpoint.main([*flags, "--save", str(save)])
    read = loading.read_common_state

    def read_with_capacity(checkpoint):
        state = read(checkpoint)
        state["args"].moe_expert_capacity_factor = 0.5
        return state

    flags = ["--load", str(save), "--data", str(data), "--batch-tokens", "300"]
    results = []
    for loading.read_common_state in (read, read_with_capacity)[: 1 + (name == "mixtral")]:
        validation_loss.main([*flags, "--out", str(out)])
        results.append(json.loads(out.read_text()))
    with pytest.raises(UserError) as refused:
        validation_loss.main([*flags, "--routing", "et"])
    return results, str(refused.value)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_models_without_thresholds_have_the_loss_of_transformers(name, data, tmp_path):
    model = make(name, tmp_path / "hf")
    [(results, refusal)] = run_ranks(of_other_families, 1, tmp_path, data, name)
    tokens = torch.from_numpy(np.fromfile(f"{data}.bin", dtype=np.uint16).astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, MAX_LENGTH):
        window = tokens[start : start + MAX_LENGTH + 1].unsqueeze(0)
        with torch.no_grad():
            logits = model(window[:, :-1], use_cache=False).logits
        total += float(torch.nn.functional.cross_entropy(logits.mT, window[:, 1:], reduction="sum"))
    for result in results:
        [row] = result["routings"]
        assert row["loss"] == pytest.approx(total / (len(tokens) - 1), abs=1e-5)
        assert result["bytes"] is None and row["nats_per_byte"] is None
        assert row["routing"] == ("tc" if name == "mixtral" else "none")
        assert row["fan_out"] == (TOPK if name == "mixtral" else None)
    assert ("needs thresholds" if name == "mixtral" else "no experts") in refusal


def validate_as_training_does(run_dir, stream, tmp_path):
    import pretrain_et

    sys.argv = list(
        map(
            str,
            [
                *("pretrain_et.py", "--load", run_dir / "checkpoints", "--run-dir", tmp_path),
                *("--train-data-path", stream, "--valid-data-path", stream, "--skip-train"),
                *("--tokenizer-type", "SentencePieceTokenizer"),
                *("--tokenizer-model", run_dir.parent / "tokenizer.model"),
                *MODEL,
                *("--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "40"),
                *("--lr", "1e-2", "--min-lr", "1e-2", "--lr-decay-style", "constant"),
                *("--no-load-optim", "--no-load-rng"),
                *("--et-warmup-iters", "10", "--et-ema-decay", "0.9"),
                *("--eval-iters", "1", "--eval-interval", "40", "--num-workers", "0"),
            ],
        )
    )
    pretrain_et.main()


def test_validation_loss_equals_that_of_training(one_rank, run_dir, stream, tmp_path):
    run_ranks(validate_as_training_does, 1, run_dir, stream, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [loss] = [row["val_loss"] for row in rows if "val_loss" in row]
    assert one_rank.stream["routings"][0]["loss"] == pytest.approx(loss, abs=1e-5)


def of_extreme_log_probs():
    """Return, on a rank, a summary of extreme losses, and the errors of those that are not finite.

    The model, the data and the routing are replaced by the least that the functions need.
    """
    from megatron_ext.evaluation.log_likelihoods import DataReplicas, LanguageModel, ScoringRequest
    from megatron_ext.evaluation.losses import Losses, summary, window_losses

    class Model(LanguageModel):
        replicas, value = DataReplicas(), 0.0

        def log_probs(self, batch):
            return torch.full((2, len(batch.targets)), self.value)

    routing = MagicMock(pooled=False, metrics=dict)
    routing.name = "et"
    windows = MagicMock(number=3, length=4, targets=12)
    windows.__getitem__.side_effect = lambda window: np.arange(5)
    model: Any = Model()
    messages = []
    model.value = -800.0
    losses = window_losses(model, windows, routing, 2)
    row = summary(losses, losses, routing, None)
    for model.value in (math.nan, -math.inf):
        with pytest.raises(UserError) as refused:
            window_losses(model, windows, routing, 2)
        messages.append(str(refused.value))
    model.value = math.nan
    with pytest.raises(UserError) as refused:
        model.score([ScoringRequest(np.arange(5, dtype=np.int32), 1)])
    return row, Losses(losses.sums / 2, losses.tokens).mean, [*messages, str(refused.value)]


def test_extreme_losses_are_reported_and_those_that_are_not_finite_refused():
    [(row, half, messages)] = run_ranks(of_extreme_log_probs, 1)
    assert row["loss"] == 800 and row["perplexity"] == math.inf and half == 400
    assert json.loads(dump_json(row))["perplexity"] == "Infinity"
    for message in messages[:2]:
        assert message.startswith("The loss of 3 of 3 sequences is not finite")
    assert messages[2].startswith("The logits of the model are not finite")
