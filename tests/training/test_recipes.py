"""Tests that every recipe trains, and that the paper's models have their parameters."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import ROOT, run_ranks

RECIPES = ROOT / "examples" / "recipes"
MINIATURE_ONLY = "et-hybrid"  # it has a pattern of 4 layers
ROUTERS = sorted({path.stem for path in (RECIPES / "routers").glob("*.yaml")} - {MINIATURE_ONLY})
# Number of data-parallel ranks that a recipe states.
RANKS = {"d12": 16, "d20": 8, "modern": 64, "quickstart": 2}
MINIATURES = [("miniature",), ("miniature", MINIATURE_ONLY)]
POOL_RANKS = {"ec-2k": 1, "ec-8k": 4, "ec-64k": 8, "ec-256k": 8, "ec-512k": 16}
RUNS = [
    *((name,) for name in RANKS),
    *(("d12", router) for router in ROUTERS),
    ("d20", "ec-256k"),
    ("d20", "dense"),
]
COUNTED = [("d12",), ("d12", "dense"), ("d20",), ("d20", "dense"), ("modern",), *MINIATURES]
Run = tuple[str, ...]


def _read(runs: list[Run]) -> dict[Run, dict[str, Any]]:
    """Return the arguments of every run as the trainer has them, some with parameter counts."""
    from megatron.training.training import destroy_global_state

    from megatron_ext.arguments import parse_args
    from megatron_ext.training.input_checks import check_pools

    dist.destroy_process_group()
    result: dict[Run, dict[str, Any]] = {}
    for run in runs:
        optimizer = ["optimizers/adamw.yaml"] if run in MINIATURES else []
        files = [f"{run[0]}.yaml", *optimizer, *(f"routers/{name}.yaml" for name in run[1:])]
        flags = [word for file in files for word in ("--recipe", str(RECIPES / file))]
        ranks = POOL_RANKS.get(run[-1], RANKS.get(run[0], 1))
        args, config = parse_args([*flags, "--vocab-size", "65536", "--dry-run", str(ranks)])
        if config.uses_thresholds:
            check_pools(args, config)
        result[run] = dict(vars(args), thresholds=config.uses_thresholds)
        if run in COUNTED:
            result[run]["total"], result[run]["active"] = _count(args, config)
        destroy_global_state()
    return {run: {k: v for k, v in a.items() if _plain(v)} for run, a in result.items()}


def _count(args: Any, config: Any) -> tuple[int, int]:
    """Return the numbers of parameters and of active ones, of a model built on one of its ranks."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.model.language_model import language_model_config
    from megatron_ext.planning.dry_run.fakes import expert_rate
    from megatron_ext.planning.dry_run.parameters import count_parameters
    from megatron_ext.planning.dry_run.simulated_rank import fake_rank

    with contextlib.redirect_stdout(io.StringIO()), fake_rank(args, 0), torch.device("meta"):
        model_config = language_model_config(args, config)
        model = model_config.get_builder_cls()(model_config).build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        parameters = count_parameters(model, args)
    return parameters.total, parameters.active(expert_rate(config))


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | None)


@pytest.fixture(scope="module")
def read() -> dict[Run, dict[str, Any]]:
    return run_ranks(_read, 1, RUNS, timeout=200)[0]


@pytest.mark.slow
def test_recipe_parameter_counts_equal_the_paper(read: dict[Run, dict[str, Any]]) -> None:
    expected = {
        ("d12",): (575.0e6, 185.7e6),
        ("d12", "dense"): (185.6e6, 185.6e6),
        ("d20",): (2_429e6, 561e6),
        ("d20", "dense"): (561e6, 561e6),
        ("modern",): (6.8e9, 1.3e9),
    }
    for run, (total, active) in expected.items():
        assert read[run]["total"] == pytest.approx(total, rel=1e-2 if run[0] == "modern" else 1e-3)
        assert read[run]["active"] == pytest.approx(
            active, rel=5e-2 if run[0] == "modern" else 1e-3
        )


