"""Preprocessing: the same tokens from every format, worker count and restart, checked with
Megatron's own reader, and one sentence for every kind of bad input."""

import functools
import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer

from megatron_ext.errors import run_tool
from tools import documents, preprocess_data, train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["Zürich", "naïve", "漢字", "2024", "threshold", "expert", "router", "gate", "🙂", "the"]


def make_texts(count, seed=0):
    choose = random.Random(seed)
    return [f"{i} " + " ".join(choose.choices(WORDS, k=3 + i % 40)) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer of 360 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer.train(make_texts(400), 360, 1.0))
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}
    )


def command(model, inputs, prefix, *more):
    return [
        "--tokenizer-model", str(model), "--output-prefix", str(prefix),
        "--input", *map(str, inputs), *map(str, more),
    ]  # fmt: skip


def preprocess(model, inputs, prefix, *more):
    """Run the tool in this process; its manifest."""
    preprocess_data.main(command(model, inputs, prefix, *more))
    assert not Path(f"{prefix}.parts").exists()
    return json.loads(Path(f"{prefix}.json").read_text())


def stored(prefix, split="train"):
    """The documents of a split as lists of ids."""
    dataset = IndexedDataset(f"{prefix}_{split}_text_document")
    return [dataset[i].tolist() for i in range(len(dataset))]


def output_bytes(prefix):
    """What the data files of a prefix hold."""
    folder, name = Path(prefix).parent, Path(prefix).name
    return {p.name.removeprefix(name): p.read_bytes() for p in folder.glob(f"{name}_*")}


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


def test_every_format_and_compression_gives_the_same_documents(model, tokenizer, tmp_path):
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
    documents_ = stored(tmp_path / "out")
    assert len(files) == 9
    for i, file in enumerate(files):
        assert documents_[i * len(texts) : (i + 1) * len(texts)] == expected, file.name
        assert manifest["inputs"][str(file)]["documents"] == len(texts)
    assert manifest["splits"] == {
        "train": {"documents": 9 * len(texts), "tokens": 9 * sum(map(len, expected))}
    }


def test_a_plain_text_file_is_one_document(model, tokenizer, tmp_path):
    texts = ["one\n\nstill one\n", "two"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    preprocess(model, [tmp_path / "*.txt"], tmp_path / "out", "--valid-fraction", 0)
    assert [tokenizer.detokenize(d[:-1]) for d in stored(tmp_path / "out")] == texts
    options = ["--valid-fraction", 0, "--document-separator", r"\n"]
    preprocess(model, [tmp_path / "*.txt"], tmp_path / "lines", *options)
    lines = [tokenizer.detokenize(d[:-1]) for d in stored(tmp_path / "lines")]
    assert lines == ["one", "still one", "two"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")), min_size=1
    ),
    st.integers(1, 40),
    st.sampled_from(["jsonl", "groups", "lines"]),
)
def test_shards_of_any_size_hold_every_document_once_in_order(tmp_path, lines, size, kind):
    """The reader against the plain definition: json.loads of each line, or str.split."""
    lines = [line.replace("\r", "") for line in lines]
    path = tmp_path / "file"
    if kind == "jsonl":
        path.write_bytes("\n".join(json.dumps({"text": line}) for line in lines).encode())
        expected = lines
    elif kind == "lines":
        path.write_bytes("\n".join([*lines, ""]).encode())
        expected = lines
    else:
        content = "".join(line + "\n" for line in lines)
        path.write_bytes(content.encode())
        groups = ("\n" + content).split("\n\n")
        expected = [text for text in (group.strip("\n") for group in groups) if text]
    layout = documents.Layout(
        "jsonl" if kind == "jsonl" else "text", separator="\n" if kind == "lines" else ""
    )
    found, count = [], 0
    for shard in documents.plan_shards([str(path)], layout, size):
        reader = documents.ShardReader(shard, layout)
        found += list(reader)
        count += reader.lines
        assert reader.consumed <= shard.size
    assert found == expected
    assert count == len(lines)


def test_every_text_comes_back_from_the_dataset(model, tokenizer, tmp_path):
    """decode(read(write(encode(text)))) over texts of every kind, in one run for many texts."""
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
    found = stored(tmp_path / "out")
    assert [tokenizer.detokenize(ids[:-1]) for ids in found] == texts
    assert {ids[-1] for ids in found} == {tokenizer.eod}
    assert not any(tokenizer.eod in ids[:-1] for ids in found)


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


