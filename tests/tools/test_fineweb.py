"""Tests of shards in the format of FineWeb-Edu: streaming, blending, and array tasks."""

import os
import subprocess

import numpy as np
import pyarrow.parquet
import pytest

from examples import fineweb_shard
from megatron_ext.errors import UserError
from tests.distributed import ROOT
from tests.tools.preprocessed import output_bytes, preprocess
from tests.warm import warm_python


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return the folder of two shards of different articles."""
    folder = tmp_path_factory.mktemp("shards")
    for number, skip in enumerate((0, 20)):
        name = str(folder / f"{number:03}_00000.parquet")
        fineweb_shard.main(["--output", name, "--documents", "20", "--skip", str(skip)])
    return folder


def test_shards_have_the_columns_of_fineweb_edu_and_each_article_once(shards):
    tables = [pyarrow.parquet.read_table(file) for file in sorted(shards.iterdir())]
    texts = [text for table in tables for text in table["text"].to_pylist()]
    assert len(set(texts)) == 40
    for table in tables:
        assert table.schema.equals(fineweb_shard.SCHEMA)
        scores, whole = np.array(table["score"]), np.array(table["int_score"])
        assert ((scores >= 2.5) & (scores <= 5)).all() and (abs(scores - whole) <= 0.5).all()


def test_shard_with_too_few_articles_is_refused(tmp_path):
    with pytest.raises(UserError, match="leaves 0 articles, fewer than --documents 500"):
        fineweb_shard.main(["--output", str(tmp_path / "a.parquet"), "--skip", "100000"])


def test_array_task_writes_the_same_as_a_command_for_its_shard(shards, model, tmp_path):
    preprocess(model, [shards / "001_00000.parquet"], tmp_path / "alone", "--valid-fraction", 0.2)
    script = ["bash", "examples/slurm/preprocess.sbatch", str(shards), str(tmp_path / "each")]
    script += ["--tokenizer-model", str(model), "--valid-fraction", "0.2"]
    for task in ("1", "2"):
        environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(
            script, env={**os.environ, **environment, "PYTHON": warm_python()}, cwd=ROOT,
            capture_output=True, text=True,
        )  # fmt: skip
        if task == "2":
            assert (done.returncode, done.stdout) == (2, "")
            assert "no file number 2: submit with --array 0-1" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
    assert output_bytes(tmp_path / "each/001_00000") == output_bytes(tmp_path / "alone")
    assert not list((tmp_path / "each").glob("000*"))
