"""Tests of the model on Transformer Engine on a machine without a GPU: all but its forward pass.

`make te-check` makes the environment and runs them. Parameters, checkpoints, conversion and
optimizer must be those of the model in plain torch, which other tests train.
"""

import json
import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT, torchrun
from tests.training.layouts import EP2, LAYOUTS, MODEL, TP2, WHOLE_EXPERTS

if PathFinder.find_spec("transformer_engine") is None:
    pytest.skip("needs transformer-engine, see make te-check", allow_module_level=True)

pytestmark = pytest.mark.timeout(1800)

# Each implementation, and that in plain torch of the same precision.
BASELINES = {
    "sequential": "torch",
    "grouped": "torch",
    "sequential, bf16": "torch, bf16",
    "grouped, bf16": "torch, bf16",
    "grouped, fp8": "torch, bf16",
}
NAMES = [f"{layout.name}, {layout.kind}, {layout.pool}" for layout in LAYOUTS] + ["Muon"]
CONVERTED = [
    number
    for number in range(len(NAMES))
    if number == len(LAYOUTS) or LAYOUTS[number].kind != "mamba"
]
Rows = dict[tuple[int, str], list[dict[str, Any]]]
DRY = ("--dry-run", "8", "--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "2")


def environment() -> dict[str, str]:
    """Return the environment in which Transformer Engine finds the libraries of CUDA."""
    packages = [Path(path, "nvidia") for path in sys.path]
    folders = [str(folder) for path in packages for folder in path.glob("*/lib")]
    return {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": os.pathsep.join(folders)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Return what every rank of every layout builds, by the layout's number and implementation."""
    file = tmp_path_factory.mktemp("te") / "shapes.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.te.shapes", str(file)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    read = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["layout"], row["implementation"]): row["ranks"] for row in read}


@pytest.mark.parametrize("implementation", BASELINES)
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_ranks_build_what_they_build_in_torch(rows: Rows, number: int, implementation: str) -> None:
    expected = rows[number, BASELINES[implementation]]
    result = rows[number, implementation]
    assert len(result) == len(expected) >= 1
    linear = {"TEColumnParallelLinear", "TERowParallelLinear"}
    grouped = {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
    for rank, own in zip(expected, result):
        assert not any(name.startswith("TE") for name in rank["modules"])
        assert linear | (grouped if "grouped" in implementation else set()) <= set(own["modules"])
        # A rank of a hybrid model may have no attention.
        attention = "SDPAttention" in rank["modules"]
        assert ("TEDotProductAttention" in own["modules"]) == attention
        for kind in ("parameters", "marks", "counts", "saved", "live", "groups"):
            assert own[kind] == rank[kind], kind


@pytest.mark.parametrize("implementation", BASELINES)
@pytest.mark.parametrize("number", CONVERTED, ids=[NAMES[number] for number in CONVERTED])
def test_conversion_finds_every_tensor(rows: Rows, number: int, implementation: str) -> None:
    ranks = rows[number, implementation]
    saved = {place.split(" ")[0] for rank in ranks for place in rank["live"]}
    # A converted model has no depths of multi-token prediction.
    assert {key for key in saved if not key.startswith("mtp.")} == set(ranks[0]["converted"])


@pytest.mark.parametrize("implementation", BASELINES)
def test_muon_steps_each_matrix_of_each_expert(rows: Rows, implementation: str) -> None:
    (rank,) = rows[NAMES.index("Muon"), implementation]
    groups = {name: kind for name, (kind, *_) in rank["groups"].items()}
    assert groups.keys() == rank["parameters"].keys()
    experts = [name for name in groups if re.search(r"experts\.linear_fc[12]\.weight\d$", name)]
    assert len(experts) == 3 * 4 * 2
    for name, kind in groups.items():
        matrix = re.search(r"linear_(qkv|proj|fc1|fc2)\.weight\d?$", name)
        assert kind == ("TensorParallelMuon" if matrix else "FusedAdam"), name


@pytest.mark.parametrize("experts", [(), ("--moe-grouped-gemm",)], ids=["sequential", "grouped"])
@pytest.mark.parametrize(
    "ranks, layout",
    [(1, ()), (2, EP2), (2, (*TP2, *EP2, *WHOLE_EXPERTS))],
    ids=["one rank", "EP 2", "TP 2, EP 2"],
)
def test_a_checkpoint_of_either_loads_into_the_other_and_is_exported(
    tmp_path: Path, ranks: int, layout: tuple[str, ...], experts: tuple[str, ...]
) -> None:
    te = ("--transformer-impl", "transformer_engine", *experts)
    folders = ["-", *(str(tmp_path / f"checkpoint-{number}") for number in range(3))]
    exports = []
    for number, implementation in enumerate([(), te, ()]):
        report = tmp_path / f"report-{number}"
        module = ["-m", "tests.te.weights", str(report), folders[number], folders[number + 1]]
        command = [*module, *MODEL, *layout, *implementation]
        done = torchrun(command, ranks, env=environment(), timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        exports.append(json.loads(report.read_text()))
    assert exports[0] == exports[1] == exports[2]
    assert sum("experts" in name for name in exports[0]) >= 3 * 4 * 2


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_a_dry_run_works_next_to_transformer_engine(implementation: str) -> None:
    flags = [*MODEL, *DRY, "--sequence-parallel", "--transformer-impl", implementation]
    command = [sys.executable, "pretrain_et.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 8


def test_training_on_transformer_engine_is_refused_without_a_gpu(tmp_path: Path) -> None:
    flags = [*MODEL, "--run-dir", str(tmp_path / "run"), "--transformer-impl", "transformer_engine"]
    done = torchrun(["pretrain_et.py", *flags], 1, env=environment())
    assert "transformer_engine needs the package transformer-engine and a GPU" in done.stderr
    assert not (tmp_path / "run").exists()


def test_training_in_torch_works_next_to_transformer_engine(tmp_path: Path) -> None:
    flags = [*MODEL, "--run-dir", str(tmp_path / "run"), "--train-iters", "2", "--save", ""]
    done = torchrun(["pretrain_et.py", *flags], 1, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