def test_split_depends_on_the_text_and_seed_alone(model, tokenizer, tmp_path):
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


def test_valid_input_is_validated_on_and_nothing_else(model, tokenizer, tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", make_texts(20))
    valid = write_jsonl(tmp_path / "valid.jsonl", make_texts(5, 1))
    preprocess(model, [train], tmp_path / "out", "--valid-input", valid)
    for split, texts in (("train", make_texts(20)), ("valid", make_texts(5, 1))):
        found = stored(tmp_path / "out", split)
        assert [tokenizer.detokenize(ids[:-1]) for ids in found] == texts


def test_dtype_goes_by_the_vocabulary_as_in_megatron(model, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    assert preprocess(model, [source], tmp_path / "small", "--valid-fraction", 0)["dtype"] == (
        "uint16"
    )
    choose = random.Random(0)
    words = [" ".join("".join(choose.choices("abcdefghij", k=9)) for _ in range(9))
             for _ in range(6000)]  # fmt: skip
    large = tmp_path / "large.model"
    large.write_bytes(train_tokenizer.train(words, 65536, 1.0))
    source = write_jsonl(tmp_path / "b.jsonl", words[:50])
    manifest = preprocess(large, [source], tmp_path / "large", "--valid-fraction", 0)
    assert manifest["dtype"] == "int32"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(large))
    assert [d[:-1] for d in stored(tmp_path / "large")] == tokenizer.encode(words[:50])


def start(model, inputs, prefix, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "tools.preprocess_data", *command(model, inputs, prefix, *more)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_parts(prefix, process, count):
    deadline = time.monotonic() + 60
    while len(list(Path(f"{prefix}.parts").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children_of(pid):
    """The ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.fixture(scope="module")
def uncut(model, tmp_path_factory):
    """The source, options and bytes of a run that nobody cuts off."""
    folder = tmp_path_factory.mktemp("uncut")
    source = write_jsonl(folder / "text.jsonl", make_texts(12_000))
    options = ["--workers", 2, "--valid-fraction", 0.1]
    preprocess(model, [source], folder / "whole", *options)
    return source, [*options, "--shard-bytes", 100_000], output_bytes(folder / "whole")


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_cut_off_in_the_middle_goes_on_to_the_same_bytes(
    model, uncut, tmp_path, capsys, signum, code
):
    source, options, expected = uncut
    process = start(model, [source], tmp_path / "cut", *options)
    wait_for_parts(tmp_path / "cut", process, 3)
    children = children_of(process.pid)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert output_bytes(tmp_path / "cut") == {}
    if signum == signal.SIGTERM:
        assert err == ""
        assert "the same command goes on" in out
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.02)
    finished = len(list((tmp_path / "cut.parts").glob("*.json")))
    capsys.readouterr()
    preprocess(model, [source], tmp_path / "cut", *options)
    assert f"reusing {finished} of" in capsys.readouterr().out
    assert output_bytes(tmp_path / "cut") == expected


def test_a_run_cut_off_between_renames_goes_on(model, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(200))
    arguments = command(model, [source], tmp_path / "out", "--valid-fraction", 0.2)
    preprocess_data.main(command(model, [source], tmp_path / "whole", "--valid-fraction", 0.2))
    publish = preprocess_data.publish

    def cut(temporary, final):
        publish(temporary, final)
        if final.suffix == ".bin" and "text_document" in final.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(preprocess_data, "publish", cut)
    with pytest.raises(KeyboardInterrupt):
        preprocess_data.main(arguments)
    assert not list(tmp_path.glob("out*.idx"))
    monkeypatch.setattr(preprocess_data, "publish", publish)
    preprocess_data.main(arguments)
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")


def test_a_damaged_part_is_noticed(model, tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(50))
    write_dataset = preprocess_data.write_dataset

    def damage(split, works, folder, prefix):
        path = next(folder.glob("*.train.bin"))
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        write_dataset(split, works, folder, prefix)

    monkeypatch.setattr(preprocess_data, "write_dataset", damage)
    error = refusal(capsys, model, [source], tmp_path / "out", "--valid-fraction", 0)
    assert "differs from what was written" in error
    assert output_bytes(tmp_path / "out") == {}


def test_finished_output_is_left_alone_and_replaced_only_with_overwrite(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(200))
    prefix = tmp_path / "out"
    preprocess(model, [source], prefix, "--valid-fraction", 0.1)
    before = output_bytes(prefix)
    capsys.readouterr()
    preprocess(model, [source], prefix, "--valid-fraction", 0.1, "--workers", 1)
    assert "all done already" in capsys.readouterr().out
    error = refusal(capsys, model, [source], prefix, "--valid-fraction", 0)
    assert "valid_fraction" in error and "--overwrite" in error
    assert output_bytes(prefix) == before
    preprocess(model, [source], prefix, "--valid-fraction", 0, "--overwrite")
    assert sorted(output_bytes(prefix)) == [
        "_train_text_document.bin", "_train_text_document.idx",
    ]  # fmt: skip
    write_jsonl(source, make_texts(201))
    assert "another input" in refusal(capsys, model, [source], prefix, "--valid-fraction", 0)


def refusal(capsys, model, inputs, prefix, *more):
    """The one line on stderr of a run that must exit with 2 and leave no data."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_tool(functools.partial(preprocess_data.main, command(model, inputs, prefix, *more)))
    lines = capsys.readouterr().err.splitlines()
    assert (exit_.value.code, len(lines)) == (2, 1), lines
    return lines[0]


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


def test_an_error_late_in_a_run_of_its_own_is_one_line_on_stderr(model, tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "good"}\n{bad}\n')
    process = start(model, [source], tmp_path / "out", "--max-malformed", 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"preprocess_data: 1 malformed lines by {source}, more than") and (
        err.count("\n") == 1
    )


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


def test_broken_files_are_answered_with_one_sentence(model, tmp_path, capsys):
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


def test_user_errors_are_answered_with_one_sentence(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(20))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    prefix = tmp_path / "out"
    refuse = functools.partial(refusal, capsys)
    for name, part in (
        ("none.jsonl", "does not exist"),
        ("*.nothing", "matches no file"),
        ("empty.jsonl", "is empty"),
        ("blank.jsonl", "holds no document"),
        ("noise.bin", "--format"),
        ("a.parquet", "set --text-key to one of body"),
        ("b.parquet", "not text"),
        (".", "is a directory"),
    ):
        assert part in refuse(model, [tmp_path / name], prefix), name
    assert "'text'" in refuse(model, [source], prefix, "--text-key", "body")
    assert "SentencePiece" in refuse(tmp_path / "noise.bin", [source], prefix)
    assert "No such file" in refuse(tmp_path / "no.model", [source], prefix)
    assert "Not a directory" in refuse(model, [source], source / "out")
    assert "raise it" in refuse(model, [source], prefix, "--valid-fraction", 0.0001)
    assert "below 1" in refuse(model, [source], prefix, "--valid-fraction", 1)
    assert "--workers" in refuse(model, [source], prefix, "--workers", 0)
    assert "take it out" in refuse(model, [source], prefix, "--valid-input", source)
    both = ["--valid-input", tmp_path / "blank.jsonl", "--valid-fraction", 0.1]
    assert "exclude each other" in refuse(model, [source], prefix, *both)
    assert "unrecognized" in refuse(model, [source], prefix, "--no-such-flag")
    assert output_bytes(prefix) == {}


def test_a_second_run_on_the_same_prefix_is_refused(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(20))
    with preprocess_data.locked(preprocess_data.Output(str(tmp_path / "out"))):
        assert "another run" in refusal(capsys, model, [source], tmp_path / "out")
    preprocess(model, [source], tmp_path / "out", "--valid-fraction", 0)


def test_manifest_says_what_the_output_was_made_of(model, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(40))
    manifest = preprocess(model, [source], tmp_path / "out", "--valid-fraction", 0.2)
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == 360
    assert manifest["settings"]["input"][0][:2] == [str(source), source.stat().st_size]
    for split in ("train", "valid"):
        found = stored(tmp_path / "out", split)
        assert manifest["splits"][split] == {
            "documents": len(found),
            "tokens": int(np.sum([len(ids) for ids in found])),
        }
