"""Counter of the tokens of prompts, before any call is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.records import Message
from megatron_ext.errors import UserError

CHARACTERS_PER_TOKEN = 4
"""Approximate number of characters per token if the tokenizer of a model is not known."""


class TokenCounter:
    """Counter of the tokens of prompts.

    Attributes:
        source: Method of counting, as text.
    """

    def __init__(self, tokenizer: Any = None, source: str = "") -> None:
        """Create a counter.

        Args:
            tokenizer: Tokenizer of transformers with a chat template, or None to estimate tokens
                from characters.
            source: The folder of the tokenizer.
        """
        self._tokenizer = tokenizer
        self.source = f"estimated at {CHARACTERS_PER_TOKEN} characters a token"
        if tokenizer is not None:
            self.source = f"counted by the tokenizer in {source}"

    @classmethod
    def create(cls, tokenizer: str | None, model: str) -> "TokenCounter":
        """Return the counter of an endpoint's model.

        Nothing is downloaded: the tokenizer is the one in the folder `tokenizer`, that of the
        folder `model`, or that of `model` in the cache of Hugging Face.

        Args:
            tokenizer: Folder of a tokenizer, or None.
            model: Name of the model at the endpoint.

        Raises:
            UserError: The folder `tokenizer` cannot be used.
        """
        folder = Path(tokenizer) if tokenizer else _known_folder(model)
        if folder is None:
            return cls()
        if not folder.exists():
            raise UserError(
                f"--tokenizer {folder} does not exist. Name the folder of the judge's model or of "
                "its tokenizer, or leave the flag out to estimate tokens."
            )
        loaded = _load(folder)
        if not loaded.chat_template:
            if not tokenizer:
                return cls()
            raise UserError(
                f"The tokenizer in --tokenizer {folder} has no chat template, so that prompts "
                "cannot be counted. Name another folder, or leave the flag out to estimate tokens."
            )
        return cls(loaded, str(folder))

    def count(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a prompt, including the chat template if it is known."""
        if self._tokenizer is None:
            characters = sum(len(message.content) for message in messages)
            return -(-characters // CHARACTERS_PER_TOKEN)
        from alignment.data.chat_prompts import prompt_ids

        return len(prompt_ids(self._tokenizer, messages))


def _load(folder: Path) -> Any:
    """Return the tokenizer in a folder, which needs no other file of its model."""
    if not (folder / "tokenizer.json").is_file():
        from alignment.data.model_tokenizer import read_tokenizer

        return read_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The tokenizer of {folder} cannot be read: {error}") from error


def _known_folder(model: str) -> Path | None:
    """Return the local folder of a model's tokenizer, or None if there is none."""
    folder = Path(model)
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(model, "tokenizer.json")
    except HFValidationError:  # not a valid name of a repository
        return None
    return Path(file).parent if isinstance(file, str) else None
