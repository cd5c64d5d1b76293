"""Tests that run the commands of the documentation unchanged."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
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
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_bash_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Run the blocks of a page one after the other, as a reader does."""
    script = "\n".join(blocks(page)).replace("runs/", f"{tmp_path}/")
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=ROOT,
        env={**os.environ, **SINGLE_THREADED, "PATH": warm_path(), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_navigation_of_the_site_and_its_index_name_every_page() -> None:
    navigation, index = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs/index.md").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert f"- {name}\n" in navigation
        assert name == "index.md" or f"]({name})" in index


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="make docs installs mkdocs")
def test_site_is_built_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "order_statistics" in (tmp_path / "reference/api/index.html").read_text()


def test_links_have_targets() -> None:
    for page in PAGES:
        for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", page.read_text()):
            if target.startswith("http"):
                continue
            file = (page.parent / target) if target else page
            assert file.exists(), (page, target)
            assert not anchor or anchor in anchors_of(file), (page, target, anchor)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as Markdown names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    words = [re.sub(r"[^\w\s-]", "", text).strip().lower() for text in texts]
    return {re.sub(r"[-\s]+", "-", word) for word in words}


def test_targets_and_flags_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"`make ([a-z-]+)[ `]", page.read_text()):
            assert target in targets, (page, target)
