"""Tests that datasets and checkpoints are bound to a tokenizer by its content."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data.tokenizer_identity import (
    check_dataset_tokenizer,
    check_model_tokenizer,
    check_tokenizer_content,
    largest_id,
    manifest_tokenizer,
    tokenizer_digest,
)
from megatron_ext.errors import UserError


def with_file(kind: str, file: Path, content: str = "pieces", **settings: Any) -> Namespace:
    file.write_text(content)
    return Namespace(tokenizer_type=kind, tokenizer_model=str(file), **settings)


def folder(path: Path, **changes: Any) -> Namespace:
    """Return a Hugging Face folder with a fast tokenizer."""
    path.mkdir()
    encoder = {"model": {"vocab": {"a": 0, "b": 1}}, "truncation": None, "padding": None}
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}", "name_or_path": "here"}
    (path / "tokenizer.json").write_text(json.dumps(encoder | changes.pop("encoder", {})))
    (path / "tokenizer_config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    return Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path))


def test_a_tokenizer_in_one_file_has_the_digest_of_the_file(tmp_path: Path) -> None:
    run = with_file("SentencePieceTokenizer", tmp_path / "t.model")
    assert tokenizer_digest(run) == sha256(b"pieces").hexdigest()
    assert tokenizer_digest(Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None)) is None


def test_tiktoken_and_bpe_count_every_token(tmp_path: Path) -> None:
    runs = [
        with_file("TikTokenizer", tmp_path / "a.json", tiktoken_pattern="v1"),
        with_file("TikTokenizer", tmp_path / "b.json", tiktoken_pattern="v2"),
        with_file("TikTokenizer", tmp_path / "c.json", "others", tiktoken_pattern="v1"),
    ]
    for merges in ("x y", "y x"):
        files = {"vocab_file": tmp_path / "vocab.json", "merge_file": tmp_path / f"{merges}.txt"}
        files["vocab_file"].write_text("{}")
        files["merge_file"].write_text(merges)
        runs.append(Namespace(tokenizer_type="GPT2BPETokenizer", tokenizer_model=None, **files))
    assert len({tokenizer_digest(run) for run in runs}) == len(runs)
    again = with_file("TikTokenizer", tmp_path / "moved.json", tiktoken_pattern="v1")
    assert tokenizer_digest(again) == tokenizer_digest(runs[0])


@pytest.mark.parametrize(
    "changes, same",
    [
        ({"chat_template": "other", "name_or_path": "there", "model_max_length": 5}, True),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, True),
        ({"encoder": {"truncation": {"max_length": 5}, "padding": {}}}, True),
        ({"eos_token": "<|end|>"}, False),
        ({"add_bos_token": True}, False),
        ({"encoder": {"model": {"vocab": {"b": 0, "a": 1}}}}, False),
        ({"encoder": {"added_tokens": [{"id": 2, "content": "<x>"}]}}, False),
    ],
)
def test_a_folder_is_known_by_what_decides_its_encoding(
    tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    first = tokenizer_digest(folder(tmp_path / "first"))
    assert (tokenizer_digest(folder(tmp_path / "second", **changes)) == first) is same
    assert first is not None


def test_a_folder_without_a_fast_tokenizer_is_known_by_its_files(tmp_path: Path) -> None:
    digests = set()
    for merges in ("a b", "b a"):
        run = folder(tmp_path / merges)
        (tmp_path / merges / "tokenizer.json").rename(tmp_path / merges / "vocab.json")
        (tmp_path / merges / "merges.txt").write_text(merges)
        digests.add(tokenizer_digest(run))
    (tmp_path / "empty").mkdir()
    empty = Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "empty")
    )
    assert len(digests | {tokenizer_digest(empty)}) == 3 and tokenizer_digest(empty) is None


def test_tokenizer_digest_refuses_a_damaged_file(tmp_path: Path) -> None:
    run = folder(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"--tokenizer-model .*damaged cannot be read"):
        tokenizer_digest(run)


@pytest.mark.parametrize(
    "prefix, manifest",
    [
        ("text_train_text_document", "text.json"),
        ("my_text_valid_text_document", "my_text.json"),
        ("my_text_text_document", "my_text.json"),
        ("my_text", "my_text.json"),
    ],
)
def test_manifest_is_next_to_the_dataset(tmp_path: Path, prefix: str, manifest: str) -> None:
    place = tmp_path / "my_data"
    place.mkdir()
    assert manifest_tokenizer(str(place / prefix)) == {}
    (place / manifest).write_text(json.dumps({"tokenizer": {"sha256": "1"}}))
    assert manifest_tokenizer(str(place / prefix)) == {"sha256": "1"}
    (place / manifest).write_text("[1]")
    assert manifest_tokenizer(str(place / prefix)) == {}
    (place / manifest).write_text("{")
    with pytest.raises(UserError, match=f"{manifest}, which says .* cannot be read"):
        manifest_tokenizer(str(place / prefix))


@pytest.fixture
def manifest(dataset: Path) -> Any:
    """Return a function that writes the manifest of `dataset`, whose ids are below 99."""
    file = dataset.with_name("text.json")
    yield lambda **tokenizer: file.write_text(json.dumps({"tokenizer": tokenizer}))
    file.unlink(missing_ok=True)


def run_with(args: Namespace, vocab_size: int = 127) -> Namespace:
    return Namespace(**vars(args), vocab_size=vocab_size, tokenizer_sha256=tokenizer_digest(args))


def test_data_of_another_tokenizer_is_refused_for_every_kind(
    dataset: Path, tmp_path: Path, manifest: Callable[..., Any]
) -> None:
    kinds = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    runs = [with_file(kind, tmp_path / kind) for kind in (*kinds, "TikTokenizer")]
    runs.append(folder(tmp_path / "hf"))
    for run in map(run_with, runs):
        manifest(sha256=run.tokenizer_sha256, path="its.model")
        check_dataset_tokenizer(str(dataset), run)
        manifest(sha256="0" * 64, path="its.model")
        with pytest.raises(UserError, match=r"tokenizer than the model's\. Preprocess the text"):
            check_dataset_tokenizer(str(dataset), run)
        with pytest.raises(
            UserError, match=r"tokenizer than --tokenizer-model t\. Give its\.model"
        ):
            check_dataset_tokenizer(str(dataset), run, "--tokenizer-model t")


def test_a_folder_takes_data_of_the_sentencepiece_file_in_it(
    dataset: Path, tmp_path: Path, manifest: Callable[..., Any]
) -> None:
    run = run_with(folder(tmp_path / "llama"))
    (tmp_path / "llama" / "tokenizer.model").write_bytes(b"pieces")
    manifest(sha256=sha256(b"pieces").hexdigest())
    check_dataset_tokenizer(str(dataset), run)


def test_without_a_tokenizer_the_number_of_ids_must_fit(
    dataset: Path, manifest: Callable[..., Any]
) -> None:
    run = run_with(Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None))
    manifest(sha256="0" * 64, vocab_size=127)
    check_dataset_tokenizer(str(dataset), run)
    manifest(sha256="0" * 64, vocab_size=120)
    with pytest.raises(UserError, match=r"120 entries where --vocab-size says 127\. Set it to 120"):
        check_dataset_tokenizer(str(dataset), run)


def test_ids_are_compared_with_the_vocabulary_and_not_with_its_padding(dataset: Path) -> None:
    null = Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None, padded_vocab_size=128)
    assert largest_id(str(dataset)) == 98
    check_dataset_tokenizer(str(dataset), run_with(null, 99))
    with pytest.raises(UserError, match="contains token id 98, outside the vocabulary of 98"):
        check_dataset_tokenizer(str(dataset), run_with(null, 98))


def test_ids_of_a_large_dataset_are_read_at_its_end_too(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr("megatron_ext.data.tokenizer_identity._IDS_READ", 1000)
    builder = IndexedDatasetBuilder(str(tmp_path / "large.bin"), dtype=np.uint16)
    builder.add_document(np.arange(50_000) // 100, [50_000])
    builder.finalize(str(tmp_path / "large.idx"))
    assert largest_id(str(tmp_path / "large")) == 499


def test_resuming_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    saved = run_with(folder(tmp_path / "first"))
    moved = run_with(folder(tmp_path / "moved", chat_template="other"))
    check_model_tokenizer(tmp_path, saved, moved)
    with pytest.raises(UserError, match="was trained with another tokenizer than"):
        check_model_tokenizer(tmp_path, saved, run_with(folder(tmp_path / "o", eos_token="e")))
    shutil.rmtree(tmp_path / "first")
    swapped = run_with(folder(tmp_path / "first", eos_token="e"))
    with pytest.raises(UserError, match=r"whose content has changed\. Give the one"):
        check_model_tokenizer(tmp_path, saved, swapped)
    older = Namespace(**{**vars(saved), "tokenizer_sha256": None})
    check_model_tokenizer(tmp_path, older, swapped)  # it recorded nothing


def test_inference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    saved = run_with(with_file("SentencePieceTokenizer", tmp_path / "t.model"))
    check_tokenizer_content(tmp_path, saved)
    (tmp_path / "t.model").write_text("others")
    with pytest.raises(UserError, match=r"another tokenizer than .*t.model, whose content differs"):
        check_tokenizer_content(tmp_path, saved)
    (tmp_path / "t.model").unlink()
    check_tokenizer_content(tmp_path, saved)  # a missing file is reported when it is opened
