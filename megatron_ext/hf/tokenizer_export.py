"""Conversion of a tokenizer and its settings from a training run to Hugging Face and back."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import carry_generation_config, special_ids
from megatron_ext.hf.tokenizer_class import load_tokenizer, match_encoding

_SENTENCEPIECE = "tokenizer.model"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "spiece.model",
    "sentencepiece.bpe.model",
    _SENTENCEPIECE,
)
_SPECIAL = ("bos", "eos", "pad")
_OWN_CLASS = "ExpertThresholdTokenizer"
_REMOTE = Path(__file__).with_name("remote")


def export_tokenizer(
    args: Namespace, folder: Path, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Write a run's tokenizer and generation configuration into a folder.

    Args:
        args: Arguments of the run.
        folder: An existing folder.
        checkpoint: Folder of one iteration. The generation configuration of a model without a
            tokenizer is next to it.

    Returns:
        The ids of special tokens, for the configuration; a list if there are several end tokens.

    Raises:
        UserError: The tokenizer's file is missing or does not fit the model's vocabulary.
    """
    place = _place(args, checkpoint)
    carry_generation_config(place, folder)
    return _export_files(args, folder) | special_ids(place)


def _place(args: Namespace, checkpoint: Path | None) -> str | Path | None:
    """Return the folder or file of a run's generation configuration."""
    without = args.tokenizer_type == "NullTokenizer" or not args.tokenizer_model
    if not without:
        return args.tokenizer_model
    return checkpoint.parent if checkpoint else None


def _export_files(args: Namespace, folder: Path) -> dict[str, int]:
    if args.tokenizer_type == "NullTokenizer":
        return {}
    source = Path(args.tokenizer_model or "")
    if args.tokenizer_type == "HuggingFaceTokenizer" and source.is_dir():
        _copy_files(source, folder)
        return _special_ids(source)
    if args.tokenizer_type != "SentencePieceTokenizer" or not source.is_file():
        raise UserError(
            f"The tokenizer {args.tokenizer_model or args.tokenizer_type} of the run does not "
            "exist or is not a SentencePiece model. Give its file with --tokenizer-model."
        )
    return export_sentencepiece(source, args.vocab_size, folder)


def _special_ids(folder: Path) -> dict[str, int]:
    tokenizer = load_tokenizer(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    return {name: number for name, number in ids.items() if number is not None}


def export_sentencepiece(source: Path, vocab: int, folder: Path) -> dict[str, int]:
    """Write a SentencePiece model into a folder, with the class that loads it in transformers.

    Args:
        source: The SentencePiece model.
        vocab: Number of entries that the model expects.
        folder: An existing folder.

    Returns:
        The ids of its special tokens, for the configuration.

    Raises:
        UserError: The number of pieces differs from `vocab`.
    """
    processor = _sentencepiece(source)
    if processor.get_piece_size() != vocab:
        raise UserError(
            f"The tokenizer {source} has {processor.get_piece_size()} entries, the model "
            f"{vocab}. Give the tokenizer that training used with --tokenizer-model."
        )
    shutil.copy(source, folder / _SENTENCEPIECE)
    shutil.copy(_REMOTE / "tokenization_et.py", folder)
    ids = _ids_of(processor)
    settings: dict[str, Any] = {
        "tokenizer_class": _OWN_CLASS,
        "auto_map": {"AutoTokenizer": [f"tokenization_et.{_OWN_CLASS}", None]},
        "clean_up_tokenization_spaces": False,
        # The names of control tokens in a text are encoded as text, as in training.
        "split_special_tokens": True,
        **_names_of(processor),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {f"{kind}_token_id": ids[kind] for kind in _SPECIAL if kind in ids}


def as_transformers(tokenizer: Any) -> Any:
    """Return the transformers tokenizer equivalent to one of Megatron's, or None."""
    inner: Any = getattr(tokenizer, "_tokenizer", None)
    if tokenizer.library == "huggingface":
        return inner.tokenizer
    if tokenizer.library == "sentencepiece" and not inner.legacy:
        return open_sentencepiece(Path(tokenizer.path))
    return None


def open_sentencepiece(file: Path) -> Any:
    """Return a SentencePiece model as a tokenizer of transformers with the ids of training.

    Raises:
        UserError: The file is missing or not a SentencePiece model.
    """
    from megatron_ext.hf.remote.tokenization_et import ExpertThresholdTokenizer

    return ExpertThresholdTokenizer(vocab_file=str(file), **_names_of(_sentencepiece(file)))


def _ids_of(processor: Any) -> dict[str, int]:
    """Return the ids of special tokens by kind."""
    ids = {kind: getattr(processor, f"{kind}_id")() for kind in ("unk", *_SPECIAL)}
    return {kind: number for kind, number in ids.items() if number >= 0}


def _names_of(processor: Any) -> dict[str, str]:
    """Return the names of special tokens by transformers' keys."""
    ids = _ids_of(processor)
    return {f"{kind}_token": processor.id_to_piece(number) for kind, number in ids.items()}


def carry_tokenizer(args: Namespace, folder: Path, checkpoint: Path | None = None) -> list[str]:
    """Copy a run's tokenizer and generation configuration next to another checkpoint.

    Args:
        args: Arguments of the run.
        folder: Folder of checkpoints.
        checkpoint: Folder of one iteration; see `export_tokenizer`.

    Returns:
        The flags of `pretrain_et.py` for the tokenizer.

    Raises:
        UserError: The tokenizer's file is missing, or transformers cannot load it.
    """
    if args.tokenizer_type == "NullTokenizer":
        carry_generation_config(_place(args, checkpoint), folder)
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(args.vocab_size)]
    source = Path(args.tokenizer_model or "")
    if not source.name or not source.exists():
        raise UserError(
            f"The tokenizer {args.tokenizer_model or args.tokenizer_type} of the run does not "
            "exist. Give its file or folder with --tokenizer-model."
        )
    target = folder / ("tokenizer" if source.is_dir() else _SENTENCEPIECE)
    if source.is_dir():
        target.mkdir()
        copy_tokenizer(args, source, target)
    else:
        shutil.copy(source, target)
    carry_generation_config(source, target)
    return ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", str(target)]


def copy_tokenizer(args: Namespace, source: Path, target: Path) -> None:
    """Copy the tokenizer of a run, but not the model next to it, to an existing folder.

    Without the config.json of that model, transformers may load the copy as another class. Then its
    settings get the name of the class, which the digest of a tokenizer does not depend on.

    Args:
        args: Arguments of the run.
        source: Folder of its tokenizer.
        target: An existing folder without a config.json.

    Raises:
        UserError: transformers cannot load the tokenizer, or the copy would have other ids.
    """
    _copy_files(source, target)
    # Code in the folder of a tokenizer is not copied, so that the copy cannot be loaded with it.
    runs_code = getattr(args, "trust_remote_code", False) and "auto_map" in _settings(source)
    if not runs_code:
        match_encoding(source, target, keep_files=True)


def _copy_files(source: Path, target: Path) -> None:
    for file in (source / name for name in _FILES):
        if file.is_file():
            shutil.copy(file, target)


def copy_exported_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copy tokenizer and generation configuration from one Hugging Face folder to another.

    Args:
        source: Hugging Face folder.
        folder: An existing folder.

    Returns:
        The ids of special tokens, for the configuration; a list if there are several end tokens.

    Raises:
        UserError: The generation configuration is damaged or contains an invalid id.
    """
    _copy_files(source, folder)
    if _settings(folder).get("tokenizer_class") == _OWN_CLASS:
        shutil.copy(_REMOTE / "tokenization_et.py", folder)
    carry_generation_config(source, folder, same_model=True)
    return special_ids(source)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the tokenizer in a Hugging Face folder; empty without one."""
    config = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}
    return settings


