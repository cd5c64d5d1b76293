"""Tests that installing next to a container's packages changes none of them, as the page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.distributed import ROOT

PAGE = (ROOT / "docs/reference/versions.md").read_text()
(COMMANDS,) = re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
CONTAINERS = re.findall(r"^\| (\d\d\.\d\d) \| (\S+) \| (\S*) ?\| (\S*) ?\|$", PAGE, re.MULTILINE)
COMPILED = {"torch", "numpy", "transformer-engine", "transformer-engine-cu13", "apex", "triton"}


def environment(folder: Path, packages: dict[str, str]) -> Path:
    """Make an environment whose metadata name packages, which it does not have, with versions."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in packages.items():
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (metadata.parent / "INSTALLER").write_text("pip\n")
        (metadata.parent / "RECORD").write_text("")
    return folder / "bin/python"


def install(folder: Path, python: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the commands of the page, without installing, and return the packages to install."""
    report = folder / "report.json"
    pip = f"{sys.executable} -m pip --python {python} --disable-pip-version-check"
    script = COMMANDS.replace("python -m pip", pip).replace("container.txt", f"{folder}/only.txt")
    script = script.replace(" install ", f" install --dry-run --report {report} ")
    done = subprocess.run(["bash", "-ec", script], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return done, set()
    changes = json.loads(report.read_text())["install"]
    return done, {canonicalize_name(change["metadata"]["name"]) for change in changes}


def test_the_page_lists_the_containers_of_a_year() -> None:
    assert len(CONTAINERS) >= 9


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("container", CONTAINERS, ids=[row[0] for row in CONTAINERS])
def test_installing_in_a_container_changes_no_compiled_package(
    tmp_path: Path, container: tuple[str, str, str, str]
) -> None:
    _, torch, numpy, engine = container
    packages = {
        "torch": torch,
        "numpy": numpy or "2.1.0",
        "transformer-engine": engine or "2.11.0",
        "apex": "0.1",
        "triton": "3.5.1",
    }
    done, names = install(tmp_path, environment(tmp_path / "venv", packages))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"megatron-et", "megatron-core", "transformers"} <= names
    assert not names & COMPILED


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_container_below_the_range_is_refused_and_torch_is_named(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", {"torch": "2.8.0a0+34c6371d24.nv25.08"})
    done, _ = install(tmp_path, python)
    assert done.returncode != 0
    assert "depends on torch" in done.stdout + done.stderr
