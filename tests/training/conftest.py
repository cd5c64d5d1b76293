"""Data for tests of training."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a small indexed dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "text_train_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in range(40):
        builder.add_document(np.arange(document, document + 60) % 127, [60])
    builder.finalize(f"{prefix}.idx")
    return prefix
