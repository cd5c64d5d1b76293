"""Tests of the installation: metadata, tested versions, make targets, and the choice of Python."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_ext
from tools import __main__ as et

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["megatron_ext", "alignment", "tools"]
TARGETS = [
    "quickstart", "test", "test-slow", "test-all", "lint", "docs", "bench", "gpu-test",
    "vllm-test", "test-oldest", "te-check", "system-deps", "clean",
]  # fmt: skip


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> Metadata:
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (file,) = folder.glob("*.dist-info/METADATA")
    return Metadata.from_email(file.read_bytes(), validate=False)


@pytest.fixture(scope="module")
def direct(metadata) -> dict[str, Requirement]:
    """Return the direct dependencies of `.[dev]` by name."""
    requirements = metadata.requires_dist
    return {
        canonicalize_name(requirement.name): requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"})
    }


@pytest.fixture(scope="module")
def tested():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # no file, host or marker
    versions = {canonicalize_name(name): version for name, version in (p.split("==") for p in pins)}
    assert len(versions) == len(pins)
    return versions


def test_metadata_names_the_project_its_python_and_its_extras(metadata):
    assert metadata.name == "megatron-et"
    assert "3.12.0" in metadata.requires_python and "3.11.9" not in metadata.requires_python
    assert {"gpu", "deepspeed", "vllm", "wandb", "mlflow", "dev"} <= set(metadata.provides_extra)
    assert metadata.license_expression == "Apache-2.0" or metadata.license == "Apache-2.0"


def test_the_tested_versions_cover_the_direct_dependencies_within_their_ranges(direct, tested):
    assert direct.keys() - tested.keys() == set()
    outside = [name for name, need in direct.items() if tested[name] not in need.specifier]
    assert outside == []


def tracked(*patterns: str) -> set[str]:
    """Return the tracked files in some folders, without Python modules."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    files = done.stdout.splitlines()
    if not files:
        pytest.skip("needs a git checkout")
    return {file for file in files if not file.endswith(".py")}


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory) -> Path:
    """Return the folder of a wheel's installation, made from a copy of the sources offline."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("megatron_ext", "alignment", "tools", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "pretrain_et.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=240)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = [*pip, "install", "--no-deps", "--no-index", "-q", "--target", str(target), wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=240)
    return target


def installed_et(site_packages: Path, folder: Path, *words: str):
    return subprocess.run(
        [site_packages / "bin/et", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.fspath(site_packages)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_wheel_adds_three_names_to_site_packages(site_packages):
    names = {entry.name for entry in site_packages.iterdir()}
    names = {name for name in names if not name.endswith(".dist-info")} - {"bin", "__pycache__"}
    assert names == {"megatron_ext", "alignment", "pretrain_et.py"}
    assert {file.name for file in (site_packages / "bin").iterdir()} == {"et", "et-align"}


def test_wheel_contains_every_data_file_and_recipe(site_packages):
    expected = tracked("megatron_ext", "alignment")
    expected |= {f"megatron_ext/{file}" for file in tracked("examples")}
    assert [file for file in sorted(expected) if not (site_packages / file).is_file()] == []


def test_wheel_has_no_program_of_the_examples_and_imports_no_folder_of_the_checkout(site_packages):
    modules = [*site_packages.rglob("*.py")]
    assert not [file for file in modules if "examples" in file.relative_to(site_packages).parts]
    roots = {"examples", "tools", "tests", "benchmarks"}
    for file in modules:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not roots & {name.partition(".")[0] for name in names}, file


def test_installed_scripts_start_the_console_script(site_packages, tmp_path):
    """A program that prints its arguments after the options replaces torchrun."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "bin/et").write_text('#!/usr/bin/env bash\nprintf \'%s\\n\' "$0" "$@"\n')
    for file in python, tmp_path / "bin/et":
        file.chmod(0o755)
    (tmp_path / "tools").mkdir()  # of the user
    examples = site_packages / "megatron_ext/examples"
    variables = {**os.environ, "PYTHON": os.fspath(python), "NPROC_PER_NODE": "1"}

    def run(script: Path, *words: str, **more: str):
        done = subprocess.run(
            ["bash", script, *words], cwd=tmp_path, env=variables | more, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr

    et = os.fspath(tmp_path / "bin/et")
    for words, expected in (
        (("-m", "tools.eval_core", "--out", "x"), ["eval_core", "--out", "x"]),
        (("-m", "alignment", "judge", "--help"), ["align", "judge", "--help"]),
        (("pretrain_et.py", "--recipe", "a b"), ["pretrain", "--recipe", "a b"]),
    ):
        status, lines, _ = run(examples / "torchrun/one_node.sh", *words)
        assert status == 0 and lines[-len(expected) - 2 :] == ["--no-python", et, *expected]
    status, _, message = run(examples / "torchrun/one_node.sh", "train.py")
    assert status == 2 and "train.py is no program here. Give pretrain_et.py" in message
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.jsonl").touch()
    status, lines, _ = run(
        examples / "slurm/preprocess.sbatch", "shards", "out", "--text-key", "t",
        SLURM_SUBMIT_DIR=os.fspath(tmp_path), SLURM_ARRAY_TASK_ID="0",
    )  # fmt: skip
    assert status == 0 and lines[:4] == [et, "preprocess-data", "--input", "shards/a.jsonl"]
    (tmp_path / "bin/et").unlink()
    status, _, message = run(examples / "torchrun/one_node.sh", "-m", "tools.serve")
    assert status == 2 and "install the project for" in message


def test_installed_commands_work_in_a_folder_with_packages_of_the_same_names(
    site_packages, tmp_path
):
    for name in ("tools", "alignment", "megatron_ext", "examples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    assert installed_et(site_packages, tmp_path, "--version").stdout.startswith("megatron-et ")
    done = installed_et(site_packages, tmp_path, "ngram_baseline", "--help")
    assert done.stdout.startswith("usage: et ngram-baseline "), done.stderr
    done = installed_et(site_packages, tmp_path, "align", "agreement", "--help")
    assert "et align agreement" in done.stdout, done.stderr
    done = installed_et(site_packages, tmp_path, "align", "agreement", "--nonsense")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_installed_recipes_are_read_by_their_name_in_the_repository(site_packages, tmp_path):
    code = """
from argparse import ArgumentParser
from megatron_ext.recipes import expand_recipes
parser = ArgumentParser()
parser.add_argument("--num-layers")
try:
    print(expand_recipes(["--recipe", "examples/recipes/d12.yaml"], parser))
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.fspath(site_packages)},
        capture_output=True,
        text=True,
    )
    assert f"{site_packages}/megatron_ext/examples/recipes/" in done.stdout, done.stderr


def test_et_lists_every_command_of_tools_with_a_sentence():
    modules = {file.stem for file in (ROOT / "tools").glob("*.py")} - {"__init__", "__main__"}
    assert {name.replace("-", "_") for name in et.COMMANDS} == modules | {"pretrain", "align"}
    assert all(text[0].isupper() and text.endswith(".") for text in et.COMMANDS.values())


@pytest.mark.parametrize("words", [["reprot"], ["preproces_data"], ["algn"], ["align", "dta"]])
def test_et_answers_a_misspelled_command_with_the_nearest_and_without_torch(words):
    code = "import sys; from tools.__main__ import entry\n"
    code += "try: entry()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    nearest = {"reprot": "report", "preproces_data": "preprocess-data", "algn": "align"}
    assert f"Did you mean {nearest.get(words[0], 'data')}?" in done.stderr


def test_version_is_that_of_the_library(metadata):
    assert str(metadata.version) == megatron_ext.__version__


def test_apex_is_not_a_dependency(metadata):
    assert all(need.name != "apex" for need in metadata.requires_dist)


def _imported_at_the_top(file: Path) -> set[str]:
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_unconditional_imports_are_declared_dependencies(metadata):
    declared = {
        canonicalize_name(requirement.name)
        for requirement in metadata.requires_dist
        if 'extra == "dev"' not in str(requirement.marker)
    }
    # The plug-in is imported by vLLM alone.
    plug_in = ROOT / "megatron_ext" / "vllm"
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    files = [file for file in files if plug_in not in file.parents]
    assert files
    imported = set().union(*map(_imported_at_the_top, files))
    ours = {*PACKAGES, "pretrain_et"}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        name
        for name in imported - ours - set(sys.stdlib_module_names)
        if declared.isdisjoint(map(canonicalize_name, distributions.get(name, [])))
    }
    assert undeclared == set()


@pytest.mark.parametrize("target", TARGETS)
def test_makefile_has_the_target(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_make_alone_lists_every_target():
    done = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert set(TARGETS) <= {line.split()[0] for line in done.stdout.splitlines()}


def _tool(name: str) -> str:
    path = shutil.which(name)
    assert path, f"{name} is not installed"
    return path


def _program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


GOOD = f'exec "{sys.executable}" "$@"'  # this Python
OLD = f'exec "{sys.executable}" -c "raise SystemExit(1)"'  # what the probe gets from Python 3.11
SHIM = 'echo "pyenv: $0: command not found" >&2; exit 127'  # pyenv's, for an inactive version


class Machine:
    """Checkout on a machine with only the interpreters that a test adds."""

    def __init__(self, folder: Path):
        self.home, self.bin, self.project = folder / "home", folder / "bin", folder / "project"
        self.home.mkdir()
        self.bin.mkdir()
        for command in ("bash", "cat", "cksum", "dirname", "ls", "mv", "rm", "sh", "sort"):
            (self.bin / command).symlink_to(_tool(command))
        (self.project / "tools").mkdir(parents=True)
        for name in ("tools/bootstrap.sh", "setup.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.project / name)

    def bootstrap(self, *args: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "tools/bootstrap.sh", *args],
            cwd=self.project,
            env={"HOME": os.fspath(self.home), "PATH": os.fspath(self.bin), **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def finds(self, **variables: str) -> str:
        done = self.bootstrap("--find", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path) -> Machine:
    machine = Machine(tmp_path)
    _program(machine.bin / "python3.11", OLD)
    _program(machine.bin / "python3", OLD)
    return machine


def test_bootstrap_advises_where_python_is_too_old(machine):
    for args in (["--find"], []):
        done = machine.bootstrap(*args)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "3.12" in line and "PYTHON=" in line
    assert not (machine.project / ".venv").exists()


def test_bootstrap_passes_by_shims_and_finds_a_pyenv_version_that_is_not_active(machine):
    _program(machine.bin / "python3.12", SHIM)
    _program(machine.home / ".pyenv/versions/3.11.7/bin/python", OLD)
    good = _program(machine.home / ".pyenv/versions/3.12.1/bin/python", GOOD)
    assert machine.finds() == str(good)


def test_bootstrap_honours_pyenv_root(machine, tmp_path):
    good = _program(tmp_path / "elsewhere/versions/3.13.0/bin/python", GOOD)
    assert machine.finds(PYENV_ROOT=str(tmp_path / "elsewhere")) == str(good)


def test_bootstrap_prefers_the_path_to_pyenv(machine):
    _program(machine.home / ".pyenv/versions/3.12.1/bin/python", GOOD)
    good = _program(machine.bin / "python3.13", GOOD)
    assert machine.finds() == str(good)


def test_bootstrap_asks_uv_last(machine):
    good = _program(machine.home / "uv-python", GOOD)
    _program(machine.bin / "uv", f'[ "$1 $2" = "python find" ] && echo "{good}"')
    assert machine.finds() == str(good)


def test_bootstrap_uses_or_refuses_the_python_of_the_user(machine):
    _program(machine.bin / "python3.12", GOOD)
    named = _program(machine.home / "mine", GOOD)
    assert machine.finds(PYTHON=str(named)) == str(named)
    done = machine.bootstrap("--find", PYTHON=str(machine.bin / "python3.11"))
    assert done.returncode == 2
    assert "python3.11 is not a Python of version 3.12 or newer" in done.stderr


# A Python whose `-m venv DIR` makes an environment with a stand-in for pip, which writes down
# its arguments and fails when the file `offline` is there.
FAKE_VENV = """
case "$*" in
*"-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$HOME/fake-pip" "$folder/bin/python"
    ;;
esac
"""
FAKE_PIP = """
case "$*" in
*"pip install"*)
    test ! -e "$HOME/offline" || exit 1
    echo "$*" >>"$HOME/installed"
    ;;
esac
"""


@pytest.fixture
def fresh(machine) -> Machine:
    for command in ("cp", "mkdir"):
        (machine.bin / command).symlink_to(_tool(command))
    _program(machine.bin / "python3.12", FAKE_VENV)
    _program(machine.home / "fake-pip", FAKE_PIP)
    return machine


def _installed(machine: Machine) -> list[str]:
    file = machine.home / "installed"
    return file.read_text().splitlines() if file.exists() else []


def test_bootstrap_installs_once_until_the_packages_change(fresh):
    for _ in range(2):
        assert fresh.bootstrap().returncode == 0
        assert len(_installed(fresh)) == 1
    assert "-c constraints.txt -e .[dev]" in _installed(fresh)[0]
    with (fresh.project / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    fresh.bootstrap()
    assert len(_installed(fresh)) == 2


def test_bootstrap_installs_the_lowest_versions_into_a_separate_environment(fresh):
    for _ in range(2):
        assert fresh.bootstrap("--oldest").returncode == 0
    uv, packages = _installed(fresh)
    assert uv.endswith("-m pip install --disable-pip-version-check uv")
    assert packages.endswith("--resolution lowest-direct -e .[dev]")
    assert ".venv-oldest/bin/python" in packages and "constraints.txt" not in packages
    assert not (fresh.project / ".venv").exists()


def test_bootstrap_adds_packages_without_their_dependencies_once(fresh):
    for _ in range(2):
        assert fresh.bootstrap("text==1.0", "more==2.0").returncode == 0
    assert len(_installed(fresh)) == 2
    assert _installed(fresh)[1].endswith("--no-deps text==1.0 more==2.0")


def test_bootstrap_reports_a_failed_install_and_tries_again(fresh):
    (fresh.home / "offline").touch()
    done = fresh.bootstrap()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "check the network" in line
    (fresh.home / "offline").unlink()
    assert fresh.bootstrap().returncode == 0
    assert len(_installed(fresh)) == 1
