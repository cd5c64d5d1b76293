"""Tests of tools.preprocess_data: equal tokens for every format and number of workers."""

import gzip
import hashlib
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.preprocessed import (
    make_texts,
    output_bytes,
    preprocess,
    refusal,
    stored,
    write_jsonl,
)
from tools import train_tokenizer


def packed(content):
    return {
        "": content,
        ".gz": gzip.compress(content),
        # Two frames one after the other, as parallel compressors write them.
        ".zst": b"".join(
            zstandard.compress(half) for half in (content[: len(content) // 2],
                                                  content[len(content) // 2 :])
        ),
    }  # fmt: skip


def test_all_formats_and_compressions_give_equal_documents(model, tokenizer, tmp_path):
    texts = make_texts(120) + ["two\nlines"]
    expected = [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]
    contents = {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
        "txt": "\n<>\n".join(texts).encode(),
    }
    files = []
    for suffix, content in contents.items():
        for compression, data in packed(content).items():
            files.append(tmp_path / f"plain.{suffix}{compression}")
            files[-1].write_bytes(data)
    for codec in ("none", "gzip", "zstd"):
        files.append(tmp_path / f"{codec}.parquet")
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, files[-1], compression=codec, row_group_size=17)
    manifest = preprocess(
        model, files, tmp_path / "out", "--valid-fraction", 0, "--document-separator", "<>",
        "--shard-bytes", 700, "--workers", 2,
    )  # fmt: skip
    result = stored(tmp_path / "out")
    assert len(files) == 9
    for i, file in enumerate(files):
        assert result[i * len(texts) : (i + 1) * len(texts)] == expected, file.name
        assert manifest["inputs"][str(file)]["documents"] == len(texts)
    assert manifest["splits"] == {
        "train": {
            "documents": 9 * len(texts),
            "tokens": 9 * sum(map(len, expected)),
            "bytes": 9 * sum(len(text.encode()) for text in texts),
        }
    }


def test_plain_text_file_is_one_document(model, tokenizer, tmp_path):
    texts = ["one\n\nstill one\n", "two"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    preprocess(model, [tmp_path / "*.txt"], tmp_path / "out", "--valid-fraction", 0)
    assert [tokenizer.detokenize(d[:-1]) for d in stored(tmp_path / "out")] == texts
    options = ["--valid-fraction", 0, "--document-separator", r"\n"]
    preprocess(model, [tmp_path / "*.txt"], tmp_path / "lines", *options)
    lines = [tokenizer.detokenize(d[:-1]) for d in stored(tmp_path / "lines")]
    assert lines == ["one", "still one", "two"]


def test_dataset_decodes_to_the_source_texts(model, tokenizer, tmp_path):
    """One run writes, reads and decodes texts of every kind."""
    texts = []
    character = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")

    @settings(max_examples=200)
    @given(st.text(character, min_size=1))
    def collect(text):
        if text.strip():
            texts.append(text)

    collect()
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    preprocess(model, [source], tmp_path / "out", "--valid-fraction", 0, "--workers", 1)
    result = stored(tmp_path / "out")
    assert [tokenizer.detokenize(ids[:-1]) for ids in result] == texts
    assert {ids[-1] for ids in result} == {tokenizer.eod}
    assert not any(tokenizer.eod in ids[:-1] for ids in result)


def test_output_has_the_same_bytes_for_any_workers_and_shards(model, tmp_path):
    sources = [write_jsonl(tmp_path / f"{i}.jsonl", make_texts(300, i)) for i in range(3)]
    preprocess(model, sources, tmp_path / "one", "--workers", 1, "--valid-fraction", 0.2)
    expected = output_bytes(tmp_path / "one")
    assert len(expected) == 4
    for workers, size in ((3, 5000), (2, 10**9)):
        prefix = tmp_path / f"{workers}"
        preprocess(
            model, sources, prefix, "--workers", workers, "--valid-fraction", 0.2,
            "--shard-bytes", size,
        )  # fmt: skip
        assert output_bytes(prefix) == expected


def test_small_files_share_parts_with_separate_counts(model, tmp_path, capsys):
    texts = make_texts(40)
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.txt").write_text(f"{text}\n<>\n")
    (tmp_path / "017.txt").write_bytes(b"good\n<>\n\n<>\nbad \xff\n<>\n")
    one = tmp_path / "one.text"
    one.write_bytes(b"".join(path.read_bytes() for path in sorted(tmp_path.glob("*.txt"))))
    options = ["--valid-fraction", 0.2, "--workers", 1, "--document-separator", "<>"]
    preprocess(model, [one], tmp_path / "one", *options)
    many = [tmp_path / "*.txt", "--max-malformed", 0]
    error = refusal(capsys, model, many[:1], tmp_path / "many", *options, *many[1:])
    assert f"{tmp_path}/017.txt: line 5: invalid UTF-8" in error
    manifest = preprocess(model, many[:1], tmp_path / "many", *options)
    assert "reusing 1 of 1 finished parts" in capsys.readouterr().out
    assert output_bytes(tmp_path / "many") == output_bytes(tmp_path / "one")
    counts = [manifest["inputs"][f"{tmp_path}/{n:03}.txt"] for n in range(40)]
    assert [(c["lines"], c["documents"], c["empty"], c["malformed"]) for c in counts] == (
        [(2, 1, 0, 0)] * 17 + [(6, 1, 1, 1)] + [(2, 1, 0, 0)] * 22
    )


def test_split_depends_on_text_and_seed_only(model, tokenizer, tmp_path):
    texts = make_texts(1000)
    first = write_jsonl(tmp_path / "first.jsonl", texts)
    shuffled = random.Random(3).sample(texts * 2, 2000)
    second = write_jsonl(tmp_path / "second.jsonl", shuffled)
    splits = {}
    for name, source, seed in (("a", first, 0), ("b", second, 0), ("c", first, 1)):
        preprocess(model, [source], tmp_path / name, "--valid-fraction", 0.1, "--seed", seed)
        splits[name] = [
            {tokenizer.detokenize(ids[:-1]) for ids in stored(tmp_path / name, split)}
            for split in ("train", "valid")
        ]
        assert not splits[name][0] & splits[name][1]
    assert splits["a"] == splits["b"] != splits["c"]
    assert abs(len(splits["a"][1]) - 100) < 50  # five standard deviations


def test_valid_input_is_the_whole_validation_split(model, tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", make_texts(20))
    valid = write_jsonl(tmp_path / "valid.jsonl", make_texts(5, 1))
    preprocess(model, [train], tmp_path / "out", "--valid-input", valid)
    for split, texts in (("train", make_texts(20)), ("valid", make_texts(5, 1))):
        result = stored(tmp_path / "out", split)
        assert [tokenizer.detokenize(ids[:-1]) for ids in result] == texts


def test_dtype_depends_on_the_vocabulary_as_in_megatron(model, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    assert preprocess(model, [source], tmp_path / "small", "--valid-fraction", 0)["dtype"] == (
        "uint16"
    )
    choose = random.Random(0)
    words = [" ".join("".join(choose.choices("abcdefghij", k=9)) for _ in range(9))
             for _ in range(6000)]  # fmt: skip
    large = tmp_path / "large.model"
    large.write_bytes(train_tokenizer.train_sentencepiece(words, 65536, 1.0))
    source = write_jsonl(tmp_path / "b.jsonl", words[:50])
    manifest = preprocess(large, [source], tmp_path / "large", "--valid-fraction", 0)
    assert manifest["dtype"] == "int32"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(large))
    assert [d[:-1] for d in stored(tmp_path / "large")] == tokenizer.encode(words[:50])


def test_manifest_describes_settings_and_inputs(model, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(40))
    manifest = preprocess(model, [source], tmp_path / "out", "--valid-fraction", 0.2)
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == 360
    assert manifest["settings"]["input"][0][:2] == [str(source), source.stat().st_size]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for split in ("train", "valid"):
        result = stored(tmp_path / "out", split)
        assert manifest["splits"][split] == {
            "documents": len(result),
            "tokens": int(np.sum([len(ids) for ids in result])),
            "bytes": sum(len(tokenizer.decode(ids).encode()) for ids in result),
        }


def test_output_of_one_document_is_stated_in_the_singular(model, tmp_path, capsys):
    """Sampled documents are distinct, so that there are at most as many as documents."""
    for texts, phrases in (
        (["one"], ["train: 1 document, ", "verified; it decodes to exactly its source"]),
        (["one", "two"], ["train: 2 documents, ", "2 of 2 sampled documents decode"]),
        (make_texts(30), ["train: 30 documents, ", "8 of 8 sampled documents decode"]),
    ):
        prefix = tmp_path / str(len(texts))
        source = write_jsonl(tmp_path / "texts.jsonl", texts)
        preprocess(model, [source], prefix, "--valid-fraction", 0)
        printed = capsys.readouterr().out
        for phrase in (*phrases, f"wrote {prefix}_train_text_document.{{bin,idx}} and .json"):
            assert phrase in printed
