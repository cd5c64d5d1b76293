"""The tokenizer of a model, as transformers has it, with its chat template."""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError


def load_tokenizer(model: Path, chat_template: Path | None = None) -> Any:
    """The tokenizer that came with a model.

    Args:
        model: a Hugging Face folder, a run directory, or a folder of checkpoints.
        chat_template: a Jinja file, to have it instead of the model's.

    Raises:
        UserError: it cannot be read, or has no chat template.
    """
    from transformers import AutoTokenizer

    from megatron_ext.hf.remote.tokenization_et import ExpertThresholdTokenizer

    folder = _folder(model)
    try:
        # Code of a folder is never run; our own class is known by its file.
        if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = ExpertThresholdTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer of {model} cannot be read: {error}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template {chat_template} cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model} has no chat template: give one with --chat-template"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} has no token that ends a text")
    return tokenizer


def _folder(model: Path) -> Path:
    """A folder that transformers can load a tokenizer from."""
    if (model / "config.json").is_file():
        return model
    for root in (model / "checkpoints", model, model.parent):
        if (root / "tokenizer").is_dir():
            return root / "tokenizer"
        if (root / "tokenizer.model").is_file():
            return _described(root / "tokenizer.model")
    from megatron_ext.checkpoint import find_checkpoint
    from megatron_ext.hf.sources import open_megatron

    args = open_megatron(find_checkpoint(model)).args
    file = Path(getattr(args, "tokenizer_model", None) or "")
    if file.is_dir():
        return file
    if not file.is_file():
        raise UserError(f"{model} has no tokenizer: convert it to a Hugging Face folder first")
    return _described(file)


def _described(file: Path) -> Path:
    """A folder with a SentencePiece model and the names of its special tokens."""
    from sentencepiece import SentencePieceProcessor

    from megatron_ext.hf.tokenizers import export_sentencepiece

    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = SentencePieceProcessor(model_file=str(file)).get_piece_size()
    export_sentencepiece(file, size, folder)
    return folder
