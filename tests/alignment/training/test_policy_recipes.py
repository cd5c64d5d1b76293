"""Recipes of policies: the paper's settings, and layouts that the parser and the dry run know."""

import contextlib
import io
import json

import pytest

from alignment.policies.judges import JudgeSpec
from tests.alignment.training.test_judge_recipes import SHAPES
from tests.distributed import ROOT, run_ranks

EXAMPLES = ROOT / "examples" / "alignment"
POLICIES = {
    "Llama-3.1-8B": "llama-3.1-8b",
    "Qwen2.5-7B": "qwen2.5-7b",
    "Qwen3-4B-Instruct-2507": "qwen3-4b-instruct-2507",
}


def words(recipe, model):
    files = [EXAMPLES / "policies" / f"{recipe}.yaml"]
    files += [EXAMPLES / "judges" / "sizes" / f"{POLICIES[model]}.yaml"]
    recipes = [word for file in files for word in ("--recipe", str(file))]
    return [*recipes, "--model", str(SHAPES / model), "--run-dir", "none", "--dry-run", "8"]


def settings():
    """Of every recipe with every size; and what the dry run of one of them tells."""
    import torch.distributed as dist

    from alignment.policies.train import main, parse

    dist.destroy_process_group()
    found = [vars(parse(words(r, model))) for r in ("base", "kl") for model in POLICIES]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words("base", "Qwen3-4B-Instruct-2507")) == 0
    return found, json.loads(printed.getvalue().splitlines()[-1])


@pytest.mark.slow
def test_settings_are_the_papers():
    [(found, facts)] = run_ranks(settings, 1)
    for options in found:
        assert options["lr"] == 1e-6 and options["temperature"] == 0.7
        sizes = [options[name] for name in ("batch_size", "mini_batches", "group_size")]
        assert sizes == [1024, 4, 8]
        assert options["max_new_tokens"] == 2048 == options["seq_length"] - 2048
        assert options["algorithm"] == "grpo" and options["steps"] == 1200
    assert [options["kl"] for options in found] == [0.0] * 3 + [0.01] * 3
    assert facts["parameters"]["total"] / 1e9 == pytest.approx(4.02, abs=0.005)


def test_the_files_of_judges_are_read():
    specs = {
        file.stem: JudgeSpec.read(str(file))
        for file in (EXAMPLES / "policies" / "judges").glob("*.yaml")
    }
    assert {name: spec.told()["kind"] for name, spec in specs.items()} == {
        "label": "label", "reasoning": "thinking", "gold": "http",
    }  # fmt: skip
    assert (specs["reasoning"].top_k, specs["gold"].temperature) == (20, 0.0)
