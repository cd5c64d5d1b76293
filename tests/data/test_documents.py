"""Tests of documents that are read one shard at a time."""

import bz2
import codecs
import gzip
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.preprocessing.parts import group_shards
from megatron_ext.data.shards import Shard, TextFormat, expand_inputs, plan_shards
from megatron_ext.errors import UserError


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")), min_size=1
    ),
    st.integers(1, 40),
    st.sampled_from(["jsonl", "groups", "lines"]),
)
def test_shards_of_any_size_hold_every_document_once_in_order(tmp_path, lines, size, kind):
    """The reference is json.loads of each line, or str.split."""
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
    layout = TextFormat(
        "jsonl" if kind == "jsonl" else "text", separator="\n" if kind == "lines" else ""
    )
    texts, count = [], 0
    for shard in plan_shards([str(path)], layout, size):
        reader = ShardReader(shard, layout)
        texts += list(reader)
        count += reader.lines
        assert reader.consumed <= shard.size
    assert texts == expected
    assert count == len(lines)


@pytest.mark.parametrize("rows", [200, 10_000], ids=["many row groups", "one row group"])
def test_a_parquet_file_is_read_without_holding_it(tmp_path, rows):
    choose = random.Random(0)
    texts = [choose.randbytes(2000).hex() for _ in range(10_000)]
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=rows)
    size = path.stat().st_size
    [shard] = plan_shards([str(path)], TextFormat(), 1 << 30)
    before, peak = pyarrow.total_allocated_bytes(), 0
    for text, document in zip(texts, ShardReader(shard, TextFormat()), strict=True):
        assert text == document
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert 0 < peak < size / 3


def read_all(path, size=1 << 30, separator=None):
    """Return every document of a file, read in shards of about this size."""
    layout = TextFormat(separator=separator)
    shards = plan_shards([str(path)], layout, size)
    return [document for shard in shards for document in ShardReader(shard, layout)]


TEXTS = ["first \u2028 line", "second", "third"]
LINES = b"".join(
    json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n" for text in TEXTS
)


def long_window(content):
    """Return a frame of unknown size with the largest window that zstd writes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


SKIPPABLE = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"


def file_name(value):
    """Return the file as the name of a case, because gzip content depends on the time."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    "name, content",
    [
        ("plain.JSONL", LINES),
        ("mark.jsonl", codecs.BOM_UTF8 + LINES),
        ("members.JSONL.GZ", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
        ("padded.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + LINES) + bytes(512)),
        ("window.jsonl.zst", long_window(LINES)),
        ("frames.jsonl.Zst", SKIPPABLE + zstandard.compress(LINES[:9]) + SKIPPABLE
         + zstandard.compress(LINES[9:]) + SKIPPABLE),
        ("a.jsonl.bz2", bz2.compress(LINES[:9]) + bz2.compress(LINES[9:])),
        ("a.ndjson.xz", lzma.compress(LINES)),
    ],
    ids=file_name,
)  # fmt: skip
def test_files_of_any_compression_mark_and_case_are_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_all(tmp_path / name) == TEXTS


@pytest.mark.parametrize("size", [1, 2, 3, 4, 30, 1000])
def test_byte_order_mark_is_not_part_of_a_document(size, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + LINES)
    assert read_all(tmp_path / "a.jsonl", size) == TEXTS
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n")
    assert read_all(tmp_path / "a.txt", size, "\n") == ["one", "two"]
    assert read_all(tmp_path / "a.txt", size) == ["one\ntwo\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_refused_by_their_mark(encoding, tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes("text".encode(encoding))
        with pytest.raises(UserError, match=rf"{name} is {encoding.upper()} text\. Convert it"):
            read_all(tmp_path / name)


@pytest.mark.parametrize(
    "name, content",
    [
        ("garbage.jsonl.gz", gzip.compress(LINES) + b"garbage"),
        ("cut.jsonl.bz2", bz2.compress(LINES)[:-4]),
        ("no.jsonl.bz2", LINES),
        ("cut.jsonl.xz", lzma.compress(LINES)[:-4]),
        ("no.jsonl.xz", LINES),
        ("garbage.jsonl.zst", zstandard.compress(LINES) + b"garbage"),
    ],
    ids=file_name,
)
def test_documents_of_damaged_files_are_refused_by_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is truncated or broken: "):
        read_all(tmp_path / name)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        pyarrow.large_string(),
        pyarrow.string_view(),
    ],
    ids=str,
)
def test_every_kind_of_text_column_is_read(kind, tmp_path):
    column = pyarrow.array([*TEXTS, None, TEXTS[0]], pyarrow.string())
    try:
        table = pyarrow.table({"text": column.cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "a.Parquet")
    except pyarrow.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pyarrow.__version__} writes no columns of {kind}")
    *documents, null, last = read_all(tmp_path / "a.Parquet")
    assert (
        documents == TEXTS
        and last == TEXTS[0]
        and isinstance(null, MalformedRecord)
        and null.line == 4
    )


