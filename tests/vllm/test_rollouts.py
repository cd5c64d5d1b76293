"""Training with rollouts of a real vLLM: its log-probabilities are those of the training."""

import shutil
import threading
import time

import pytest

from tests.alignment.rl.test_vllm_rollouts import learn
from tests.distributed import run_ranks
from tests.vllm.servers import make_model, serve, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]
FP32 = 1e-5


def make_llama(folder):
    from tests.alignment.chat_model import make_model as make_dense

    make_dense(folder, num_hidden_layers=1, max_position_embeddings=64, head_dim=32)


@pytest.fixture(params=["dense", "Expert Threshold"])
def model(request, tmp_path):
    folder = tmp_path / "model"
    if request.param == "dense":
        make_llama(folder)
    else:
        make_model(folder, "paper")
    shutil.copytree(folder, tmp_path / "run" / "served")
    return folder


def test_log_probs_of_vllm_are_those_of_the_training(model, tmp_path):
    run = tmp_path / "run"
    with serve(run / "served", "--max-model-len", "64", log=tmp_path / "log") as url:
        [(rows, _)] = run_ranks(learn, 1, model, run, f"{url}/v1", 60.0, timeout=300)
        for row in rows:
            assert row["rollout_gap_max"] < FP32
            assert row["grad_norm"] > 0.01


def test_async_rollouts_have_the_weights_of_the_step_before(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    make_model(model, "paper")
    shutil.copytree(model, run / "served")
    with serve(run / "served", "--max-model-len", "64", log=tmp_path / "log") as url:
        [(rows, _)] = run_ranks(learn, 1, model, run, f"{url}/v1", 60.0, True, timeout=400)
    assert [row["rollout_staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["rollout_gap_max"] < FP32 < rows[1]["rollout_gap"]


def test_a_server_that_is_killed_and_restarted_has_the_weights_of_the_step(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    make_model(model, "paper")
    shutil.copytree(model, run / "served")
    flags = ["--max-model-len", "64"]
    process, url = start(run / "served", *flags, log=tmp_path / "log")
    restarted = []

    def restart():
        while not list(run.glob("rollouts/step_000001*")):
            time.sleep(0.02)
        stop(process)
        port = ["--port", url.rpartition(":")[2]]
        restarted.append(start(run / "served", *flags, *port, log=tmp_path / "log2")[0])

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    try:
        [(rows, _)] = run_ranks(learn, 1, model, run, f"{url}/v1", 300.0, timeout=550)
        thread.join()
        assert len(rows) == 3
        assert all(row["rollout_gap_max"] < FP32 for row in rows)
    finally:
        for each in [process, *restarted]:
            stop(each)
