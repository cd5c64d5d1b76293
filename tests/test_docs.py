"""The commands of the documentation, run as they stand."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.distributed import ROOT, SINGLE_THREADED
from tests.warm import warm_path

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page, script",
    [(page, script) for page in PAGES for script in blocks(page)],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_commands_run(page: Path, script: str, tmp_path: Path) -> None:
    script = script.replace("runs/", f"{tmp_path}/")
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED, "PATH": warm_path(), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_targets_and_flags_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"`make ([a-z-]+)[ `]", page.read_text()):
            assert target in targets, (page, target)