def import_tokenizer(source: Path, vocab: int, folder: Path) -> list[str]:
    """Copy tokenizer and generation configuration of a Hugging Face folder next to a checkpoint.

    Args:
        source: Hugging Face folder.
        vocab: Number of entries that the model expects.
        folder: Folder of checkpoints.

    Returns:
        The flags of `pretrain_et.py` for the tokenizer. A folder without a tokenizer gives those of
        NullTokenizer, which reads token ids instead of text.

    Raises:
        UserError: The tokenizer cannot be loaded, has more entries than the model, or would have
            other ids than in the folder, or the generation configuration is damaged.
    """
    if _settings(source).get("tokenizer_class") == _OWN_CLASS:
        size = _sentencepiece(source / _SENTENCEPIECE).get_piece_size()
        kind, target = "SentencePieceTokenizer", folder / _SENTENCEPIECE
        shutil.copy(source / _SENTENCEPIECE, target)
    elif any((source / name).is_file() for name in _FILES):
        kind, target = "HuggingFaceTokenizer", folder / "tokenizer"
        target.mkdir()
        _copy_files(source, target)
        match_encoding(source, target)
        size = len(load_tokenizer(target))
    else:
        carry_generation_config(source, folder, same_model=True)
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab)]
    carry_generation_config(source, target, same_model=True)
    if size > vocab:
        raise UserError(
            f"The tokenizer in {source} has {size} entries, the model {vocab}. Copy the tokenizer "
            "of this model into the folder."
        )
    return ["--tokenizer-type", kind, "--tokenizer-model", str(target)]


def match_exported_tokenizer(original: Path | str | None, folder: Path) -> None:
    """Change an exported tokenizer so that it has the ids of the original; see `match_encoding`.

    A folder without a tokenizer of transformers is not changed.

    Args:
        original: Folder of the tokenizer with which the model was trained.
        folder: Hugging Face folder, with the config.json of the exported model.

    Raises:
        UserError: A tokenizer cannot be loaded, or the exported one would have other ids.
    """
    exported = any((folder / name).is_file() for name in _FILES)
    if original and exported and _settings(folder).get("tokenizer_class") != _OWN_CLASS:
        match_encoding(original, folder)


def _sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file} is missing or not a SentencePiece model. Give the tokenizer that training "
            "used."
        ) from error
