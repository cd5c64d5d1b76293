"""Identity of tokenizers by content: checks that datasets and checkpoints belong to a tokenizer."""

import json
from argparse import Namespace
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ext.checkpoint import file_digest
from megatron_ext.errors import UserError

# Number of token ids of a dataset that are checked against the vocabulary, and of their places.
_IDS_READ, _PLACES = 10_000_000, 10

# Files in a tokenizer's folder that determine the text of an id. Others, such as the chat template,
# may change. If tokenizer.json exists, the older formats are copies of it.
_FAST = "tokenizer.json"
_SLOW = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_SETTINGS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
)
# A SentencePiece file as a Hugging Face folder, as megatron_ext.hf.tokenizer_export writes it.
_OWN_CLASS = "ExpertThresholdTokenizer"


def tokenizer_of_path(
    model: str,
) -> tuple[Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"], str]:
    """Return Megatron's type of a tokenizer, and the path by which Megatron reads it.

    A Hugging Face tokenizer is a folder or its tokenizer.json. A folder with only a SentencePiece
    model, or one that conversion created from it, is read as that model.

    Args:
        model: Path of a file or folder, which need not exist.

    Raises:
        UserError: It is a JSON file with another name, which Megatron cannot read.
    """
    path = Path(model)
    if path.is_dir():
        sentencepiece = path / "tokenizer.model"
        if sentencepiece.is_file() and (
            not any((path / name).is_file() for name in (_FAST, "tokenizer_config.json"))
            or _json(path / "tokenizer_config.json").get("tokenizer_class") == _OWN_CLASS
        ):
            return "SentencePieceTokenizer", str(sentencepiece)
        return "HuggingFaceTokenizer", model
    if path.name == _FAST:
        return "HuggingFaceTokenizer", str(path.parent)
    if path.suffix == ".json":
        raise UserError(
            f"--tokenizer-model {model} is not called tokenizer.json. Move it to a separate folder "
            "under that name, because Hugging Face reads tokenizers from folders."
        )
    return "SentencePieceTokenizer", model


def tokenizer_digest(args: Namespace) -> str | None:
    """Return a digest that identifies the tokenizer of a run.

    For a tokenizer in one file this is the SHA-256 of the file, as `tools.preprocess_data` writes
    it into a dataset's manifest. For a folder, or a model of the Hugging Face hub, it is a digest
    of everything that determines its encoding, which does not depend on the folder's path.

    Args:
        args: Megatron's arguments.

    Returns:
        Hexadecimal digits; None if there is no file, as with NullTokenizer.

    Raises:
        UserError: A file cannot be read.
    """
    model = getattr(args, "tokenizer_model", None)
    try:
        if args.tokenizer_type == "TikTokenizer":
            names = ("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")
            settings = {name: getattr(args, name, None) for name in names}
            return _combined([file_digest(Path(model)), settings]) if model else None
        if model is not None and Path(model).is_file():
            return file_digest(Path(model))
        if args.tokenizer_type == "HuggingFaceTokenizer" and model is not None:
            folder = Path(model) if Path(model).is_dir() else cached_folder(model)
            return _folder_digest(folder) if folder is not None else None
        files = [getattr(args, name, None) for name in ("vocab_file", "merge_file")]
        present = [Path(file) for file in files if file is not None]
        return _combined([file_digest(file) for file in present]) if present else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer-model {model} cannot be read: {error}. Restore the file or give another."
        ) from error


def check_dataset_tokenizer(prefix: str, args: Namespace, flag: str | None = None) -> None:
    """Check that an indexed dataset was made with the tokenizer of a run or model.

    Args:
        prefix: Prefix of a complete dataset.
        args: Megatron's arguments, with `vocab_size` without padding and `tokenizer_sha256`.
        flag: Flag that gives the tokenizer, with its value, for error messages. None for the
            tokenizer of a trained model, which works with no other one.

    Raises:
        UserError: The dataset's manifest names another tokenizer, or a token id is outside the
            vocabulary.
    """
    if made_with := manifest_tokenizer(prefix):
        _check_manifest(prefix, made_with, args, flag)
    largest = largest_id(prefix)
    if largest >= args.vocab_size:
        raise UserError(
            f"Dataset {prefix} contains token id {largest}, outside the vocabulary of "
            f"{args.vocab_size:,}. Give the tokenizer that it was made with."
        )


def manifest_tokenizer(prefix: str) -> dict[str, Any]:
    """Return the entry of a dataset's manifest about its tokenizer; empty without a manifest.

    Raises:
        UserError: The manifest is damaged.
    """
    dataset = Path(prefix)
    name = dataset.name.removesuffix("_text_document")
    text, _, split = name.rpartition("_")
    if text and split in ("train", "valid"):
        name = text
    manifest = dataset.with_name(f"{name}.json")
    if not manifest.is_file():
        return {}
    try:
        content = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{manifest}, which says what dataset {prefix} was made of, cannot be read: {error}. "
            "Restore it, or preprocess the dataset again."
        ) from error
    tokenizer = content.get("tokenizer") if isinstance(content, dict) else None
    return tokenizer if isinstance(tokenizer, dict) else {}


