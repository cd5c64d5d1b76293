"""Tests of tools.preprocess_data with Hugging Face tokenizers, against transformers."""

import gzip
import json
import signal
from argparse import Namespace

import pytest
from transformers import AutoTokenizer

from megatron_ext.data.tokenizer_identity import tokenizer_digest
from tests.data import hf_tokenizers
from tests.tools.preprocessed import (
    make_texts,
    output_bytes,
    preprocess,
    refusal,
    start,
    stored,
    write_jsonl,
)
from tests.tools.test_preprocess_restarts import wait_for_parts

TEXTS = [*make_texts(150), "naïve <|pad|> text\n\n\n  \t漢字 🙂 e\u0301", "x" * 3000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_tokenizers.byte_level(tmp_path_factory.mktemp("hf") / "tokenizer")


def expected_ids(folder, texts, **options):
    """Return the ids of each document: those of transformers, and one end-of-document id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    rows = [tokenizer(text, **options).input_ids for text in texts]
    return [row if row[-1:] == [end] else [*row, end] for row in rows]


@pytest.mark.parametrize("shape", ["byte level", "begin and end", "bert", "truncated", "file"])
def test_ids_are_those_of_transformers(folder, tmp_path, shape):
    place = folder
    if shape == "begin and end":
        place = hf_tokenizers.with_begin_and_end(folder, tmp_path / "t")
    elif shape == "bert":
        place = hf_tokenizers.bert(tmp_path / "t")
    elif shape == "truncated":  # sentence transformers save the state of their last call
        cut = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        place = hf_tokenizers.with_changes(folder, tmp_path / "t", truncation=cut)
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    model = place / "tokenizer.json" if shape == "file" else place
    manifest = preprocess(
        model, [source], tmp_path / "out", "--valid-fraction", 0, "--workers", 2,
        "--shard-bytes", 4000,
    )  # fmt: skip
    expected = expected_ids(place, TEXTS, split_special_tokens=True)
    assert stored(tmp_path / "out") == expected
    run = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(place))
    assert manifest["tokenizer"] == {
        "type": "HuggingFaceTokenizer",
        "path": str(place),
        "sha256": tokenizer_digest(run),
        "vocab_size": len(AutoTokenizer.from_pretrained(place)),
        "eod": expected[0][-1],
    }
    eod = manifest["tokenizer"]["eod"]
    assert all(document.count(eod) == 1 for document in stored(tmp_path / "out"))


def test_names_of_special_tokens_are_text_unless_they_are_parsed(folder, tmp_path):
    texts = ["one <|endoftext|> document", "an ordinary one"]
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    for name, more in (("text", []), ("parsed", ["--parse-special-tokens"])):
        preprocess(folder, [source], tmp_path / name, "--valid-fraction", 0, *more)
        options = {"split_special_tokens": not more}
        assert stored(tmp_path / name) == expected_ids(folder, texts, **options)
    assert sum(document.count(0) for document in stored(tmp_path / "text")) == 2
    assert sum(document.count(0) for document in stored(tmp_path / "parsed")) == 3


def test_document_with_an_end_token_that_cannot_be_text_is_left_out(tmp_path, capsys):
    place = hf_tokenizers.words(tmp_path / "words")
    texts = [*make_texts(30), "the <end> expert", *make_texts(30, seed=1)]
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    manifest = preprocess(place, [source], tmp_path / "out", "--valid-fraction", 0)
    assert f"{source}: line 31: its text contains" in capsys.readouterr().out
    assert manifest["malformed_lines"] == 1
    rest = [text for text in texts if "<end>" not in text]
    assert stored(tmp_path / "out") == expected_ids(place, rest)


def test_output_is_the_same_for_any_number_of_processes_and_threads(folder, tmp_path):
    source = tmp_path / "text.jsonl.gz"  # one part: the second worker is a thread
    source.write_bytes(gzip.compress("".join(
        json.dumps({"text": text}) + "\n" for text in make_texts(3000)
    ).encode()))  # fmt: skip
    for workers in (1, 2):
        preprocess(folder, [source], tmp_path / str(workers), "--workers", workers)
    assert output_bytes(tmp_path / "1") == output_bytes(tmp_path / "2") != {}


def test_killed_run_resumes_to_identical_output(folder, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(6000))
    preprocess(folder, [source], tmp_path / "whole", "--shard-bytes", 60_000)
    options = ["--shard-bytes", 60_000, "--workers", 2]
    process = start(folder, [source], tmp_path / "cut", *options)
    wait_for_parts(tmp_path / "cut", process, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert output_bytes(tmp_path / "cut") == {}
    capsys.readouterr()
    preprocess(folder, [source], tmp_path / "cut", *options)
    assert "reusing" in capsys.readouterr().out
    assert output_bytes(tmp_path / "cut") == output_bytes(tmp_path / "whole")
    preprocess(folder, [source], tmp_path / "cut", *options)
    assert "complete already" in capsys.readouterr().out


def test_unusable_tokenizers_are_refused_in_one_line(folder, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(20))

    def refuse(place, *more):
        return refusal(capsys, place, [source], tmp_path / "out", *more)

    without = hf_tokenizers.with_changes(folder, tmp_path / "without", settings={})
    error = refuse(without)
    assert "has no end token" in error and "'<|endoftext|>'" in error
    assert f'{without}/tokenizer_config.json as "eos_token"' in error
    (without / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    preprocess(without, [source], tmp_path / "named", "--valid-fraction", 0)

    (tmp_path / "my.json").write_text((folder / "tokenizer.json").read_text())
    assert "is not called tokenizer.json" in refuse(tmp_path / "my.json")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text('{"model": 1}')
    assert "cannot be loaded by transformers" in refuse(tmp_path / "broken")
    assert "No such file" in refuse(tmp_path / "absent")


def test_special_tokens_of_sentencepiece_are_never_parsed(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(20))
    error = refusal(capsys, model, [source], tmp_path / "out", "--parse-special-tokens")
    assert "--parse-special-tokens needs a Hugging Face tokenizer" in error
