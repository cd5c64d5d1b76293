"""Tests of the recipes of policies: the paper's settings, and layouts that the dry run accepts."""

import contextlib
import io
import json
from typing import Any

import pytest
import yaml

from alignment.judges.kinds.registry import read_judge
from tests.alignment.commands.test_judge_recipes import SHAPES
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


def judges(folder):
    """Write files of local judges that name shapes instead of trained models, one of them twice."""
    flags = []
    for file, name, shape in (
        ("label", "label", "Qwen3-4B"),
        ("reasoning", "reasoning", "Qwen3-8B"),
        ("label", "again", "Qwen3-4B"),
    ):
        judge = yaml.safe_load((EXAMPLES / "policies" / "judges" / f"{file}.yaml").read_text())
        place = folder / f"{name}.yaml"
        place.write_text(yaml.safe_dump({**judge, "model": str(SHAPES / shape)}))
        flags += ["--judge", str(place)]
    return flags


def parameters(shape, tensor):
    """Return the number of parameters of a rank, computed from the shape alone."""
    sizes = json.loads((SHAPES / shape / "config.json").read_text())
    hidden, head = sizes["hidden_size"], sizes["head_dim"]
    width = (2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]) * head
    matrices = hidden * (width + 3 * sizes["intermediate_size"]) // tensor
    block = 128 * tensor  # the vocabulary is padded to a multiple of it
    rows = -(-sizes["vocab_size"] // block) * block // tensor
    tables = rows * hidden * (1 if sizes["tie_word_embeddings"] else 2)
    return sizes["num_hidden_layers"] * (matrices + 2 * hidden + 2 * head) + tables + hidden


def keys_and_values(shape, tensor, rows, length):
    """Return the bytes of the cache in bf16; its length doubles when it is full."""
    sizes = json.loads((SHAPES / shape / "config.json").read_text())
    room = 64
    while room < length:
        room *= 2
    heads = sizes["num_key_value_heads"] // tensor
    return 2 * sizes["num_hidden_layers"] * rows * heads * sizes["head_dim"] * room * 2


def settings(folder):
    """Return the settings of every recipe with every size, and the output of one dry run."""
    import torch.distributed as dist

    from alignment.commands.train_policy import main, parse
    from megatron_ext.typed_flags import flag_values

    dist.destroy_process_group()
    results = [flag_values(parse(words(r, model))) for r in ("base", "kl") for model in POLICIES]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        flags = [*judges(folder), "--algorithm", "ppo"]
        assert main([*words("base", "Qwen3-4B-Instruct-2507"), *flags]) == 0
    return results, json.loads(printed.getvalue().splitlines()[-1])


@pytest.mark.slow
def test_settings_are_the_papers_and_all_that_a_rank_holds_is_counted(tmp_path):
    [(result, facts)] = run_ranks(settings, 1, tmp_path)
    for options in result:
        assert options["lr"] == 1e-6 and options["temperature"] == 0.7
        sizes = [options[name] for name in ("batch_size", "mini_batches", "group_size")]
        assert sizes == [1024, 4, 8]
        assert options["max_new_tokens"] == 2048 == options["seq_length"] - 2048
        assert options["algorithm"] == "grpo" and options["steps"] == 1200
    assert [options["kl"] for options in result] == [0.0] * 3 + [0.01] * 3
    assert facts["parameters"]["total"] / 1e9 == pytest.approx(4.02, abs=0.005)

    [stage], rows = facts["stages"], {name: size for name, [size] in facts["together"].items()}
    start, label, reasoning = 2 * parameters("Qwen3-4B-Instruct-2507", 2), "Qwen3-4B", "Qwen3-8B"
    assert rows["start policy: weights"] == start
    assert rows["judge label, judge again: weights"] == 2 * parameters(label, 2)
    assert rows["judge reasoning: weights"] == 2 * parameters(reasoning, 2)
    own = keys_and_values("Qwen3-4B-Instruct-2507", 2, 64, 4096)
    thinking = keys_and_values(reasoning, 2, 8, 12288)
    assert rows["or keys and values, policy"] == own
    assert rows["or keys and values, judge reasoning"] == thinking
    memory = stage["memory"]
    lasting = sum(memory[name] for name in ("parameters", "gradients", "optimizer"))
    weights = start + 2 * parameters(label, 2) + 2 * parameters(reasoning, 2)
    step = sum(memory.values()) - lasting
    assert rows["critic: weights, gradients, optimizer"] == lasting
    assert rows["together at most"] == 2 * lasting + weights + max(step, own, thinking)


def test_the_files_of_judges_are_read():
    specs: dict[str, Any] = {
        file.stem: read_judge(str(file))
        for file in (EXAMPLES / "policies" / "judges").glob("*.yaml")
    }
    assert {name: spec.summary()["kind"] for name, spec in specs.items()} == {
        "label": "label", "reasoning": "thinking", "gold": "http",
    }  # fmt: skip
    assert (specs["reasoning"].top_k, specs["gold"].temperature) == (20, 0.0)