def largest_id(prefix: str) -> int:
    """Return the largest token id of a dataset, sampled at ten places if it is large.

    The result for an empty dataset is -1.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dtype = IndexedDataset(prefix).index.dtype
    if not Path(f"{prefix}.bin").stat().st_size:
        return -1
    ids = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    if len(ids) <= _IDS_READ:
        return int(ids.max())
    length = _IDS_READ // _PLACES
    starts = np.linspace(0, len(ids) - length, _PLACES).astype(np.int64)
    return max(int(ids[start : start + length].max()) for start in starts)


def check_model_tokenizer(checkpoint: Path, saved: Namespace, current: Namespace) -> None:
    """Check that a run resumes from a checkpoint with the tokenizer of its training.

    Args:
        checkpoint: Folder of the checkpoint, for error messages.
        saved: Arguments of the checkpoint.
        current: Arguments of the run.

    Raises:
        UserError: The tokenizers differ.
    """
    saved_digest, digest = getattr(saved, "tokenizer_sha256", None), current.tokenizer_sha256
    # Earlier versions recorded no digest for a folder.
    unknown = saved_digest is None and saved.tokenizer_type == current.tokenizer_type
    if saved_digest != digest and not unknown:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer than --tokenizer-model "
            f"{current.tokenizer_model}"
            + (", whose content has changed" if _same_path(saved, current) else "")
            + ". Give the one it was trained with."
        )


def check_tokenizer_content(checkpoint: Path, args: Namespace) -> None:
    """Check that inference or conversion uses the tokenizer that the model was trained with.

    Args:
        checkpoint: Folder of the checkpoint, for error messages.
        args: Arguments of the run, with the current path of the tokenizer in `tokenizer_model`.

    Raises:
        UserError: The content of the tokenizer differs.
    """
    recorded = getattr(args, "tokenizer_sha256", None)
    digest = tokenizer_digest(args)
    if recorded is not None and digest is not None and digest != recorded:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer than {args.tokenizer_model}, whose "
            "content differs. Give the one it was trained with by --tokenizer-model."
        )


def _check_manifest(
    prefix: str, made_with: dict[str, Any], args: Namespace, flag: str | None
) -> None:
    if args.tokenizer_type == "NullTokenizer":  # only a number of ids
        size = made_with.get("vocab_size")
        if size not in (None, args.vocab_size):
            raise UserError(
                f"Dataset {prefix} was made with another tokenizer, of {size:,} entries where "
                f"--vocab-size says {args.vocab_size:,}. Set it to {size}, or preprocess the "
                "dataset again."
            )
        return
    digest = made_with.get("sha256")
    if digest is not None and digest not in set(_digests(args)):
        fix = f"Give {made_with.get('path', 'that one')}, or preprocess the dataset again."
        if flag is None:
            fix = f"Preprocess the text again with --tokenizer-model {args.tokenizer_model}."
        tokenizer = flag or "the model's"
        raise UserError(f"Dataset {prefix} was made with another tokenizer than {tokenizer}. {fix}")


def _digests(args: Namespace) -> Iterator[str | None]:
    """Yield the digests by which a manifest may identify the tokenizer."""
    yield getattr(args, "tokenizer_sha256", None) or tokenizer_digest(args)
    if args.tokenizer_type == "HuggingFaceTokenizer":
        # preprocess_data may have read the SentencePiece file that many folders contain.
        file = Path(args.tokenizer_model or "") / "tokenizer.model"
        if file.is_file():
            yield file_digest(file)


def _folder_digest(folder: Path) -> str | None:
    settings = {
        **_json(folder / "special_tokens_map.json"),
        **_json(folder / "tokenizer_config.json"),
    }
    if settings.get("tokenizer_class") == _OWN_CLASS:
        return file_digest(folder / "tokenizer.model")
    content: list[Any] = [{name: _text(settings.get(name)) for name in _SETTINGS}]
    if (folder / _FAST).is_file():
        encoder = _json(folder / _FAST)
        for state in ("truncation", "padding"):  # state of the last call, not of the tokenizer
            encoder.pop(state, None)
        content.append(encoder)
    else:
        files = [folder / name for name in _SLOW] + sorted(folder.glob("*.tiktoken"))
        content += [[file.name, file_digest(file)] for file in files if file.is_file()]
    return _combined(content) if len(content) > 1 else None


def cached_folder(model: str) -> Path | None:
    """Return the folder that a model of the hub was downloaded to."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in (_FAST, "tokenizer_config.json", *_SLOW):
            if isinstance(file := try_to_load_from_cache(model, name), str):
                return Path(file).parent
    except HFValidationError:  # the path of a folder, not the name of a model
        pass
    return None


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _text(token: Any) -> Any:
    """Return a special token's text, which newer files write with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def _combined(content: list[Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _same_path(saved: Namespace, current: Namespace) -> bool:
    model = getattr(current, "tokenizer_model", None)
    return model is not None and getattr(saved, "tokenizer_model", None) == model
