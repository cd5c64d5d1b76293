"""Tests of settings that must match when a run resumes, and of fingerprints of models."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment.commands.train_judge_config import TrainJudgeConfig
from alignment.commands.train_policy_config import TrainPolicyConfig
from alignment.commands.train_sft_config import TrainSFTConfig
from alignment.training.run_settings import lasting_settings
from megatron_ext.model_location import model_content
from megatron_ext.typed_flags import flag, flags_of, may_change, must_match

# Where and how fast a training runs, and what it reports.
MAY_CHANGE = {
    "recipe",
    "run_dir",
    "dry_run",
    "device",
    "save_interval",
    "log_interval",
    "wandb_project",
    "wandb_exp_name",
    "mlflow_experiment",
    "mlflow_tracking_uri",
    "generation_batch_size",
    "micro_batch_size",
    "dtype",
    "megatron_flags",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "use_distributed_optimizer",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
    "max_left_out",
    "keep_responses",
    "monitor_limits",
    "routing_interval",
    "routing_samples",
    "rollout_url",
    "rollout_model",
    "weight_transfer",
}


@pytest.mark.parametrize("config", [TrainSFTConfig, TrainJudgeConfig, TrainPolicyConfig])
def test_every_flag_of_a_training_command_has_its_resume_mark(config: type) -> None:
    marks = {each.name: each.resume for each in flags_of(config)}
    assert None not in marks.values(), "declare the field by must_match or may_change"
    changing = {name for name, mark in marks.items() if mark == "may change"}
    assert changing == marks.keys() & MAY_CHANGE


def test_resume_marks_allow_only_layout_and_precision_to_change() -> None:
    @dataclass
    class Config:
        lr: float = must_match(1e-5)
        dtype: str = may_change("bf16")
        tensor_model_parallel_size: int = may_change(2)
        unmarked: int = flag(1)

    assert lasting_settings(Config()) == {"lr": 1e-5, "unmarked": 1}


def make(folder: Path, seed: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = torch.randn(400, 1000, generator=torch.Generator().manual_seed(seed))
    save_file({"weight": weights}, folder / "model.safetensors")
    return folder


def test_model_fingerprint_depends_on_content_and_not_on_path(tmp_path: Path) -> None:
    first = make(tmp_path / "first", 1)
    moved = shutil.copytree(first, tmp_path / "moved", copy_function=shutil.copyfile)
    assert model_content(first) == model_content(moved)
    assert model_content(make(tmp_path / "other weights", 2)) != model_content(first)
    (moved / "config.json").write_text('{"rms_norm_eps": 0.1}')
    assert model_content(moved) != model_content(first)


def test_model_fingerprint_of_a_folder_without_a_model_is_empty(tmp_path: Path) -> None:
    assert model_content(tmp_path) == ""

    @dataclass
    class Config:
        model: str
        critic: str | None = None

    assert lasting_settings(Config(str(tmp_path)))["model_content"] == ""
