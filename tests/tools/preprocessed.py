"""Texts, and runs of tools.preprocess_data on them."""

import functools
import json
import random
import subprocess
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.errors import run_tool
from tests.distributed import ROOT
from tests.warm import warm_python
from tools import preprocess_data

WORDS = ["Zürich", "naïve", "漢字", "2024", "threshold", "expert", "router", "gate", "🙂", "the"]


def make_texts(count, seed=0):
    choose = random.Random(seed)
    return [f"{i} " + " ".join(choose.choices(WORDS, k=3 + i % 40)) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def command(model, inputs, prefix, *more):
    return [
        "--tokenizer-model", str(model), "--output-prefix", str(prefix),
        "--input", *map(str, inputs), *map(str, more),
    ]  # fmt: skip


def preprocess(model, inputs, prefix, *more):
    """Run the tool in this process, and return its manifest."""
    preprocess_data.main(command(model, inputs, prefix, *more))
    assert not Path(f"{prefix}.parts").exists()
    return json.loads(Path(f"{prefix}.json").read_text())


def start(model, inputs, prefix, *more):
    return subprocess.Popen(
        [warm_python(), "-m", "tools.preprocess_data", *command(model, inputs, prefix, *more)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def refusal(capsys, model, inputs, prefix, *more):
    """Return the one line on stderr of a run that must exit with 2 and leave no data."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_tool(functools.partial(preprocess_data.main, command(model, inputs, prefix, *more)))
    lines = capsys.readouterr().err.splitlines()
    assert (exit_.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def stored(prefix, split="train"):
    """Return the documents of a split as lists of ids."""
    dataset = IndexedDataset(f"{prefix}_{split}_text_document")
    return [dataset[i].tolist() for i in range(len(dataset))]


def output_bytes(prefix):
    """Return the content of the data files of a prefix."""
    folder, name = Path(prefix).parent, Path(prefix).name
    return {p.name.removeprefix(name): p.read_bytes() for p in folder.glob(f"{name}_*")}
