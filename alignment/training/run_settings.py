"""Which flags of a training command a run keeps when it is resumed, and what is in its models."""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from megatron_ext.checkpoint import find_checkpoint
from megatron_ext.errors import UserError

Mark = Literal["same", "free"]


def _marked(mark: Mark, names: str) -> dict[str, Mark]:
    return dict.fromkeys(names.split(), mark)


MARKS: dict[str, Mark] = {
    # What is learned, from what, and by which model.
    **_marked(
        "same",
        """
        model critic chat_template chat_template_kwargs seed engine
        input validation_input prompts held_out gold gold_scale second_gold validation_gold judge
        stage template thinking reward reference
        epochs steps batch_size mini_batches group_size seq_length eval_interval
        lr lr_warmup_fraction weight_decay clip_grad adam_beta1 adam_beta2
        algorithm kl kl_estimator overlong_margin max_unrewarded
        critic_lr critic_warmup value_clip gae_lambda gae_discount whitening
        rollouts_ahead rollout_bound rollout_rule
        max_new_tokens max_thinking_tokens temperature top_k top_p
        judging_temperature judging_top_k judging_top_p
        alarm_gap alarm_window stop_on_alarm
        """,
    ),
    # Where and how fast it runs, and what it reports.
    **_marked(
        "free",
        """
        recipe run_dir dry_run save_interval rows micro_batch_size dtype megatron_flags
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        expert_model_parallel_size expert_tensor_parallel_size
        use_distributed_optimizer zero_stage offload_optimizer offload_parameters
        max_left_out keep_responses monitor_limits routing_interval routing_samples
        rollout_url rollout_model
        """,
    ),
}
"""By the flag's name in the parser. A name without a mark counts as "same", and
`tests/alignment/training/test_run_settings.py` fails for it."""

# Files of a model's folder, apart from its weights, by which it reads or answers differently.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
_WEIGHTS = (".safetensors", ".distcp", ".bin")
_SAMPLES, _SAMPLE_BYTES = 16, 16384


def lasting_settings(options: Namespace) -> dict[str, Any]:
    """Return the settings that a run must have again when it is resumed, as plain data.

    A template or chat template in a file counts by its text. A model's folder counts by its path
    and by its content.
    """
    settings = {
        name: value for name, value in vars(options).items() if MARKS.get(name, "same") == "same"
    }
    for name in ("template", "chat_template"):
        if settings.get(name) and (file := Path(settings[name])).is_file():
            settings[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("model", "critic"):
        if settings.get(name) and Path(settings[name]).is_dir():
            settings[f"{name}_content"] = model_content(Path(settings[name]))
    return settings


def model_content(path: Path) -> str:
    """Return a fingerprint of a model that takes milliseconds, whatever the model's size.

    It covers settings and tokenizer, and of each file of weights the size and sixteen pieces of
    16 KiB evenly spread. Training changes all of a model's weights, so that other weights of the
    same shape differ in these pieces. A copy of the folder has the same fingerprint.

    Args:
        path: a Hugging Face folder, a run directory, or a folder of checkpoints.
    """
    digest = hashlib.sha256()
    folder = path
    if not (path / "config.json").is_file():
        try:
            folder = find_checkpoint(path)
        except UserError:  # loading the model says what is wrong with it
            return ""
    for name in _SETTINGS:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for number in range(_SAMPLES):
                    stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
