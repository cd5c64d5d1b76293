"""Checks of the versions of installed packages."""

import importlib.metadata
import os
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder

from packaging.requirements import Requirement

from megatron_ext.planning.preflight.findings import FAILED, WARNING, CheckResult

# Packages that a run on GPUs uses in addition to those that every run needs.
_GPU = ("transformer-engine",)


def check_versions(has_gpu: bool) -> Iterator[tuple[str, CheckResult]]:
    """Yield the name and the result of each check on packages.

    Args:
        has_gpu: Whether the run uses a GPU.
    """
    installed, outside = {}, []
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        yield "packages", CheckResult("megatron-et is not installed: pip install -e .", WARNING)
        requirements = []
    for requirement in requirements:
        version = _version(requirement.name)
        if version is None:
            continue
        installed[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            outside.append((requirement, version))
    for requirement, version in outside:
        message = (
            f"version {version} is outside of {requirement.specifier}: "
            f"pip install '{requirement.name}{requirement.specifier}'"
        )
        yield requirement.name, CheckResult(message, FAILED)
    if installed:
        versions = ", ".join(f"{name} {installed[name]}" for name in ("torch", "megatron-core"))
        fit = len(installed) - len(outside)
        yield (
            "packages",
            CheckResult(f"{versions} and others, {fit} of {len(installed)} within their ranges"),
        )
    yield from _check_apex(PathFinder.find_spec("apex"))  # works also where the CPU device hides it
    if any(requirement.name == "transformer-engine" for requirement, _ in outside):
        return
    if "transformer-engine" in installed:
        yield "transformer-engine", CheckResult(f"version {installed['transformer-engine']}")
    elif has_gpu:
        message = (
            "is not installed: layers are plain torch, slower and without FP8; "
            "pip install 'megatron-et[gpu]'"
        )
        yield "transformer-engine", CheckResult(message, WARNING)
    else:
        yield "transformer-engine", CheckResult("not installed, and not used without a GPU")


def _requirements() -> list[Requirement]:
    """Return the version ranges of the packages that every run needs and that a GPU adds."""
    lines = importlib.metadata.requires("megatron-et") or []
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or (requirement.name in _GPU and requirement.marker.evaluate({"extra": "gpu"}))
    ]


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_apex(spec: ModuleSpec | None) -> Iterator[tuple[str, CheckResult]]:
    """Check that an installed apex is NVIDIA's, and not PyPI's web framework of that name."""
    if spec is None:
        yield "apex", CheckResult("not installed; Transformer Engine or torch is used instead")
        return
    folders = list(spec.submodule_search_locations or [])
    nvidia = any(
        os.path.isdir(os.path.join(folder, "optimizers"))
        and os.path.isdir(os.path.join(folder, "multi_tensor_apply"))
        for folder in folders
    )
    if nvidia:
        yield "apex", CheckResult(f"NVIDIA's, in {folders[0]}")
    else:
        where = folders[0] if folders else spec.origin
        message = (
            f"{where} is not NVIDIA's apex but the web framework that PyPI has under that name: "
            "pip uninstall apex, and build NVIDIA's from https://github.com/NVIDIA/apex if you "
            "want it"
        )
        yield "apex", CheckResult(message, FAILED)
