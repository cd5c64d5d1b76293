"""Class with which transformers loads the copy of a tokenizer.

transformers chooses the class of a tokenizer not only by tokenizer_config.json, but also by the
model in config.json, and most classes replace the rules of tokenizer.json by their own ones. So the
same files give other ids next to another config.json, or without one.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

_REMOTE = Path(__file__).with_name("remote")
_SETTINGS = "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"
_EXACT_CODE, _EXACT_CLASS = "tokenization_exact.py", "tokenization_exact.ExactTokenizer"

# Texts on which the rules of tokenizers differ: normal forms, spaces, lines, numbers, control
# tokens, contractions, and characters outside the vocabulary.
_PROBES = (
    "<s> [INST] a [/INST] b</s> [INST] c",
    "cafe\u0301 caf\u00e9 \ufb01 \u2167 12345 \uff11\uff12 x  =  3.14",
    "a  b\n",
    " \t\tif x:\r\n\n    return 'it''s' # DON'T they'll\u00a0\u2581\u200b",
    "\u6f22\u5b57 \u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f467 <|endoftext|> <think>",
)


def load_tokenizer(source: Path | str) -> Any:
    """Load a tokenizer as transformers does for training and inference, without code of the folder.

    Raises:
        UserError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers and Rust raise any kind for damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The tokenizer in {source} cannot be loaded by transformers: {reason} Copy its files "
            "again."
        ) from error


def match_encoding(source: Path | str, folder: Path, keep_files: bool = False) -> None:
    """Change a copy of a tokenizer so that it has the ids of the original in transformers.

    The copy is not changed if it has these ids already. Otherwise it names the class of the
    original. If that class is not loaded, as next to the config.json of some models, the rules of
    the original are written into tokenizer.json, and a class that changes nothing is named.

    Args:
        source: Folder of the original, with its config.json if there is one.
        folder: Folder with a copy of its files, and with the config.json of its model, if any.
        keep_files: Whether nothing but the name of the class may change, so that the digest of the
            tokenizer is that of the original.

    Raises:
        UserError: A tokenizer cannot be loaded, or the copy still has other ids.
    """
    original = load_tokenizer(source)
    changes: list[Callable[[Any, Path], None]] = [_name_class]
    if original.is_fast and not keep_files:
        changes += [_write_rules, _add_code]
    copy = _load_copy(folder)
    for change in changes:
        if copy is not None and _rules(copy) == _rules(original):
            break
        change(original, folder)
        copy = _load_copy(folder)
    if copy is None or not _has_equal_ids(copy, original):
        loaded = "not at all" if copy is None else f"as {type(copy).__name__}"
        raise UserError(
            f"The tokenizer in {source} would have other token ids in {folder}: transformers loads "
            f"it as {type(original).__name__} there and {loaded} here{_reason(folder)}. Choose a "
            "tokenizer with a tokenizer.json and a tokenizer_class that fits it in "
            "tokenizer_config.json."
        )
    if _exact_is_named(folder):  # the original may be an export, whose code is not copied with it
        shutil.copy(_REMOTE / _EXACT_CODE, folder)


def _name_class(original: Any, folder: Path) -> None:
    name = type(original).__name__
    _change_settings(folder, tokenizer_class=_GENERIC if name == "TokenizersBackend" else name)


def _write_rules(original: Any, folder: Path) -> None:
    """Write the rules of the original into tokenizer.json and the class that follows only them."""
    original.save_pretrained(folder)
    _change_settings(folder, tokenizer_class=_GENERIC)


def _add_code(original: Any, folder: Path) -> None:
    """Name a class in the folder, because of which transformers ignores the class of the model.

    For some models, such as Qwen2, transformers replaces every named class by that of the model,
    but not where code is named. It loads this code only if the user trusts it, and otherwise the
    named class. Both follow tokenizer.json.
    """
    _change_settings(folder, auto_map={"AutoTokenizer": [None, _EXACT_CLASS]})


def _change_settings(folder: Path, **changes: Any) -> None:
    file = folder / _SETTINGS
    file.write_text(json.dumps(_read(file) | changes, indent=2) + "\n")


def _exact_is_named(folder: Path) -> bool:
    named = _read(folder / _SETTINGS).get("auto_map")
    return isinstance(named, dict) and _EXACT_CLASS in (named.get("AutoTokenizer") or ())


def _reason(folder: Path) -> str:
    model = _read(folder / "config.json").get("model_type")
    return f", because of the model_type {model} in config.json" if model else ""


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _load_copy(folder: Path) -> Any:
    """Return the tokenizer in a folder; None if another name of its class may help to load it."""
    try:
        return load_tokenizer(folder)
    except UserError:
        return None


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines the ids of a tokenizer."""
    names = {"special": dict(tokenizer.special_tokens_map)}
    if not tokenizer.is_fast:
        return {"class": type(tokenizer), "ids": _ids(tokenizer), **names}
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {"truncation": None, "padding": None}  # of the last call, not of the tokenizer
    return pipeline | state | names


def _has_equal_ids(copy: Any, original: Any) -> bool:
    if _rules(copy) == _rules(original):
        return True
    special = [dict(tokenizer.special_tokens_map) for tokenizer in (copy, original)]
    return special[0] == special[1] and _ids(copy) == _ids(original)


def _ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in _PROBES]
