"""Tests of the table of patches against the installed versions, the code and its page."""

import ast
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from megatron_ext import patches
from megatron_ext.patches.table import GROUPS, PATCHES
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[2]
LIBRARY = [
    ROOT / "pretrain_et.py",
    *(
        path
        for folder in ("megatron_ext", "alignment", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (ROOT / "megatron_ext" / "patches") not in path.parents
    ),
]
PATCHED_PACKAGES = ("torch", "megatron")
STATE = ("_results_queue", "_GLOBAL_TENSORBOARD_WRITER")
"""Global variables of Megatron, which its own functions assign as well."""


def _locate_all() -> list[str]:
    """Return the targets and sources that do not exist in the installed versions."""
    missing = []
    for patch in PATCHES:
        module, function = patch.source.split(":")
        if not callable(getattr(import_module(module), function, None)):
            missing.append(patch.source)
        for target in patch.targets:
            try:
                patches.locate(target)
            except (AttributeError, ImportError):
                missing.append(target)
    return missing


@pytest.mark.slow
def test_every_target_and_source_exists():
    assert run_ranks(_locate_all, 1) == [[]]


def test_every_target_has_one_entry():
    counts = Counter(target for patch in PATCHES for target in patch.targets)
    assert [target for target, count in counts.items() if count > 1] == []


def test_every_entry_is_complete():
    assert {patch.group for patch in PATCHES} == set(GROUPS)
    for patch in PATCHES:
        for text in (patch.reason, patch.removable, patch.upstream):
            assert text[0].isupper() or text.startswith("torch"), text
            assert text.endswith("."), text
        assert patch.versions.startswith(("torch", "megatron-core"))


def test_locate_of_an_unknown_target_raises():
    with pytest.raises(AttributeError, match="no_such_function"):
        patches.locate("json.no_such_function")
    with pytest.raises(AttributeError, match="no module"):
        patches.locate("no_such_package.function")


def test_patched_restores_attributes_and_items():
    class Base:
        def name(self) -> str:
            return "base"

    class Derived(Base):
        pass

    with patches.patched(Derived, "name", lambda self: "patched"):
        assert Derived().name() == "patched"
    assert Derived().name() == "base" and "name" not in vars(Derived)
    values = {"present": 1}
    with patches.patched(values, "present", 2), patches.patched(values, "absent", 3):
        assert values == {"present": 2, "absent": 3}
    assert values == {"present": 1}


class _Changes(ast.NodeVisitor):
    """Places of a module that change an attribute of Megatron or torch."""

    def __init__(self) -> None:
        self.imported: set[str] = set()
        self.places: list[int] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in PATCHED_PACKAGES:
                self.imported.add(alias.asname or alias.name.split(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] in PATCHED_PACKAGES:
            self.imported |= {alias.asname or alias.name for alias in node.names}

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._check(target, node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else name
        if name in ("setattr", "delattr", "patched", "object") and node.args:
            self._check(ast.Attribute(node.args[0], ""), node.lineno)
        self.generic_visit(node)

    def _check(self, target: ast.expr, line: int) -> None:
        if not isinstance(target, ast.Attribute | ast.Subscript):
            return
        if isinstance(target, ast.Attribute) and target.attr in STATE:
            return
        owner: ast.expr = target.value
        while isinstance(owner, ast.Attribute | ast.Subscript):
            owner = owner.value
        if isinstance(owner, ast.Name) and owner.id in self.imported:
            self.places.append(line)


def test_no_module_changes_megatron_or_torch_outside_the_table():
    results = []
    for path in LIBRARY:
        changes = _Changes()
        changes.visit(ast.parse(path.read_text()))
        results += [f"{path.relative_to(ROOT)}:{line}" for line in changes.places]
    assert results == []


def test_no_library_module_uses_mock():
    using = [str(path) for path in LIBRARY if "unittest" in path.read_text()]
    assert using == []


def _page_tables() -> str:
    """Return the part of the page that shows the table, with one section for each group."""
    lines = []
    for group, when in GROUPS.items():
        lines += ["", f"## {group.capitalize()}", "", when, ""]
        for patch in (patch for patch in PATCHES if patch.group == group):
            names = [f"`{target}`" for target in patch.targets]
            if len(names) > 6:
                owners = dict.fromkeys(target.rpartition(".")[0] for target in patch.targets)
                names = [f"{len(names)} names in {', '.join(f'`{name}`' for name in owners)}"]
            lines += [
                f"- **Targets**: {', '.join(names)}",
                f"    - Reason: {patch.reason}",
                f"    - Replacement: `{patch.source}`",
                f"    - Upstream: {patch.upstream}",
                f"    - Versions: {patch.versions}",
                f"    - Removable: {patch.removable}",
            ]
    return "\n".join(lines) + "\n"


def test_page_shows_the_table():
    page = (ROOT / "docs" / "reference" / "patches.md").read_text()
    assert page.endswith(_page_tables())
