"""Tests of the recipes of judges: the paper's settings, and layouts that fit real models."""

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment.commands.train_sft_config import parse as parse_sft
from megatron_ext.planning.dry_run.dry_run_report import STEP_ALONE
from megatron_ext.typed_flags import flag_values
from tests.distributed import ROOT, run_ranks
from tests.inference.checkpoint import run_dir  # noqa: F401

RECIPES = ROOT / "examples" / "alignment" / "judges"
SHAPES = ROOT / "examples" / "alignment" / "shapes"
SIZES = sorted(file.stem for file in (RECIPES / "sizes").glob("*.yaml"))
# From the models' cards; both of the 4 B models have the same shape.
BILLIONS = {
    "Qwen3-1.7B": 1.72, "Qwen3-4B": 4.02, "Qwen3-8B": 8.19, "Qwen3-14B": 14.77,
    "Qwen3-4B-Instruct-2507": 4.02, "Llama-3.1-8B": 8.03, "Qwen2.5-7B": 7.62,
}  # fmt: skip
GPU, RESERVED = 80e9, 8e9  # bytes of a GPU, and those for CUDA, NCCL and fragmentation


def shape_of(size: str) -> str:
    return next(name for name in BILLIONS if name.lower() == size)


def words(*recipes: str, model: str = "Qwen3-8B") -> list[str]:
    """Return a command line with these recipes."""
    files = [word for name in recipes for word in ("--recipe", str(RECIPES / f"{name}.yaml"))]
    return [*files, "--model", str(SHAPES / model), "--run-dir", "none"]


def dry_runs(cases: list[list[str]]) -> list[dict[str, Any]]:
    """Return the output of several dry runs, one after the other in this process."""
    import torch.distributed as dist
    from megatron.training.training import destroy_global_state

    from alignment.commands.train_judge import main

    dist.destroy_process_group()
    results = []
    for case in cases:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main([*case, "--dry-run", "8"]) == 0
        destroy_global_state()
        lines = printed.getvalue().splitlines()
        totals = [line for line in lines if line.startswith("While it answers")]
        mebibytes = (
            int(totals[0].split("up to ")[1].split(" MiB")[0].replace(",", "")) if totals else 0
        )
        results.append({**json.loads(lines[-1]), "cache": mebibytes * 2**20})
    return results


