"""Reading and writing of transformers configurations."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture
from megatron_ext.hf.end_tokens import GENERATION_CONFIG
from megatron_ext.hf.families import OWN, Family, family_named, write_config
from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig

_REMOTE = Path(__file__).with_name("remote")


def save_config(
    folder: Path,
    model: Architecture,
    family: Family,
    dtype: torch.dtype,
    special: dict[str, Any],
) -> None:
    """Write the configuration of a model, its code if it is ours, and that of generation.

    Args:
        folder: An existing folder.
        model: Architecture of the model.
        family: Family to which the model is converted.
        dtype: Data type of the weights.
        special: Ids of special tokens by their names in the configuration; a list if there are
            several end tokens.
    """
    entries = write_config(model, family) | {"bos_token_id": None, "eos_token_id": None} | special
    entries["dtype"] = dtype
    if family is OWN:
        for name in ("configuration_et.py", "modeling_et.py"):
            shutil.copy(_REMOTE / name, folder)
        config: Any = ExpertThresholdConfig(**entries)
        config.architectures = ["ExpertThresholdForCausalLM"]
        config.auto_map = {
            "AutoConfig": "configuration_et.ExpertThresholdConfig",
            "AutoModel": "modeling_et.ExpertThresholdModel",
            "AutoModelForCausalLM": "modeling_et.ExpertThresholdForCausalLM",
        }
    else:
        config = CONFIG_MAPPING[family.name](**entries)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.name]]
    config.save_pretrained(folder)
    if not (folder / GENERATION_CONFIG).is_file():
        GenerationConfig(**special).save_pretrained(folder)


def load_config(source: Path) -> Any:
    """Return the configuration of a Hugging Face folder.

    Raises:
        UserError: The configuration is missing or damaged, its family is not supported, or the
            folder contains an adapter or quantized tensors.
    """
    if (source / "adapter_config.json").is_file():
        raise UserError(
            f"{source} contains an adapter (adapter_config.json). Merge it into its base model "
            "with merge_and_unload of peft and convert the saved result."
        )
    file = source / "config.json"
    try:
        entries = json.loads(file.read_text())
        model_type = entries["model_type"]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}. Give a complete Hugging Face folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged. Copy it again.") from error
    family = family_named(model_type)
    if quantization := entries.get("quantization_config") or entries.get("compression_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"{source} is quantized ({method or 'quantization_config'} in config.json). Convert "
            "the original model, or save this one dequantized."
        )
    kind = ExpertThresholdConfig if family is OWN else CONFIG_MAPPING[family.name]
    try:
        return kind.from_pretrained(source)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(
            f"{file} is not a valid configuration of type {model_type}: {error}. Correct the entry "
            "or copy the file again."
        ) from error
