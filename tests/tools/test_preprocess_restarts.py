"""Tests of tools.preprocess_data after interruptions, damage and repetitions."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_ext.data.preprocessing import dataset_output
from megatron_ext.data.preprocessing.dataset_output import DatasetOutput
from tests.tools.preprocessed import (
    command,
    make_texts,
    output_bytes,
    preprocess,
    refusal,
    start,
    write_jsonl,
)
from tools import preprocess_data


def wait_for_parts(prefix, process, count):
    deadline = time.monotonic() + 60
    while len(list(Path(f"{prefix}.parts").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children_of(pid):
    """Return the ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.fixture(scope="module")
def uncut(model, tmp_path_factory):
    """Return the source, options and bytes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uncut")
    source = write_jsonl(folder / "text.jsonl", make_texts(12_000))
    options = ["--workers", 2, "--valid-fraction", 0.1]
    preprocess(model, [source], folder / "whole", *options)
    return source, [*options, "--shard-bytes", 100_000], output_bytes(folder / "whole")


@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_interrupted_run_resumes_to_identical_output(model, uncut, tmp_path, capsys, signum, code):
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
        assert "run the same command to resume" in out
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.02)
    finished = len(list((tmp_path / "cut.parts").glob("*.json")))
    capsys.readouterr()
    preprocess(model, [source], tmp_path / "cut", *options)
    assert f"reusing {finished} of" in capsys.readouterr().out
    assert output_bytes(tmp_path / "cut") == expected


def test_run_interrupted_between_renames_resumes(model, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(200))
    arguments = command(model, [source], tmp_path / "out", "--valid-fraction", 0.2)
    preprocess_data.main(command(model, [source], tmp_path / "whole", "--valid-fraction", 0.2))
    publish = dataset_output.publish

    def cut(temporary, final):
        publish(temporary, final)
        if final.suffix == ".bin" and "text_document" in final.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(dataset_output, "publish", cut)
    with pytest.raises(KeyboardInterrupt):
        preprocess_data.main(arguments)
    assert not list(tmp_path.glob("out*.idx"))
    monkeypatch.setattr(dataset_output, "publish", publish)
    preprocess_data.main(arguments)
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")


def test_damaged_part_is_detected(model, tmp_path, monkeypatch, capsys):
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


def test_finished_output_is_replaced_only_with_overwrite(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(200))
    prefix = tmp_path / "out"
    preprocess(model, [source], prefix, "--valid-fraction", 0.1)
    before = output_bytes(prefix)
    capsys.readouterr()
    preprocess(model, [source], prefix, "--valid-fraction", 0.1, "--workers", 1)
    assert "is complete already" in capsys.readouterr().out
    error = refusal(capsys, model, [source], prefix, "--valid-fraction", 0)
    assert "valid_fraction" in error and "--overwrite" in error
    assert output_bytes(prefix) == before
    preprocess(model, [source], prefix, "--valid-fraction", 0, "--overwrite")
    assert sorted(output_bytes(prefix)) == [
        "_train_text_document.bin", "_train_text_document.idx",
    ]  # fmt: skip
    write_jsonl(source, make_texts(201))
    assert "another input" in refusal(capsys, model, [source], prefix, "--valid-fraction", 0)


def test_a_second_run_on_the_same_prefix_is_refused(model, tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", make_texts(20))
    with DatasetOutput(str(tmp_path / "out")).locked():
        assert "Another run is writing" in refusal(capsys, model, [source], tmp_path / "out")
    preprocess(model, [source], tmp_path / "out", "--valid-fraction", 0)
