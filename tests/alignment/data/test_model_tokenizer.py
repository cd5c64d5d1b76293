"""Tests of the messages about tokenizers that cannot be used."""

import json
from pathlib import Path

import pytest

from alignment.data.model_tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from tests.alignment.chat_model import make_model


def test_tokenizer_that_cannot_be_used_is_named_with_the_fix(tmp_path: Path) -> None:
    make_model(tmp_path, num_hidden_layers=1)

    def message() -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path)
        return str(caught.value)

    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        entries = json.loads((tmp_path / name).read_text())
        entries = {key: value for key, value in entries.items() if not key.startswith("eos_token")}
        (tmp_path / name).write_text(json.dumps(entries))
    assert message() == (
        f"{tmp_path} has no token that ends a text. Set eos_token_id in "
        f"{tmp_path / 'generation_config.json'}."
    )
    (tmp_path / "chat_template.jinja").unlink()
    assert message() == (
        f"The tokenizer of {tmp_path} has no chat template. Give one with --chat-template."
    )
    (tmp_path / "tokenizer.json").write_text("{")
    assert message().startswith(f"The tokenizer of {tmp_path} cannot be read: ")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert message() == (
        f"{tmp_path} has no tokenizer. Copy tokenizer.json and tokenizer_config.json of the model "
        "into it."
    )
