"""Packages, dependencies and version; the other metadata are in pyproject.toml.

Ranges of dependencies are what should work; constraints.txt is what has been tested.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

INIT = Path(__file__).with_name("megatron_ext") / "__init__.py"
VERSION = re.search(r'^__version__ = "(.*)"$', INIT.read_text(), re.MULTILINE)
assert VERSION is not None


class BuildLibrary(build_py):
    """Build of the library, which contains the recipes of examples/, but not its programs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the modules of a package: none for the examples."""
        if package == "megatron_ext.examples":
            return []
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return modules


setup(
    version=VERSION[1],
    cmdclass={"build_py": BuildLibrary},
    # The commands of tools/ and the recipes are installed within the library, so that nothing
    # called `tools` or `examples` is added to site-packages.
    packages=[
        *find_namespace_packages(include=["megatron_ext*", "alignment*"]),
        "megatron_ext.tools",
        "megatron_ext.examples",
    ],
    package_dir={"megatron_ext.tools": "tools", "megatron_ext.examples": "examples"},
    package_data={
        "": ["*.css", "*.js", "*.txt", "*.jsonl", "*.jinja", "*.html", "py.typed"],
        "megatron_ext.examples": [
            f"**/*.{ending}" for ending in ("yaml", "json", "txt", "sh", "sbatch")
        ],
    },
    py_modules=["pretrain_et"],
    install_requires=[
        "torch>=2.9,<2.15",
        "megatron-core>=0.19.2,<0.20",
        "einops>=0.8",  # of Megatron's Mamba layers
        "emerging-optimizers>=0.3,<0.4",  # Muon
        "numpy>=2.0,<3",
        "packaging>=24.2",
        "scipy>=1.14,<2",
        "psutil>=6",  # without it Megatron fails late, when it saves a checkpoint
        "pyyaml>=6.0.1",
        # text and models
        "sentencepiece>=0.2,<0.3",
        "transformers>=5.18,<6",
        "huggingface_hub>=1",  # whose errors transformers raises
        "tokenizers>=0.22",
        "safetensors>=0.5,<1",
        "markupsafe>=2.1",  # of jinja2
        "jinja2>=3.1",  # chat templates of tokenizers
        "pyarrow>=17",
        "zstandard>=0.23",
        # what a run shows
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
        "rich>=13",
        # judges
        "httpx>=0.27",
        "regex>=2024.5",  # patterns with a time limit
        "scikit-learn>=1.5,<2",  # the monitors' classifier
        # serving
        "pydantic>=2.10,<3",
        "pydantic_core>=2.27",  # of pydantic's version
        "starlette>=1",
        "uvicorn>=0.40",
    ],
    extras_require={
        # Needs CUDA to build. Apex is not listed: NVIDIA's is built from source, and the
        # package called apex on PyPI is an unrelated web framework.
        "gpu": ["transformer-engine[core-cu13,pytorch]>=2.10,<3"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20", "ninja"],
        # The versions that megatron_ext/vllm has been tested with; install without constraints.txt.
        "vllm": ["vllm>=0.32,<0.33"],
        "evaluation": ["lm-eval>=0.4.12,<0.5"],
        "gguf": ["gguf>=0.17"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow>=3.3"],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"],
        "dev": [
            "accelerate>=1.10",  # lm-eval's own model on transformers, to compare with
            "datasets>=3.6",  # of lm-eval, whose newest needs a newer pyarrow than the range has
            "deepspeed>=0.19.8,<0.20",
            "gguf>=0.17",
            "hypothesis>=6.100",
            "krippendorff>=0.8",
            "lm-eval>=0.4.12,<0.5",
            "mlflow-skinny>=3.3",  # the client of mlflow, without its server
            "mypy>=2.0,<3",
            "openai>=2",
            "pytest>=9,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "setuptools>=77",
            "types-psutil>=6",
            "types-PyYAML>=6",
            "wandb>=0.31",
        ],
    },
)
