"""Streams of weights to a real vLLM: it computes what the training does, or refuses."""

import json
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.vllm import TRANSFER_BACK_END
from tests.alignment.rl.test_vllm_rollouts import learn
from tests.distributed import run_ranks
from tests.vllm.servers import free_port, make_model, start, stop, wait_until_ready

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]
FP32 = 1e-5
BACK_END = ["--weight-transfer-config", json.dumps({"backend": TRANSFER_BACK_END})]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """An Expert Threshold policy, and a server that was started from it; a test restarts it."""
    place = tmp_path_factory.mktemp("experts")
    make_model(place / "model", "paper")
    port = free_port()

    def begin(log="log"):
        return start(place / "model", *BACK_END, log=place / log, port=port)[0]

    served = SimpleNamespace(
        model=place / "model", url=f"http://127.0.0.1:{port}/v1", begin=begin, process=begin()
    )
    try:
        wait_until_ready(served.process, served.url.removesuffix("/v1"), place / "log")
        yield served
    finally:
        stop(served.process)


def recording_transfer(place, transport, engine):
    """Return a transfer with small buckets that also saves each version."""
    from alignment.rl.stream_transfer import StreamTransfer
    from megatron_ext.vllm.weight_stream import unpack

    class Recording(StreamTransfer):
        def prepare(self, version):
            super().prepare(version)
            if self.buckets:
                pairs = chain.from_iterable(unpack(b.places, b.data) for b in self.buckets)
                tensors = {name: tensor.clone() for name, tensor in pairs}
                torch.save(tensors, place / f"v{version}.pt")

    return Recording(engine, transport, 120.0, 50_000)


@pytest.mark.parametrize("ranks, transport", [(1, "gloo"), (2, "ipc")])
def test_log_probs_are_those_of_the_training_at_every_step(experts, ranks, transport, tmp_path):
    transfer = partial(recording_transfer, tmp_path, transport)
    (rows, _), *_ = run_ranks(
        learn, ranks, experts.model, tmp_path / "run", experts.url, 60.0, False, 16, False, 64,
        transfer, timeout=500,
    )  # fmt: skip
    assert len(rows) == 3
    for row in rows:
        assert row["rollout_gap_max"] < FP32
        assert row["grad_norm"] > 0.01
    assert not (tmp_path / "run" / "served").exists()
