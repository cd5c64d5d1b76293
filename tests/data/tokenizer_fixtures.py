"""Fixtures with a small tokenizer, imported by the conftest.py of the folders that use it."""

import pytest


# Megatron takes seconds to import: only where a test asks for one of these.
@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a tokenizer with 360 entries."""
    from tests.tools.preprocessed import make_texts
    from tools import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer.train_sentencepiece(make_texts(400), 360, 1.0))
    return path


@pytest.fixture(scope="session")
def tokenizer(model):
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}
    )