@pytest.mark.slow
def test_hybrid_miniature_has_the_parameters_of_the_miniature_up_to_its_convolutions() -> None:
    [read] = run_ranks(_read, 1, MINIATURES)
    with_attention, hybrid = (read[run] for run in MINIATURES)
    assert (hybrid["num_layers"], hybrid["moe_layer_freq"]) == (4, [0, 1, 1, 1])
    assert hybrid["linear_attention_freq"] == [1, 1, 1, 0]
    # For each of 3 layers: gates of 4 heads twice, 256 channels of length 4, 2 numbers a head.
    more = 3 * (2 * 4 * 128 + 256 * 4 + 2 * 4)
    for name in ("total", "active"):
        assert hybrid[name] - with_attention[name] == more, name


@pytest.mark.slow
def test_recipe_has_the_settings_of_its_name(read: dict[Run, dict[str, Any]]) -> None:
    cold = {"et-cold", "et-adaptive-cold"}
    token_choice = {"token-choice", "token-choice-aux", "token-choice-aux-strong"}
    token_choice |= {"token-choice-loss-free", "token-choice-quantile"}
    unshared = {"et-no-shared", "ec-no-shared"}
    assert {*ROUTERS} == {*POOL_RANKS, "dense", *cold, "et-adaptive", *token_choice, *unshared}
    for run, args in read.items():
        size, router = run[0], run[-1]
        assert args["thresholds"] == (not router.startswith(("dense", "token"))), run
        assert args["optimizer"] == ("adam" if size == "quickstart" else "muon"), run
        if router in POOL_RANKS:
            assert args["router_type"] == "expert-choice"
            pool = args["micro_batch_size"] * args["data_parallel_size"] * args["seq_length"]
            assert pool == 1024 * int(router[3:-1]), run
            assert (
                f"pools of {pool:,} tokens" in (RECIPES / "routers" / f"{router}.yaml").read_text()
            )
        if len(run) > 1:
            changed = {k for k, v in args.items() if v != read[(size,)][k]}
            assert changed, run
    for size in ("d12", "d20"):
        args = read[size,]
        assert args["et_warmup_iters"] == 4000
        assert args["global_batch_size"] * args["seq_length"] == 524_288
        assert args["lr_wsd_decay_iters"] == round(args["train_iters"] / 5)
    for router in ROUTERS:
        args = read["d12", router]
        assert args["et_warmup_iters"] == (0 if router in cold else 4000)
        adaptive = args["et_threshold_estimator"] == "adaptive"
        assert adaptive == router.startswith("et-adaptive")
    names = ("load_balancing_type", "enable_expert_bias")
    balance = {
        router: (
            *(read["d12", router][f"moe_router_{name}"] for name in names),
            read["d12", router]["moe_aux_loss_coeff"],
        )
        for router in token_choice
    }
    assert balance == {
        "token-choice": ("none", False, 0.0),
        "token-choice-aux": ("aux_loss", False, 1e-3),
        "token-choice-aux-strong": ("aux_loss", False, 1e-2),
        "token-choice-loss-free": ("none", True, 0.0),
        "token-choice-quantile": ("quantile_balancing", False, 0.0),
    }
    for router in unshared:
        args = read["d12", router]
        assert args["moe_shared_expert_intermediate_size"] is None
        assert args["moe_router_topk"] == read["d12",]["moe_router_topk"] + 1 == 2
        kind = "expert-choice" if router == "ec-no-shared" else "expert-threshold"
        assert args["router_type"] == kind


def test_the_documentation_names_every_recipe() -> None:
    page = (ROOT / "docs/how-to/pretraining.md").read_text()
    named = set(re.findall(r"`([\w/-]+\.yaml)`", page))
    there = {str(path.relative_to(RECIPES)) for path in Path(RECIPES).rglob("*.yaml")}
    assert there <= named
