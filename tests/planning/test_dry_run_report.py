"""Tests of the lines about devices in the report of a dry run."""

from typing import Any

import pytest

from megatron_ext.errors import UserError
from megatron_ext.planning.devices import GIB, MIB, Device, device_of, found_device, named_device
from megatron_ext.planning.dry_run.device_fit import advice, demand, fits, table_of, verdict
from megatron_ext.planning.dry_run.dry_run_report import fit, largest_rank

CARD = Device("card", 1000 * MIB, 100 * MIB, "CUDA", "--device", named=True)
HOST = Device("host", 1000 * MIB, 100 * MIB, "Python", "found", is_card=False)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (10 * GIB, "with 10,240.00 MiB, fits a100-40gb, h100-80gb, h200-141gb, b200-180gb ("),
        (84_777 * 2**20, "fits h200-141gb, b200-180gb and does not fit a100-40gb, h100-80gb ("),
        (78 * GIB, "fits h200-141gb, b200-180gb and does not fit a100-40gb, h100-80gb (a tenth"),
        (200 * GIB, "does not fit a100-40gb, h100-80gb, h200-141gb, b200-180gb ("),
    ],
)
def test_fit_names_the_devices_with_room_for_the_largest_rank(size: int, words: str) -> None:
    assert words in fit(size)


def test_largest_rank_counts_all_models_that_a_rank_holds() -> None:
    stages = [{"memory": {"parameters": 3, "activations": 1}}, {"memory": {"parameters": 5}}]
    assert largest_rank({"stages": stages}) == 5
    # Keys and values of answers take the place of activations.
    assert largest_rank({"stages": stages, "answers": 1}) == 6
    assert largest_rank({"stages": stages[:1], "answers": 1}) == 4
    assert largest_rank({"stages": stages[:1], "answers": 3}) == 6
    together = {"policy": [3, 5], "judge": [9, 2], "together at most": [12, 7]}
    assert largest_rank({"stages": stages, "together": together}) == 12


def stage(optimizer: int = 0, **memory: int) -> dict[str, Any]:
    sizes = {name: size * MIB for name, size in memory.items()}
    return {"memory": sizes, "logits": 3 * MIB, "optimizer_temporary": optimizer * MIB}


def test_rank_needs_what_it_stores_at_its_peak() -> None:
    facts = {
        "stages": [
            stage(400, parameters=100, gradients=100, activations=200, temporary=50),
            stage(0, parameters=200, gradients=200, activations=10),
        ]
    }
    # The fused optimizers of a GPU have no temporary tensors, and torch's have.
    card, host = demand(facts, CARD), demand(facts, HOST)
    assert (card.stage, card.total // MIB, card.logits // MIB) == (0, 450, 3)
    assert (host.stage, host.total // MIB, host.logits) == (0, 600, 0)
    assert list(host.parts) == ["temporary tensors of the optimizer", "parameters", "gradients"]
    generating = demand({**facts, "answers": 300 * MIB}, CARD)
    assert generating.parts["keys and values"] == 300 * MIB
    assert generating.total == 700 * MIB and generating.stage == 1

    together = {
        "policy: weights, gradients, optimizer": [200 * MIB, 400 * MIB],
        "judge gold: weights": [500 * MIB, 500 * MIB],
        "what a step needs besides": [250 * MIB, 10 * MIB],
        "or keys and values, policy": [20 * MIB, 20 * MIB],
        "together at most": [950 * MIB, 920 * MIB],
    }
    joint = demand({**facts, "together": together}, CARD)
    assert joint.total == 950 * MIB == together["together at most"][0]
    assert next(iter(joint.parts)) == "judge gold: weights"


def test_verdict_states_the_numbers_and_the_change_that_helps_most() -> None:
    small, large = (demand({"stages": [stage(parameters=size)]}, CARD) for size in (900, 901))
    assert fits(small, CARD) and not fits(large, CARD)
    assert verdict(small, CARD) == "fits: a rank needs 1,000 of the 1,000 MiB of card (--device)"
    assert verdict(large, CARD).startswith("does not fit: a rank needs 1,001 of the 1,000 MiB of")
    assert verdict(large, CARD).endswith("most of it for parameters")
    rows = {label: size for label, size, _ in table_of(large, CARD, 1)}
    assert rows["headroom"] == "-1.00" and rows["reserve for CUDA"] == "100.00"

    results = [("--bf16", 500 * MIB), ("--micro-batch-size 1", 1200 * MIB)]
    assert advice(results, 2000 * MIB, CARD) == (
        "--bf16 helps most: a rank then needs 500 MiB, which fits."
    )
    assert "which is not enough alone" in advice(results[1:], 2000 * MIB, CARD)
    assert advice(results[1:], 1100 * MIB, CARD).startswith("No single change of the layout helps")


@pytest.mark.parametrize(
    ("text", "size"),
    [("h100-80gb", 81_559 * MIB), ("H100 80GB", 81_559 * MIB), ("h200", 143_771 * MIB),
     ("40", 40 * GIB), ("0.5", GIB // 2)],
)  # fmt: skip
def test_device_is_a_card_or_a_number_of_gib(text: str, size: int) -> None:
    device = named_device(text)
    assert (device.size, device.reserve, device.named) == (size, size // 10, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10-80gb", "is not a known card. Did you mean h100-80gb?"),
        ("a100", "--device a100 may be a100-40gb or a100-80gb. Write one of them."),
        ("zx81", "Known are t4-16gb"),
        ("", "is not a known card"),
        ("0", "--device 0 must be above 0 GiB"),
        ("-80", "--device -80 must be above 0 GiB"),
        ("nan", "must be above 0 GiB"),
    ],
)
def test_unknown_card_is_answered_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        named_device(text)


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    whole, quarter = found_device(1), device_of(None, 4)
    assert not whole.is_card and not whole.named
    assert quarter.size == whole.size // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert found_device(4).size == whole.size // 2
    assert found_device(1).size == whole.size
