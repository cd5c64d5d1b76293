"""Tests of tools.convert_checkpoint: output, refusals and memory."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import UserError
from tests.distributed import ROOT, SINGLE_THREADED, run_ranks
from tests.hf.models import add_tokenizer, make
from tests.inference.checkpoint import run_dir  # noqa: F401
from tests.warm import warm_python
from tools import convert_checkpoint


def tool(*flags):
    return subprocess.run(
        [warm_python(), "-m", "tools.convert_checkpoint", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED},
        capture_output=True,
        text=True,
        timeout=240,
    )


def convert(source, target, load, save):
    flags = ["--from", source, "--to", target, "--load", str(load), "--save", str(save)]
    convert_checkpoint.main(flags)


def refusals(cases):
    """Return, on a rank, the error message of each conversion."""
    messages = []
    for case in cases:
        with pytest.raises(UserError) as refused:
            convert(*case)
        messages.append(str(refused.value))
    return messages


@pytest.mark.slow
def test_converter_reports_the_output_and_the_difference(run_dir, tmp_path):  # noqa: F811
    hf, back = tmp_path / "new" / "hf", tmp_path / "new" / "back"
    there = ("--from", "megatron", "--to", "hf", "--load", run_dir, "--save", hf)
    again = ("--from", "hf", "--to", "megatron", "--load", hf, "--save", back)
    for flags, target in ((there, hf), (again, back)):
        done = tool(*flags, "--verify")
        named = [] if target == back else [f"model: {run_dir / 'checkpoints' / 'iter_0000040'}"]
        assert done.returncode == 0
        assert [line.partition(" (")[0] for line in done.stderr.splitlines()] == named
        wrote, difference, *further = done.stdout.splitlines()
        assert bool(further) == (target == back) == (target / "recipe.yaml").is_file()
        assert wrote == f"wrote {target}"
        share = re.fullmatch(
            r"largest difference of logits: (\S+) of the largest logit", difference
        )
        assert share is not None and 0 <= float(share[1]) < 5e-5
    assert sorted(f.name for f in hf.parent.iterdir()) == ["back", "hf"]


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    """Let `change` edit the tensors of a folder and save them as a single file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lose_a_file(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_file(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])


def reshape(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][1:].clone()


HF = {
    "config.json": lambda f: (f / "config.json").unlink(),
    "types are llama, qwen2, qwen3, mixtral, qwen3_moe, expert_threshold": lambda f: change_config(
        f, model_type="gpt2"
    ),
    "config.json is damaged": lambda f: (f / "config.json").write_text("{"),
    "missing or damaged": lose_a_file,
    "is missing or damaged (": cut_a_file,
    "no tensor model.norm.weight": lambda f: change_tensors(
        f, lambda tensors: tensors.pop("model.norm.weight")
    ),
    "a tensor model.extra": lambda f: change_tensors(
        f, lambda tensors: tensors.update({"model.extra": torch.ones(1)})
    ),
    "model.layers.1.mlp.up_proj.weight has shape (95, 64) where (96, 64)": lambda f: change_tensors(
        f, reshape
    ),
    "attention_bias = True": lambda f: change_config(f, attention_bias=True),
    "hidden_act = gelu": lambda f: change_config(f, hidden_act="gelu"),
    "rope_type yarn": lambda f: change_config(
        f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    ),
    "low_freq_factor = 2.0": lambda f: change_config(
        f,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 2.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "has 600 entries, the model 500": lambda f: add_tokenizer(f, 600),
    "lm_head.weight is not model.embed_tokens.weight": lambda f: change_tensors(
        f, lambda tensors: tensors.update({"lm_head.weight": torch.ones(500, 64)})
    ),
    "a value in model.norm.weight that is not finite": lambda f: change_tensors(
        f, lambda tensors: tensors["model.norm.weight"][3:4].fill_(float("nan"))
    ),
    "neither model.safetensors.index.json": lambda f: [
        file.unlink() for file in f.glob("model*.safetensors*")
    ],
}


def test_converter_refuses_a_broken_hugging_face_folder_and_writes_nothing(tmp_path):
    make("llama-tied", tmp_path / "good")
    cases = []
    for number, damage in enumerate(HF.values()):
        folder = tmp_path / f"bad{number}"
        shutil.copytree(tmp_path / "good", folder)
        damage(folder)
        cases.append(("hf", "megatron", folder, tmp_path / "saved" / str(number)))
    [messages] = run_ranks(refusals, 1, cases)
    for expected, message in zip(HF, messages):
        assert expected in message
    assert not list((tmp_path / "saved").iterdir())


def test_converter_refuses_a_broken_checkpoint_and_writes_nothing(run_dir, tmp_path):  # noqa: F811
    half = shutil.copytree(run_dir / "checkpoints", tmp_path / "half")
    [data] = half.glob("iter_*/*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    unfinished = shutil.copytree(run_dir / "checkpoints", tmp_path / "unfinished")
    next(unfinished.glob("iter_*/integrity.json")).unlink()
    saved = tmp_path / "saved" / "hf"
    cases = [("megatron", "hf", folder, saved) for folder in (half, unfinished)]
    [messages] = run_ranks(refusals, 1, cases)
    assert "differs from what was saved" in messages[0]
    assert "has no integrity.json" in messages[1]
    assert not list(saved.parent.iterdir())


def test_converter_refuses_wrong_paths_before_loading(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, target in (("megatron", "hf"), ("hf", "hf"), ("hf", "megatron")):
        with pytest.raises(UserError):
            convert(source, target, tmp_path / "nowhere", tmp_path / "save")
    with pytest.raises(UserError, match="has no checkpoint"):
        convert("megatron", "hf", tmp_path / "empty", tmp_path / "save")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="already exists"):
        convert("hf", "megatron", tmp_path / "empty", tmp_path / "full")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "full"]


def test_converter_refusal_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ["--load", tmp_path / "empty", "--save", tmp_path / "out"]
    done = tool("--from", "hf", "--to", "megatron", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("convert_checkpoint: ") and done.stderr.count("\n") == 1
    assert "no config.json" in done.stderr and not (tmp_path / "out").exists()
