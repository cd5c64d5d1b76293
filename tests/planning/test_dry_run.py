"""Tests of `--dry-run` against the paper's totals, real ranks, and bytes counted on them."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import ROOT, run_ranks
from tests.megatron import TINY
from tests.training.counting import Counted, Saved, owned
from tests.warm import warm_python

RANKS = 4
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP2 = ("--expert-model-parallel-size", "2")
SHARDED = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "DP4-recomputed": (*FULL, "--recompute-num-layers", "1"),
    "DP4-sharded": (*SHARDED, *OVERLAP),
    "TP2-EP2-DP2": (*TP2, *EP2, "--expert-tensor-parallel-size", "1", *SHARDED),
    "TP2-EP2-DP2-muon": (
        *(*TP2, *EP2, "--expert-tensor-parallel-size", "1", *SHARDED),
        *("--bf16", "--optimizer", "muon"),
    ),
    "PP2-DP2": ("--pipeline-model-parallel-size", "2", *SHARDED, "--bf16"),
    "CP2-DP2": ("--context-parallel-size", "2", "--moe-token-dispatcher-type", "allgather"),
}
SHORT = [*TINY, "--train-iters", "4", "--eval-iters", "0"]
ROUTING = ("all-reduce", "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP")
DISPATCH = ("all-to-all", "EXPERT_MODEL_PARALLEL_GROUP")


def _really(flags: list[str]) -> dict[str, Any]:
    """Train on this rank with the command, and count in two steps.

    The second step routes by expert choice, and the fourth by thresholds.
    """
    from megatron.training import training

    from megatron_ext.planning.dry_run.memory import SavedTensors

    observations: dict[str, Any] = {}
    train_step = training.train_step

    def counted(step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        phase = {1: "expert choice", 3: "thresholds"}.get(kwargs["iteration"])
        if phase is None:
            return train_step(step, data, model, optimizer, *args, **kwargs)
        weights = [p for chunk in model for p in chunk.parameters()]
        saved = Saved(weights) if phase == "expert choice" else SavedTensors(weights)
        with Counted() as mode, saved:
            result = train_step(step, data, model, optimizer, *args, **kwargs)
        observations[phase] = mode.bytes
        if isinstance(saved, Saved):
            observations["saved"] = saved.bytes()
        else:
            observations["peak"] = saved.peak
        observations["owned"] = owned(model, optimizer)
        return result

    training.train_step = counted
    sys.argv = [str(ROOT / "pretrain_et.py"), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return observations


def _predicted(layouts: list[list[str]]) -> list[list[dict[str, Any]]]:
    """Return the results of `--dry-run` for every rank of every layout, in this one process."""
    from megatron.training.training import destroy_global_state

    from megatron_ext.arguments import parse_args
    from megatron_ext.planning.dry_run.simulated_rank import Rank, fake_rank

    dist.destroy_process_group()
    results = []
    for flags in layouts:
        args, config = parse_args([*flags, "--dry-run", str(RANKS)])
        ranks = []
        for number in range(RANKS):
            with contextlib.redirect_stdout(io.StringIO()), fake_rank(args, number):
                rank = Rank(args, config)
                steps = {"expert choice": rank.take_step(False), "thresholds": rank.take_step(True)}
            count = sum(weight.numel() for weight in rank.weights)
            ranks.append({**steps, "held": count, "parameters": rank.parameters})
        destroy_global_state()
        results.append(ranks)
    return results


@pytest.fixture(scope="module")
def predicted() -> dict[str, list[dict[str, Any]]]:
    layouts = [[*SHORT, *flags] for flags in LAYOUTS.values()]
    return dict(zip(LAYOUTS, run_ranks(_predicted, 1, layouts, timeout=200)[0]))


def by_group(step: Any, routing: bool = False) -> Counter[tuple[str, str]]:
    result: Counter[tuple[str, str]] = Counter()
    for key, amount in step.collectives.items():
        if key.purpose.startswith("routing") == routing:
            result[key.operation, key.group] += amount.bytes
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_predicts_what_real_ranks_hold_and_send(
    name: str, predicted: dict[str, list[dict[str, Any]]]
) -> None:
    real = run_ranks(_really, RANKS, [*SHORT, *LAYOUTS[name]], timeout=200)
    for rank, (truth, guess) in enumerate(zip(real, predicted[name])):
        memory = guess["thresholds"].memory
        for kind in ("parameters", "gradients", "optimizer", "gather_buffer"):
            assert getattr(memory, kind) == truth["owned"][kind], (rank, kind)
        assert guess["held"] == truth["owned"]["held"]
        for phase in ("expert choice", "thresholds"):
            counted, expected = Counter(truth[phase]), by_group(guess[phase])
            # How many rounds a search takes, and who takes which token, depends on the data.
            routing, estimate = counted.pop(ROUTING, 0), by_group(guess[phase], routing=True)
            assert estimate.total() / 2 <= routing <= estimate.total() * 2
            counted.pop(DISPATCH, None)
            expected.pop(DISPATCH, None)
            assert counted == expected, (rank, phase)
        assert memory.activations == pytest.approx(truth["peak"], rel=0.1), rank
        if name != "DP4-recomputed":
            # One micro-batch waits at a time; on the first of two stages both of a step do.
            microbatches = 1 if name.startswith("DP4") else 2
            waiting = 2 if name == "PP2-DP2" and rank < 2 else 1
            expected_bytes = truth["saved"] * waiting / microbatches
            assert memory.activations == pytest.approx(expected_bytes, rel=0.1), rank
    # Expert choice gives every expert the same number of tokens of all ranks together.
    volume = sum(ranks["expert choice"][DISPATCH] for ranks in real)
    assert volume == sum(by_group(ranks["expert choice"])[DISPATCH] for ranks in predicted[name])
    assert (volume > 0) == name.startswith("TP2-EP2-DP2")


@pytest.mark.slow
def test_totals_do_not_depend_on_the_layout_and_traffic_follows_from_them(
    predicted: dict[str, list[dict[str, Any]]],
) -> None:
    plain = predicted["DP4-recomputed"][0]
    total = plain["parameters"].total
    for name in ("DP4-sharded", "TP2-EP2-DP2", "TP2-EP2-DP2-muon", "CP2-DP2"):
        assert predicted[name][0]["parameters"] == plain["parameters"]
    stages = predicted["PP2-DP2"]
    assert stages[0]["parameters"].total + stages[2]["parameters"].total == total
    # One fp32 gradient for each parameter of the rank, which includes the vocabulary's padding row.
    group = ("all-reduce", "DATA_PARALLEL_GROUP_WITH_CP")
    reduced = next(
        amount.bytes
        for key, amount in plain["thresholds"].collectives.items()
        if (key.operation, key.group) == group and key.purpose == "gradient reduction"
    )
    assert reduced == 4 * plain["held"]
    assert plain["held"] == total + 2 * 32  # embedding and head, hidden size 32
    # A recomputed layer stores less than a saved one.
    least = plain["thresholds"].memory.activations
    assert least < predicted["DP4-sharded"][0]["thresholds"].memory.activations / 1.5


def _short_and_whole(flags: list[str]) -> list[tuple[Any, Any]]:
    """Return a step of every stage, extrapolated from few micro-batches and run with all."""
    from megatron_ext.arguments import parse_args
    from megatron_ext.planning.dry_run.simulated_rank import Rank, fake_rank

    dist.destroy_process_group()
    args, config = parse_args([*flags, "--dry-run", "2"])
    steps = []
    for number in range(2):
        with contextlib.redirect_stdout(io.StringIO()), fake_rank(args, number):
            rank = Rank(args, config)
            steps.append((rank.take_step(True), rank._run(rank.microbatches, True)))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["1", "2", "interleaved"])
def test_cost_of_many_microbatches_follows_from_few(stages: str) -> None:
    flags = [*SHORT, "--num-layers", "4", "--moe-layer-freq", "2", "--global-batch-size", "32"]
    if stages != "1":
        flags += ["--pipeline-model-parallel-size", "2"]
    if stages == "interleaved":
        flags += ["--num-layers-per-virtual-pipeline-stage", "1"]
    for short, whole in run_ranks(_short_and_whole, 1, flags, timeout=200)[0]:
        assert replace(short.memory, temporary=0) == replace(whole.memory, temporary=0)
        # Each micro-batch leaves its loss, which counts in a model as small as this one.
        peaks = [step.memory.activations + step.memory.temporary for step in (short, whole)]
        assert peaks[0] == pytest.approx(peaks[1], rel=0.1)
        assert short.flops == whole.flops
        assert by_group(short) == by_group(whole)
        searches = [by_group(step, routing=True).total() for step in (short, whole)]
        assert searches[0] == pytest.approx(searches[1], rel=0.5)


def _dry_run(*flags: str) -> dict[str, Any]:
    command = [warm_python(), "pretrain_et.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_d20_on_1024_ranks_in_one_process_writes_nothing(tmp_path: Path) -> None:
    layout = [
        *("--micro-batch-size", "1", *TP2, "--pipeline-model-parallel-size", "2"),
        *("--expert-model-parallel-size", "8", "--expert-tensor-parallel-size", "1"),
    ]
    run_dir = ("--run-dir", str(tmp_path / "run"), "--tokenizer-model", str(tmp_path / "none"))
    recipe = ("--recipe", "examples/recipes/d20.yaml")
    facts = _dry_run(*recipe, "--dry-run", "1024", *layout, *run_dir)
    assert facts["parameters"]["total"] == pytest.approx(2_429e6, abs=0.5e6)
    assert facts["parameters"]["active"] == pytest.approx(561e6, abs=0.5e6)
    assert facts["layout"]["data"] == 256
    assert [stage["rank"] for stage in facts["stages"]] == [0, 512]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_d12_has_the_papers_parameters_and_megatrons_flops() -> None:
    layout = ("--micro-batch-size", "16", "--expert-model-parallel-size", "16")
    facts = _dry_run("--recipe", "examples/recipes/d12.yaml", "--dry-run", "16", *layout)
    parameters = facts["parameters"]
    assert parameters["total"] == pytest.approx(575.0e6, abs=0.05e6)
    assert parameters["active"] == pytest.approx(185.7e6, abs=0.05e6)
    (stage,) = facts["stages"]
    assert stage["parameters"] == parameters["total"] - parameters["experts"] * 15 // 16
    # Six for each parameter of a product, and attention over half of the sequence.
    products = parameters["active"] - parameters["embeddings"] // 2
    attention = 12 * 12 * 768 * 2048 // 2
    assert facts["flops_per_token"]["megatron"] == pytest.approx(
        6 * products + attention, rel=0.002
    )


def _parse_with(flags: list[str], more: Sequence[str]) -> Any:
    from megatron_ext.arguments import parse_args

    return parse_args([*flags, *more])


def _refusals(cases: list[list[str]]) -> list[str]:
    from megatron.training.training import destroy_global_state

    from megatron_ext.arguments import parse_args
    from megatron_ext.errors import UserError
    from megatron_ext.planning.devices import device_of
    from megatron_ext.planning.dry_run import dry_run

    dist.destroy_process_group()
    messages = []
    for flags in cases:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                args, config = parse_args(flags)
                device = device_of(args.device, args.world_size)
                dry_run(args, config, device, partial(_parse_with, flags))
            messages.append("")
        except UserError as error:
            messages.append(str(error))
        with contextlib.suppress(AssertionError):
            destroy_global_state()
    return messages


def test_layouts_that_cannot_work_are_refused_in_one_sentence() -> None:
    no_vocabulary = [flag for flag in TINY if flag not in ("--vocab-size", "127")]
    interleaved = [
        *("--pipeline-model-parallel-size", "2", "--num-layers", "4", "--moe-layer-freq", "2"),
        *("--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "10"),
    ]
    six = ("6", *TP2, "--pipeline-model-parallel-size", "2")
    experts = ("3", "--expert-model-parallel-size", "3")
    cases = {
        "must be at least one rank": [*TINY, "--dry-run", "0"],
        "needs --vocab-size": [*no_vocabulary, "--dry-run", "2", "--tokenizer-model", "none"],
        "6 ranks cannot be distributed": [*TINY, "--dry-run", *six],
        "--num-experts 4 is not divisible": [*TINY, "--dry-run", *experts],
        "--global-batch-size 8 is too small": [*TINY, "--dry-run", "16"],
        "--global-batch-size 10 is not divisible": [*TINY, "--dry-run", "2", *interleaved],
        "--device h10-80gb is not a known card": [*TINY, "--dry-run", "2", "--device", "h10-80gb"],
        "--device requires --dry-run": [*TINY, "--device", "h100"],
        "--device: the layout does not fit": [*TINY, "--dry-run", "2", "--device", "0.001"],
        "is incompatible with biases": [
            *(flag for flag in TINY if flag not in ("--disable-bias-linear", "--squared-relu")),
            *("--dry-run", "2"),
        ],
        "--moe-layer-freq 0 must be": [*TINY, "--dry-run", "2", "--moe-layer-freq", "0"],
        "heads of 15, which is odd": [*TINY, "--dry-run", "2", "--hidden-size", "30"],
        "less than one of the": [*TINY, "--dry-run", "2", "--et-mean-experts", "0.01"],
    }
    messages = run_ranks(_refusals, 1, list(cases.values()))[0]
    for expected, message in zip(cases, messages):
        assert expected in message, (expected, message)
        assert "\n" not in message
