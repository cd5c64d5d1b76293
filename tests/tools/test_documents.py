"""Documents read a shard at a time."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.documents import ShardReader
from tools.shards import Layout, plan_shards


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
    layout = Layout(
        "jsonl" if kind == "jsonl" else "text", separator="\n" if kind == "lines" else ""
    )
    found, count = [], 0
    for shard in plan_shards([str(path)], layout, size):
        reader = ShardReader(shard, layout)
        found += list(reader)
        count += reader.lines
        assert reader.consumed <= shard.size
    assert found == expected
    assert count == len(lines)


@pytest.mark.parametrize("rows", [200, 10_000], ids=["many row groups", "one row group"])
def test_a_parquet_file_is_read_without_holding_it(tmp_path, rows):
    choose = random.Random(0)
    texts = [choose.randbytes(2000).hex() for _ in range(10_000)]
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=rows)
    size = path.stat().st_size
    [shard] = plan_shards([str(path)], Layout(), 1 << 30)
    before, held = pyarrow.total_allocated_bytes(), 0
    for text, found in zip(texts, ShardReader(shard, Layout()), strict=True):
        assert text == found
        held = max(held, pyarrow.total_allocated_bytes() - before)
    assert 0 < held < size / 3