def test_parquet_columns_without_text_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    for column, message in (
        (pyarrow.array([b"a"]), "contains binary, not text"),
        (pyarrow.array([None]), "contains null, not text"),
        (pyarrow.array([{"text": "a"}]), "not text"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(UserError, match=message):
            read_all(path)
    twice = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match="has 2 columns 'text'"):
        read_all(path)


def test_expand_inputs_returns_linked_files_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "c.txt").hardlink_to(tmp_path / "a.txt")
    (tmp_path / "d.txt").write_text("a")
    paths = expand_inputs([f"{tmp_path}/*.txt", f"{tmp_path}/b.txt"])
    assert paths == [f"{tmp_path}/a.txt", f"{tmp_path}/d.txt"]


def test_small_shards_are_grouped_in_order_up_to_a_share_of_the_shard_size():
    sizes = [10, 20, 70, 1, 99, 1, 500, 0, 100, 30]
    shards = [Shard(f"{i}", "text", 0, None, size) for i, size in enumerate(sizes)]
    groups = group_shards(shards, 1600)  # at most 100 bytes together
    assert [[shard.size for shard in group] for group in groups] == [
        [10, 20, 70], [1, 99], [1], [500], [0, 100], [30],
    ]  # fmt: skip
    assert [shard for group in groups for shard in group] == shards


def test_folder_means_its_files_with_text(tmp_path):
    names = ["b/two.TXT", "a.csv.gz", "b/.hidden/x.txt", ".y.txt", "picture.png", "empty.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else b"x")
    assert expand_inputs([str(tmp_path)]) == [f"{tmp_path}/a.csv.gz", f"{tmp_path}/b/two.TXT"]


def test_csv_column_is_read_with_quoted_newlines_and_compression(tmp_path):
    content = b'n,"the text"\n1,"one\n\nstill ""one"""\n2,\n3,zwei\n'
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF8 + content)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.tsv.zst").write_bytes(zstandard.compress(content.replace(b",", b"\t")))
    layout = TextFormat(text_key="the text")
    for path in sorted(tmp_path.iterdir()):
        [shard] = plan_shards([str(path)], layout, 5)
        assert list(ShardReader(shard, layout)) == ['one\n\nstill "one"', "", "zwei"]


def test_json_arrays_are_read_whole(tmp_path):
    objects = [{"text": "a\nb"}, {"n": 1, "text": "ü"}, {"other": 1}, "no object"]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(objects, indent=indent))
        *texts, missing, other = read_all(tmp_path / "a.json", size=5)
        assert texts == ["a\nb", "ü"]
        assert isinstance(missing, MalformedRecord) and missing.line == 3
        assert isinstance(other, MalformedRecord) and "not" in other.reason
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": objects[:2]}, indent=1))
    assert read_all(tmp_path / "a.json") == ["a\nb", "ü"]


def test_json_array_without_the_text_is_refused_with_the_nearest_key(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"Text": "a"}, {"n": 1}], indent=1))
    with pytest.raises(UserError, match=r"no column 'text'\. Did you mean 'Text'\?"):
        read_all(tmp_path / "a.json")
