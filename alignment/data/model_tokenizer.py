"""Loading of the tokenizer of a model, with its chat template."""

from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import GENERATION_CONFIG, end_tokens, record_end_tokens
from megatron_ext.model_location import locate_model


def load_tokenizer(model: Path, chat_template: Path | None = None) -> Any:
    """Load the tokenizer of a model, with the end tokens of the model.

    Args:
        model: A Hugging Face folder, a run directory, or a folder of checkpoints.
        chat_template: A Jinja file that replaces the chat template of the model.

    Raises:
        UserError: The tokenizer or the file cannot be read, or the tokenizer has no chat template
            or no end token.
    """
    tokenizer = read_tokenizer(model)
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template {chat_template} cannot be read: {error}. Give a Jinja file."
            ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {model} has no chat template. Give one with --chat-template."
        )
    if not end_tokens(tokenizer):
        place = _place(model)
        folder = place if place.is_dir() else place.parent
        raise UserError(
            f"{model} has no token that ends a text. Set eos_token_id in "
            f"{folder / GENERATION_CONFIG}."
        )
    return tokenizer


def read_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model, which may lack a chat template.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    from megatron_ext.hf.remote.tokenization_et import ExpertThresholdTokenizer
    from megatron_ext.hf.tokenizer_export import open_sentencepiece

    place = _place(model)
    try:
        # Code in the folder is never run; a tokenizer of this project is recognized by its file.
        if place.is_file():
            tokenizer = open_sentencepiece(place)
        elif (place / "tokenizer.json").is_file() or not (place / "tokenizer.model").is_file():
            tokenizer = AutoTokenizer.from_pretrained(place)
        elif (place / "tokenizer_config.json").is_file():
            tokenizer = ExpertThresholdTokenizer.from_pretrained(place)
        else:  # the copy in a run's directory
            tokenizer = open_sentencepiece(place / "tokenizer.model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if place.is_dir() and not any(place.glob("*token*")):
            raise UserError(
                f"{model} has no tokenizer. Copy tokenizer.json and tokenizer_config.json of the "
                "model into it."
            ) from error
        raise UserError(
            f"The tokenizer of {model} cannot be read: {error}. Copy its files again."
        ) from error
    record_end_tokens(tokenizer, place)
    return tokenizer


def _place(model: Path) -> Path:
    """Return the folder or SentencePiece model from which to load the tokenizer of a model."""
    # A tokenizer may be in a folder without a model.
    if any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return model
    location = locate_model(model, "--model")
    if location.kind == "hf":
        return location.folder
    for root in (location.folder.parent, location.folder.parent.parent):
        if (root / "tokenizer").is_dir():
            return root / "tokenizer"
        if (root / "tokenizer.model").is_file():
            return root / "tokenizer.model"
    from megatron_ext.hf.sources import open_megatron

    args = open_megatron(location.folder).args
    file = Path(getattr(args, "tokenizer_model", None) or "")
    if file.is_dir():
        return file
    if not file.is_file():
        raise UserError(f"{model} has no tokenizer. Convert it to a Hugging Face folder first.")
    return file
