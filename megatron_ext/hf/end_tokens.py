"""End tokens of a model: the tokens after which generation of a text stops.

A chat model has several, and only generation_config.json names all of them: `<|eot_id|>` ends a
turn, `<|end_of_text|>` a document. The file therefore stays with the tokenizer: in its folder, or
next to its file. The end tokens of a model are those of the file and the tokenizer's own, which is
where vLLM stops too.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

GENERATION_CONFIG = "generation_config.json"
_CONFIG = "config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the ids of a model's end tokens.

    Args:
        tokenizer: A tokenizer of Megatron or of transformers. Without `record_end_tokens`, its own
            end token is the only one.
    """
    recorded = getattr(tokenizer, "end_tokens", None)
    return _own_end(tokenizer) if recorded is None else recorded


def record_end_tokens(tokenizer: Any, place: Path | str | None) -> None:
    """Attach a model's end tokens to its tokenizer, for `end_tokens`.

    Args:
        tokenizer: A tokenizer of Megatron or of transformers.
        place: Hugging Face folder, or folder or file of a tokenizer.

    Raises:
        UserError: The generation configuration is damaged or contains an invalid id.
    """
    configured = frozenset(_as_list(special_ids(place).get("eos_token_id")))
    # The last id of a tokenizer without text is an end token only if no other is configured.
    without_text = configured and getattr(tokenizer, "library", None) == "null-text"
    tokenizer.end_tokens = configured if without_text else configured | _own_end(tokenizer)


def special_ids(place: Path | str | None) -> dict[str, Any]:
    """Return the ids of special tokens in a generation configuration.

    Args:
        place: Hugging Face folder, or folder or file of a tokenizer.

    Returns:
        `bos_token_id`, `eos_token_id` (an id or a list of ids) and `pad_token_id`, as far as they
        are set. As in transformers, config.json is used if generation_config.json does not exist.

    Raises:
        UserError: The file is damaged or contains an invalid id.
    """
    if place is None:
        return {}
    folder = _folder(place)
    for file in (folder / GENERATION_CONFIG, folder / _CONFIG):
        if file.is_file():
            return _read_ids(file)
    return {}


def carry_generation_config(
    source: Path | str | None, target: Path, same_model: bool = False
) -> None:
    """Copy a generation configuration along with its tokenizer.

    Args:
        source: Hugging Face folder, or folder or file of a tokenizer, to copy from.
        target: Folder or file of the copied tokenizer.
        same_model: Whether the file of a Hugging Face folder is copied completely. Otherwise only
            its ids of special tokens are copied, because a run that uses the tokenizer of another
            model does not sample with the settings of that model.

    Raises:
        UserError: The generation configuration is damaged or contains an invalid id.
    """
    if source is None:
        return
    origin, file = _folder(source), _folder(target) / GENERATION_CONFIG
    ids = special_ids(origin)
    borrowed = (origin / _CONFIG).is_file() and not same_model
    if (origin / GENERATION_CONFIG).is_file() and not borrowed:
        if origin.resolve() != file.parent.resolve():
            shutil.copy(origin / GENERATION_CONFIG, file)
    elif ids:
        file.write_text(json.dumps(ids, indent=2) + "\n")


def _folder(place: Path | str) -> Path:
    place = Path(place)
    return place if place.is_dir() else place.parent


def _read_ids(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        ids = {name: entries[name] for name in _IDS if entries.get(name) is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged. Copy it again.") from error
    for name, value in ids.items():
        numbers = _as_list(value) if name == "eos_token_id" else [value]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(
                f"{file} has {value!r} as {name}, which is not a token id. Give the id of a token"
                + (", or a list of ids." if name == "eos_token_id" else ".")
            )
    return ids


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _own_end(tokenizer: Any) -> frozenset[int]:
    """Return the end token that a tokenizer itself names, if it has one."""
    end = getattr(tokenizer, "eod", None)
    if end is None:
        end = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if end is None or end < 0 else frozenset([end])
