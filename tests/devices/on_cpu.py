"""Mark of the tests of the CPU device."""

import pytest

from tests.distributed import HAS_GPU

on_cpu = pytest.mark.skipif(HAS_GPU, reason="the CPU device is for machines without CUDA")
