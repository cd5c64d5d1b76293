"""Tests of the registry of routers, and of a router that only a test registers, in training."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.moe.registry import ROUTERS, RouterType, router_type, routing_flags
from tests.distributed import run_ranks
from tests.megatron import TINY


def load_router(name: str) -> tuple[bool, list[str]]:
    from megatron_ext.config import ETConfig
    from megatron_ext.moe.router import ETRouter

    kind = ROUTERS[name]
    names = [field.name for field in dataclasses.fields(ETConfig)]
    used = [*kind.flags, *kind.settings, *kind.refusals(), *kind.without_margins]
    return issubclass(kind.load(), ETRouter), [name for name in used if name not in names]


@pytest.mark.parametrize("name", ROUTERS)
def test_registered_router_is_a_class_and_names_fields_of_the_configuration(name: str) -> None:
    assert run_ranks(load_router, 1, name) == [(True, [])]
    assert router_type(name).evaluates_as in (None, *ROUTERS)


def test_unregistered_router_is_refused_with_the_registered_ones() -> None:
    with pytest.raises(UserError, match=r"--router-type top-k is not registered .* expert-choice"):
        router_type("top-k")


def test_router_reads_its_own_flags_and_those_of_megatron() -> None:
    kind = RouterType("", "", flags=frozenset({"et_gate"}), reads_megatron_flags=True)
    assert kind.flags < routing_flags()
    assert kind.reads("et_gate") and kind.reads("moe_router_topk") and kind.reads("hidden_size")
    assert not kind.reads("et_warmup_iters")
    assert not ROUTERS["expert-threshold"].reads("moe_router_topk")
    assert not RouterType("", "").reads("moe_router_topk")


def train_top_p(run_dir: Path, flags: Sequence[str]) -> tuple[int, str]:
    """Register the router on a rank, train, and return code and messages, also of a conversion."""
    from megatron_ext.checkpoint import find_checkpoint, read_common_state
    from megatron_ext.hf.architecture import from_args
    from tests import pretraining
    from tests.moe import top_p_router

    top_p_router.register()
    code, messages = pretraining.start([*TINY, "--run-dir", run_dir, *flags])
    try:
        from_args(read_common_state(find_checkpoint(run_dir))["args"])
    except UserError as error:
        messages += str(error)
    return code, messages


def test_router_added_to_the_registry_trains_resumes_and_evaluates(tmp_path: Path) -> None:
    flags = ["--router-type", "top-p", "--eval-interval", "3"]
    flags += ["--expert-model-parallel-size", "2"]
    for more in (["--exit-interval", "3"], []):
        ended = run_ranks(train_top_p, 2, tmp_path, [*flags, *more], timeout=240)
        assert [code for code, _ in ended] == [0, 0], ended
        assert all("top-p, which has no counterpart among" in messages for _, messages in ended)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for row in steps:
        assert 1 <= row["moe/layer_01/fan_out"] <= 4
        assert row["moe/layer_01/no_expert_share"] == 0
    assert len({row["moe/layer_01/fan_out"] for row in steps}) > 1  # it varies
