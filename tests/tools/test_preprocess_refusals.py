"""Tests of tools.preprocess_data with bad input: skipped lines and refusals."""

import functools
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tests.tools.preprocessed import (
    make_texts,
    output_bytes,
    preprocess,
    refusal,
    start,
    write_jsonl,
)


def test_malformed_lines_are_reported_with_file_and_line_and_left_out(model, tmp_path, capsys):
    lines = [json.dumps({"text": text}).encode() for text in make_texts(100)]
    lines[10] = b'{"text": "cut'
    lines[20] = b'{"text": "\xff\xfe"}'
    lines[30] = b'{"body": "no text"}'
    lines[40] = b'["text"]'
    lines[50] = b'{"text": null}'
    lines[60] = b'{"text": "\\ud800"}'
    lines[70] = b""
    lines[80] = b'{"text": "  "}'
    source = tmp_path / "text.jsonl"
    source.write_bytes(b"\n".join(lines))
    options = ["--valid-fraction", 0, "--workers", 2, "--shard-bytes", 300]
    manifest = preprocess(model, [source], tmp_path / "out", *options)
    out = capsys.readouterr().out
    assert manifest["malformed_lines"] == 6 and manifest["empty_documents"] == 1
    assert manifest["splits"]["train"]["documents"] == 92
    assert [example["line"] for example in manifest["malformed_examples"]] == [
        11, 21, 31, 41, 51, 61,
    ]  # fmt: skip
    for number in range(11, 62, 10):
        assert f"{source}: line {number}: " in out
    error = refusal(capsys, model, [source], tmp_path / "few", *options, "--max-malformed", 5)
    assert "--max-malformed 5" in error and f"{source}: line 11: invalid JSON" in error
    # What was done before the stop is not lost to a run with a higher limit.
    preprocess(model, [source], tmp_path / "few", *options, "--max-malformed", 6)
    assert output_bytes(tmp_path / "few") == output_bytes(tmp_path / "out")


def test_malformed_parquet_rows_and_plain_text_are_counted(model, tmp_path):
    table = pyarrow.table({"text": ["a b", None, "c d"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    (tmp_path / "b.txt").write_bytes(b"good\n%%\nline\nbad \xff\n%%\nfine\n")
    manifest = preprocess(
        model, [tmp_path / "a.parquet", tmp_path / "b.txt"], tmp_path / "out",
        "--valid-fraction", 0, "--document-separator", "%%", "--shard-bytes", 10,
    )  # fmt: skip
    assert [(Path(e["path"]).name, e["line"]) for e in manifest["malformed_examples"]] == [
        ("a.parquet", 2), ("b.txt", 4),
    ]  # fmt: skip
    assert manifest["splits"]["train"]["documents"] == 4


def test_late_error_is_one_line_on_stderr(model, tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "good"}\n{bad}\n')
    process = start(model, [source], tmp_path / "out", "--max-malformed", 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"preprocess_data: 1 malformed lines up to {source} exceed") and (
        err.count("\n") == 1
    )


def test_broken_input_files_are_refused_in_one_line(model, tmp_path, capsys):
    texts = make_texts(3000)
    content = write_jsonl(tmp_path / "good.jsonl", texts).read_bytes()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
    cut = {
        "cut.jsonl.gz": gzip.compress(content)[:-2000],
        "cut.jsonl.zst": zstandard.compress(content)[:-2000],
        "no.jsonl.gz": content,
        "no.jsonl.zst": content,
        "cut.parquet": buffer.getvalue()[:-100],
    }
    for name, data in cut.items():
        path = tmp_path / name
        path.write_bytes(data)
        error = refusal(capsys, model, [path], tmp_path / "out")
        assert str(path) in error and "truncated" in error
        assert not list(tmp_path.glob("out*"))


def test_user_errors_are_reported_in_one_line(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(20))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/noise.bin").write_bytes(b"noise")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    prefix = tmp_path / "out"
    refuse = functools.partial(refusal, capsys)
    for name, part in (
        ("none.jsonl", "does not exist"),
        ("*.nothing", "matches no file"),
        ("empty.jsonl", "is empty"),
        ("blank.jsonl", "contains no document"),
        ("noise.bin", "--format"),
        ("a.parquet", "Set --text-key to one of its columns: 'body'"),
        ("b.parquet", "not text"),
        ("folder", "is a folder without a file of text"),
    ):
        assert part in refuse(model, [tmp_path / name], prefix), name
    error = refuse(model, [source], prefix, "--text-key", "Texts")
    assert "no column 'Texts'. Did you mean 'text'?" in error
    (tmp_path / "qa.csv").write_text('question,explanation\n"Why?","Because\nso"\n')
    error = refuse(model, [tmp_path / "qa.csv"], prefix, "--text-key", "explanations")
    assert "Did you mean 'explanation'?" in error and "--text-key" in error
    assert "SentencePiece" in refuse(tmp_path / "noise.bin", [source], prefix)
    assert "No such file" in refuse(tmp_path / "no.model", [source], prefix)
    assert "Not a directory" in refuse(model, [source], source / "out")
    assert "Raise it" in refuse(model, [source], prefix, "--valid-fraction", 0.0001)
    assert "below 1" in refuse(model, [source], prefix, "--valid-fraction", 1)
    assert "--workers" in refuse(model, [source], prefix, "--workers", 0)
    assert "Remove it" in refuse(model, [source], prefix, "--valid-input", source)
    both = ["--valid-input", tmp_path / "blank.jsonl", "--valid-fraction", 0.1]
    assert "exclude each other" in refuse(model, [source], prefix, *both)
    assert "--no-such-flag is not a flag of" in refuse(model, [source], prefix, "--no-such-flag")
    assert output_bytes(prefix) == {}
