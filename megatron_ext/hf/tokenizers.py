"""The tokenizer and its settings, from a training run to a Hugging Face folder and back."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

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
    _SENTENCEPIECE,
)
_SPECIAL = ("bos", "eos", "pad")
_OWN_CLASS = "ExpertThresholdTokenizer"
_REMOTE = Path(__file__).with_name("remote")


def export_tokenizer(args: Namespace, folder: Path) -> dict[str, int]:
    """Put a run's tokenizer into a folder.

    Returns:
        the ids of its special tokens, for the configuration.

    Raises:
        UserError: its file is not there, or has another size than the model's vocabulary.
    """
    if args.tokenizer_type == "NullTokenizer":
        return {}
    source = Path(args.tokenizer_model or "")
    if args.tokenizer_type == "HuggingFaceTokenizer" and source.is_dir():
        for file in (source / name for name in _FILES):
            if file.is_file():
                shutil.copy(file, folder)
        return _special_ids(folder)
    if args.tokenizer_type != "SentencePieceTokenizer" or not source.is_file():
        raise UserError(
            f"the tokenizer {args.tokenizer_model or args.tokenizer_type} of the run is not there "
            "or not of SentencePiece: say where its file is with --tokenizer-model"
        )
    return export_sentencepiece(source, args.vocab_size, folder)


def _special_ids(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    return {name: number for name, number in ids.items() if number is not None}


def export_sentencepiece(source: Path, vocab: int, folder: Path) -> dict[str, int]:
    processor = _sentencepiece(source)
    if processor.get_piece_size() != vocab:
        raise UserError(
            f"the tokenizer {source} has {processor.get_piece_size()} entries, the model "
            f"{vocab}: give the one it was trained with by --tokenizer-model"
        )
    shutil.copy(source, folder / _SENTENCEPIECE)
    shutil.copy(_REMOTE / "tokenization_et.py", folder)
    ids = {kind: getattr(processor, f"{kind}_id")() for kind in ("unk", *_SPECIAL)}
    ids = {kind: number for kind, number in ids.items() if number >= 0}
    tokens = {f"{kind}_token": processor.id_to_piece(number) for kind, number in ids.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": _OWN_CLASS,
        "auto_map": {"AutoTokenizer": [f"tokenization_et.{_OWN_CLASS}", None]},
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {f"{kind}_token_id": ids[kind] for kind in _SPECIAL if kind in ids}


def carry_tokenizer(args: Namespace, folder: Path) -> list[str]:
    """Put a run's tokenizer beside another checkpoint.

    Returns:
        the flags of `pretrain_et.py` for it.

    Raises:
        UserError: its file is not there.
    """
    if args.tokenizer_type == "NullTokenizer":
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(args.vocab_size)]
    source = Path(args.tokenizer_model or "")
    if not source.name or not source.exists():
        raise UserError(
            f"the tokenizer {args.tokenizer_model or args.tokenizer_type} of the run is not there: "
            "say where its file is with --tokenizer-model"
        )
    target = folder / ("tokenizer" if source.is_dir() else _SENTENCEPIECE)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", str(target)]


def import_tokenizer(source: Path, vocab: int, folder: Path) -> list[str]:
    """Put the tokenizer of a Hugging Face folder beside a checkpoint.

    Returns:
        the flags of `pretrain_et.py` for it; those of a tokenizer without text when there is none.

    Raises:
        UserError: it has more entries than the model.
    """
    config = source / "tokenizer_config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    if settings.get("tokenizer_class") == _OWN_CLASS:
        size = _sentencepiece(source / _SENTENCEPIECE).get_piece_size()
        kind, target = "SentencePieceTokenizer", folder / _SENTENCEPIECE
        shutil.copy(source / _SENTENCEPIECE, target)
    elif files := [source / name for name in _FILES if (source / name).is_file()]:
        from transformers import AutoTokenizer

        kind, target = "HuggingFaceTokenizer", folder / "tokenizer"
        target.mkdir()
        for file in files:
            shutil.copy(file, target)
        size = len(AutoTokenizer.from_pretrained(target))
    else:
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab)]
    if size > vocab:
        raise UserError(
            f"the tokenizer in {source} has {size} entries, the model {vocab}: they do not belong "
            "together"
        )
    return ["--tokenizer-type", kind, "--tokenizer-model", str(target)]


def _sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is missing or no SentencePiece model") from error
