"""Tests that the tools encode texts with the ids that preprocessing stores."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.tokenizers import MegatronTokenizer
from transformers import AutoTokenizer

from megatron_ext.data.document_tokens import DocumentTokens
from megatron_ext.data.token_stream import sequences_of
from megatron_ext.evaluation.text_codec import TextCodec
from megatron_ext.inspection.windows import _PIECE, Domain
from tests.data import hf_tokenizers
from tests.tools.preprocessed import make_texts, preprocess, stored, write_jsonl

TEXT = "a <|pad|>struck<|endoftext|> word\r\nthe sun\r\n\r\n  naïve 漢字"


@pytest.fixture(params=["plain", "with begin and end", "sentencepiece"])
def folder(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    """Return the tokenizer, as a folder of transformers or as a SentencePiece file."""
    if request.param == "sentencepiece":
        return model
    folder = hf_tokenizers.byte_level(tmp_path / "plain")
    if request.param == "plain":
        return folder
    return hf_tokenizers.with_begin_and_end(folder, tmp_path / "with begin and end")


def of_megatron(place: Path) -> Any:
    library = "huggingface" if place.is_dir() else "sentencepiece"
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(place), metadata_path={"library": library}
    )


def test_documents_have_the_stored_ids(folder: Path, tmp_path: Path) -> None:
    texts = [TEXT, *make_texts(20), "x"]
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    preprocess(folder, [source], tmp_path / "data", "--valid-fraction", 0)
    documents = stored(tmp_path / "data")
    tokenizer = of_megatron(folder)
    encoder = DocumentTokens(tokenizer)
    assert [encoder.document(text) for text in texts] == documents
    assert encoder.beginning(TEXT) == documents[0][:-1]
    flat = [token for document in documents for token in document]
    windows = Domain("a", [str(source)], "text").windows(tokenizer, 7)
    assert [token for window in windows for token in window.tokens] == flat
    trained: Any = SimpleNamespace(tokenizer=tokenizer)
    sequences = sequences_of([str(source)], trained, 5, 10**6)
    assert sequences.flatten().tolist() == flat[: len(flat) // 5 * 5]


def test_a_plain_file_is_one_document_with_its_line_ends(folder: Path, tmp_path: Path) -> None:
    lines = make_texts(3000)
    text = "\r\n".join(lines)  # no line end at the end
    assert len(text) > _PIECE
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    preprocess(folder, [file], tmp_path / "data", "--valid-fraction", 0)
    (document,) = stored(tmp_path / "data")
    windows = Domain("a", [str(file)], "text").windows(of_megatron(folder), 512)
    assert [token for window in windows for token in window.tokens] == document


def test_prompts_have_no_end_and_control_tokens(tmp_path: Path) -> None:
    plain = hf_tokenizers.byte_level(tmp_path / "plain")
    both = hf_tokenizers.with_begin_and_end(plain, tmp_path / "both")
    ids = AutoTokenizer.from_pretrained(plain)(TEXT).input_ids
    assert {0, 1} <= set(ids)  # the names are control tokens
    assert DocumentTokens(of_megatron(plain)).prompt(TEXT) == ids
    assert DocumentTokens(of_megatron(both)).prompt(TEXT) == [1, *ids]
    codec = TextCodec(of_transformers=AutoTokenizer.from_pretrained(both))
    assert codec.encode(TEXT, special=True) == [1, *ids]
