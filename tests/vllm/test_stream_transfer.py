"""Streams of weights to a real vLLM: it computes what the training does, or refuses."""

import json
import os
import signal
import threading
import time
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM
from megatron_ext.vllm import TRANSFER_BACK_END
from tests.alignment.chat_model import make_model as make_dense
from tests.alignment.rl.vllm_training import drawn, learn
from tests.distributed import run_ranks
from tests.vllm.servers import (
    FP32,
    make_model,
    serve,
    serve_policy,
    stop,
)
from tests.vllm.test_served_models import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]
BACK_END = ["--weight-transfer-config", json.dumps({"backend": TRANSFER_BACK_END})]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """An Expert Threshold policy, and a server that was started from it; a test restarts it."""
    with serve_policy(tmp_path_factory.mktemp("experts"), *BACK_END) as served:
        yield served


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


@pytest.fixture(scope="module")
def second_url(experts, tmp_path_factory):
    """Address of another server, of two ranks."""
    flags = ["--tensor-parallel-size", "2", *BACK_END]
    with serve(experts.model, *flags, log=tmp_path_factory.mktemp("second") / "log") as url:
        yield f"{url}/v1"


def test_two_servers_receive_the_weights_of_two_ranks(experts, second_url, tmp_path):
    results = run_ranks(
        learn, 2, experts.model, tmp_path / "run", f"{experts.url} {second_url}", 60.0, False,
        16, False, 64, partial(recording_transfer, tmp_path, "gloo"), timeout=500,
    )  # fmt: skip
    for row in results[0][0]:
        assert row["rollout_gap_max"] < FP32


def test_a_server_that_is_killed_in_a_step_and_restarted_gets_its_weights(experts, tmp_path):
    run = tmp_path / "run"

    def restart():
        while not drawn(run, 2):
            time.sleep(0.005)
        os.killpg(experts.process.pid, signal.SIGKILL)
        stop(experts.process)
        experts.process = experts.begin("second.log")  # with the weights from before the training

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    [(rows, _)] = run_ranks(
        learn, 1, experts.model, run, experts.url, 300.0, True, 16, False, 64,
        partial(recording_transfer, tmp_path, "gloo"), timeout=800,
    )  # fmt: skip
    thread.join(10)
    assert len(rows) == 3
    # The responses of the third step are of the weights after the first.
    policy = ExpertThresholdForCausalLM.from_pretrained(experts.model)
    policy.load_state_dict(torch.load(tmp_path / "v1.pt"))
    lines = []
    for file in run.glob("rollouts/step_000002/ahead_*.jsonl"):
        lines += [json.loads(line)["answer"] for line in file.read_text().splitlines()]
    assert len(lines) == 16
    for line in lines:
        prompt = [5, int(line["task"]), 7]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + line["tokens"]])).logits[0]
        table = (logits.float() / 0.8).log_softmax(-1)
        for place, token in enumerate(line["tokens"], len(prompt) - 1):
            value = line["log_probs"][place - len(prompt) + 1]
            assert value == pytest.approx(float(table[place, token]), abs=FP32)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A dense policy with a tied output layer, and a server that was started from it."""
    place = tmp_path_factory.mktemp("tied")
    make_dense(
        place / "model", num_hidden_layers=1, max_position_embeddings=512, head_dim=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    with serve(place / "model", "--max-model-len", "512", *BACK_END, log=place / "log") as url:
        yield SimpleNamespace(model=place / "model", url=f"{url}/v1")


def test_a_stream_updates_a_tied_output_layer(tied, tmp_path):
    [(rows, _)] = run_ranks(
        learn, 1, tied.model, tmp_path / "run", tied.url, 60.0, False, 16, False, 64,
        partial(recording_transfer, tmp_path, "gloo"), timeout=300,
    )  # fmt: skip
    assert len(rows) == 3
    for row in rows:
        assert row["rollout_gap_max"] < FP32
        assert row["grad_norm"] > 0.01


def test_a_tied_output_layer_that_a_folder_would_not_update_is_refused(tied, tmp_path):
    message = r"loads an output layer that is tied .* only once.*run/served/latest, or use --weig"
    with pytest.raises(Exception, match=message):
        run_ranks(learn, 1, tied.model, tmp_path / "run", tied.url, 60.0, timeout=300)


def update_wrongly(folder, url):
    """Return the errors of wrong updates, which a right one follows."""
    from alignment.rl.stream_transfer import StreamTransfer
    from alignment.rl.vllm_servers import VLLMServer, VLLMServers

    tensors = dict(ExpertThresholdForCausalLM.from_pretrained(folder).state_dict())
    name = "model.layers.1.self_attn.k_proj.weight"
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    wrong = {
        "shape": rest | {name: tensors[name][:-1].clone()},
        "name": rest | {name.replace("k_proj", "x_proj"): tensors[name]},
        "part": rest,  # of the packed projections
        "expert": {other: t for other, t in tensors.items() if ".experts.3." not in other},
        "nothing": {},
    }
    servers, errors = VLLMServers([url], 60.0, lambda: None), {}
    for case, stream in (wrong | {"right": tensors}).items():
        engine = SimpleNamespace(parameters=stream.items)
        transfer = StreamTransfer(engine, "gloo", 60.0, 50_000)
        transfer.prepare(0)
        servers.call(VLLMServer.pause)
        try:
            transfer.update_weights(0, servers)
        except UserError as error:
            errors[case] = str(error)
        servers.call(VLLMServer.resume)
    return errors


def test_wrong_tensors_are_refused_and_others_accepted_after_them(experts, tmp_path):
    make_model(tmp_path / "other", "paper", seed=1)  # other weights and thresholds
    [errors] = run_ranks(update_wrongly, 1, tmp_path / "other", experts.url, timeout=300)
    assert errors.keys() == {"shape", "name", "part", "expert", "nothing"}
    for message in errors.values():
        assert "/update_weights refuses" in message
    other = ExpertThresholdForCausalLM.from_pretrained(tmp_path / "other")
    assert_equal(other, experts.url.removesuffix("/v1"))