@pytest.mark.slow
def test_dry_run_takes_the_model_of_a_run_of_either_kind(
    run_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    final = tmp_path / "run/final"
    final.mkdir(parents=True)
    shutil.copy(SHAPES / "Qwen3-1.7B/config.json", final)
    models = [str(SHAPES / "Qwen3-1.7B"), str(tmp_path / "run"), str(run_dir)]
    cases = [words("base", model=model) for model in models]
    cases[-1] += ["--seq-length", "64"]  # the longest context of the model
    shape, run, checkpoint = run_ranks(dry_runs, 1, cases)[0]
    assert run["parameters"] == shape["parameters"] and run["stages"] == shape["stages"]
    # Two layers of eight experts, each of which has two matrices of 64 x 64.
    assert checkpoint["parameters"]["experts"] == 2 * 8 * 2 * 64 * 64


@pytest.mark.slow
def test_models_have_their_published_sizes_and_fit_their_ranks() -> None:
    """The memory is the largest of all kinds of training that a recipe of a size is for."""
    # The largest judge only returns labels; for policies only the layouts are used.
    kinds = {size: "base" if size == "qwen3-14b" else "rl" for size in SIZES}
    cases = [words(kind, f"sizes/{size}", model=shape_of(size)) for size, kind in kinds.items()]
    figures = dict(zip(kinds, run_ranks(dry_runs, 1, cases, timeout=200)[0]))
    assert {shape_of(size) for size in SIZES} == BILLIONS.keys()
    for size, facts in figures.items():
        billions = BILLIONS[shape_of(size)]
        assert facts["parameters"]["total"] / 1e9 == pytest.approx(billions, abs=0.005), size
        layout = facts["layout"]
        assert layout["tensor"] * layout["pipeline"] * layout["data"] == 8
        assert bool(facts["cache"]) == (kinds[size] == "rl")
        for stage in facts["stages"]:
            memory = stage["memory"]
            step = sum(memory[name] for name in STEP_ALONE)
            most = sum(memory.values()) - step + max(step, facts["cache"])
            assert most < GPU - RESERVED, (size, most)


def test_settings_are_the_papers() -> None:
    from alignment.commands.judge_config import parse as parse_judge
    from alignment.commands.train_judge_config import parse

    both = {"lr_warmup_fraction": 0.03}
    sft = {**both, "stage": "sft", "lr": 1e-5, "batch_size": 128}
    rl = {
        **both, "stage": "rl", "algorithm": "grpo", "lr": 1e-6, "batch_size": 2048,
        "mini_batches": 4, "group_size": 8, "temperature": 1.0, "steps": 200,
        "thinking": "asked", "seq_length": 8192, "max_new_tokens": 4096,
    }  # fmt: skip
    expected: dict[tuple[str, ...], dict[str, Any]] = {
        ("base",): {**sft, "thinking": "none", "epochs": 2, "seq_length": 4096},
        ("reasoning",): {
            **sft, "thinking": "asked", "epochs": 3, "seq_length": 8192, "max_new_tokens": 4096,
        },
        ("rl",): rl,
        ("rl-only",): rl,
        ("base", "pairwise"): {"template": "pairwise", "seq_length": 8192, "thinking": "none"},
        ("reasoning", "pairwise"): {"template": "pairwise", "thinking": "asked"},
        ("base", "rubric"): {"template": "pointwise-rubric", "seq_length": 4096},
        ("rl", "pairwise-rubric"): {"template": "pairwise-rubric", "stage": "rl"},
        ("reasoning", "effort/low"): {"max_thinking_tokens": 512, "epochs": 3},
        ("reasoning", "effort/medium"): {"max_thinking_tokens": 1024},
        ("reasoning", "effort/high"): {"max_thinking_tokens": 4096},
    }  # fmt: skip
    for recipes, settings in expected.items():
        options = flag_values(parse([*words(*recipes, "sizes/qwen3-8b"), "--dry-run", "8"]))
        assert settings == {name: options[name] for name in settings}, recipes
        assert options["megatron_flags"].startswith("--recompute")
    for size in SIZES:  # a trained judge judges on the same layout
        file = str(RECIPES / "sizes" / f"{size}.yaml")
        files = ["--input", "a.jsonl", "--output", "b.jsonl"]
        judging = parse_judge(["--recipe", file, "--model", str(SHAPES / shape_of(size)), *files])
        assert judging.engine.dtype == "bf16"
        assert judging.answers.generation_batch_size >= 32
    tried = {name for recipes in expected for name in recipes} | {f"sizes/{s}" for s in SIZES}
    there = {str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")}
    assert there == tried
    page = (ROOT / "docs/how-to/training-judges.md").read_text()
    assert [name for name in there if f"`{name}.yaml`" not in page] == []


@pytest.mark.parametrize("tensor", [1, 2])
def test_reported_cache_size_is_that_of_the_growing_cache(tensor: int) -> None:
    from alignment.commands.training_dry_run import cache_bytes
    from alignment.engines.megatron_launch import MegatronLayout
    from megatron_ext.hf.configs import load_config
    from megatron_ext.hf.families import read_config
    from megatron_ext.inference.cache import RaggedCache, TokenChunk

    model = read_config(load_config(SHAPES / "Qwen3-1.7B"))
    rows, length = 3, 100
    cache = RaggedCache(rows, model.max_length)
    heads = model.kv_heads // tensor
    chunks = [TokenChunk(line, 0, range(length)) for line in range(rows)]
    cache.lay_out(chunks, torch.device("cpu"))
    tokens = torch.zeros(rows * length, heads, model.head_dim, dtype=torch.bfloat16)
    for layer in range(model.layers):
        cache.attend(layer, tokens, tokens, tokens, None)
    size = sum(tensor.nbytes for pair in cache._memory.values() for tensor in pair)
    layout = MegatronLayout(tensor=tensor)
    assert cache_bytes(model, layout, rows, length, torch.bfloat16) == size


@pytest.mark.parametrize(
    "script",
    sorted((ROOT / "examples" / "alignment").glob("*/*.s*")),
    ids=lambda path: path.name,
)
def test_scripts_are_bash(script: Path) -> None:
    assert script.suffix in (".sh", ".sbatch")
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("size", sorted((RECIPES / "sizes").glob("*.yaml")), ids=lambda f: f.stem)
def test_recipes_of_sizes_serve_supervised_training_of_base_models(size: Path) -> None:
    model = str(SHAPES / "Qwen3-8B")
    argv = ["--recipe", str(size), "--model", model, "--run-dir", "run", "--input", "rows.jsonl"]
    options = parse_sft(argv).engine
    layout = yaml.safe_load(size.read_text())
    assert options.tensor_model_parallel_size == layout["tensor_model_parallel_size"]
    assert options.megatron_flags == layout["megatron_flags"]
