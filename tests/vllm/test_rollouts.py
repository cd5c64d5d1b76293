"""Training with rollouts of a real vLLM: its log-probabilities are those of the training."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM
from tests.alignment.chat_model import BRIEF, gold, responses, write_rows
from tests.alignment.chat_model import make_model as make_dense
from tests.alignment.rl.vllm_training import drawn, learn
from tests.distributed import run_ranks
from tests.vllm.servers import (
    FP32,
    free_port,
    serve_policy,
    start,
    stop,
    vllm_python,
)

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tied dense policy, its training by a server that was started during it, and the server.

    On CPUs vLLM does not load tied output layers again, so the server is started from what the
    training writes.
    """
    vllm_python()  # skips here, as the server is started in a thread
    place = tmp_path_factory.mktemp("dense")
    make_dense(
        place / "model", num_hidden_layers=1, max_position_embeddings=512, head_dim=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    latest, port, servers = place / "run" / "served" / "latest", free_port(), []

    def start_on_latest():
        while not latest.exists():
            time.sleep(0.2)
        servers.append(start(latest, "--max-model-len", "512", log=place / "log", port=port)[0])

    thread = threading.Thread(target=start_on_latest, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}/v1"
    try:
        [(rows, _)] = run_ranks(learn, 1, place / "model", place / "run", url, 300.0, timeout=500)
        yield SimpleNamespace(rows=rows, url=url, place=place)
    finally:
        thread.join(10)
        for server in servers:
            stop(server)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """An Expert Threshold policy, and a server that was started from it; a test restarts it."""
    flags = ["--max-model-len", "64", "--max-num-seqs", "4"]
    with serve_policy(tmp_path_factory.mktemp("experts"), *flags) as served:
        yield served


def test_log_probs_of_a_tied_dense_model_are_those_of_the_training(dense):
    assert len(dense.rows) == 3
    for row in dense.rows:
        assert row["rollout_gap_max"] < FP32
        assert row["grad_norm"] > 0.01


def test_log_probs_of_an_expert_threshold_model_are_those_of_the_training(experts, tmp_path):
    [(rows, _)] = run_ranks(
        learn, 1, experts.model, tmp_path / "run", experts.url, 60.0, timeout=400
    )
    for row in rows:
        assert row["rollout_gap_max"] < FP32
        assert row["grad_norm"] > 0.01


def sample_at(folder, place, url, temperatures):
    """The largest gap of log-probabilities at each temperature."""
    from alignment.engines.batch import TokenBatch, TokenSample
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.rl.vllm_rollouts import VLLMRollouts
    from megatron_ext.inference.sampling import Sampling

    engine = MegatronEngine(folder, Optimization(steps=9), MegatronLayout(micro_batch=4))
    rollouts = VLLMRollouts(engine, [url], "policy", place, frozenset([0]), 60.0)
    prompts = [[5, n, 7] for n in range(2, 10)]
    gaps = []
    for temperature in temperatures:
        responses = rollouts.generate(prompts, Sampling(20, temperature))
        samples = [TokenSample([*p, *r.tokens], len(p)) for p, r in zip(prompts, responses)]
        scores = engine.log_probs(TokenBatch.of(samples), temperature=temperature).log_probs
        gaps.append(
            max(
                abs(float(scores[row, len(prompt) + place]) - value)
                for row, (prompt, response) in enumerate(zip(prompts, responses))
                for place, value in enumerate(response.log_probs)
            )
        )
    return gaps


def test_log_probs_are_those_of_the_training_at_every_temperature(experts, tmp_path):
    temperatures = (0.05, 0.5, 1.0, 2.0)
    [gaps] = run_ranks(
        sample_at, 1, experts.model, tmp_path, experts.url, temperatures, timeout=300
    )
    # Dividing logits by the temperature divides their rounding too.
    for temperature, gap in zip(temperatures, gaps, strict=True):
        assert gap < FP32 / min(1.0, temperature), (temperature, gaps)


def test_async_rollouts_have_the_weights_of_the_step_before(experts, tmp_path):
    [(rows, _)] = run_ranks(
        learn, 1, experts.model, tmp_path / "run", experts.url, 60.0, True, timeout=400
    )
    assert [row["rollout_staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["rollout_gap_max"] < FP32 < rows[1]["rollout_gap"]


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
    [(rows, _)] = run_ranks(learn, 1, experts.model, run, experts.url, 300.0, True, timeout=550)
    thread.join(10)
    assert len(rows) == 3
    # The responses of the third step are of the weights after the first.
    policy = ExpertThresholdForCausalLM.from_pretrained(run / "served" / "v000001")
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


def test_a_server_of_another_model_is_refused(experts, dense, tmp_path):
    with pytest.raises(Exception, match=r"/collective_rpc refuses|another model than the policy"):
        run_ranks(learn, 1, dense.place / "model", tmp_path / "run", experts.url, 60.0, timeout=300)


def train_judge(place, url):
    from alignment.commands.train_judge import main

    words = [
        *("--stage", "rl", "--thinking", "asked", "--model", place / "model"),
        *("--run-dir", place / "judge", "--input", place / "train.jsonl"),
        *("--gold", place / "train.gold.jsonl", "--template", place / "pointwise-brief.txt"),
        *("--steps", 2, "--batch-size", 8, "--group-size", 4, "--mini-batches", 1),
        *("--seq-length", 512, "--max-new-tokens", 24, "--lr", 1e-3, "--micro-batch-size", 4),
        *("--rollout-url", url),
    ]
    code = main([str(word) for word in words])
    rows = (place / "judge" / "metrics.jsonl").read_text().splitlines()
    return code, [json.loads(row) for row in rows]


def test_train_judge_with_rollouts_of_the_server(dense):
    items = responses(16, 1)
    write_rows(dense.place / "train.jsonl", items)
    write_rows(dense.place / "train.gold.jsonl", gold(items))
    (dense.place / "pointwise-brief.txt").write_text(BRIEF)
    [(code, rows)] = run_ranks(train_judge, 1, dense.place, dense.url, timeout=300)
    assert code == 0 and len(rows) == 2
    assert rows[0]["rollout_gap_max"] < FP32


def annotate(*words):
    from alignment.commands.annotate import main

    return main([str(word) for word in words])


def test_annotate_fits_answers_into_the_context_of_the_server(dense, capfd):
    """By default it requests answers of 8,192 tokens, and the server serves 512."""
    place = dense.place
    items = responses(6, 3)
    write_rows(place / "items.jsonl", items)
    (place / "pointwise-brief.txt").write_text(BRIEF)
    server = ("--judge", dense.url, "--model", "policy")
    code = annotate(
        *server, "--input", place / "items.jsonl", "--output", place / "verdicts.jsonl",
        "--template", place / "pointwise-brief.txt", "--max-failed", 1,
    )  # fmt: skip
    assert code == 0
    verdicts = [json.loads(line) for line in (place / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 6
    # Random weights write no label; without the limit the server would refuse every call.
    output = capfd.readouterr().out
    assert "6 new answers" in output and "calls failed" not in output
    assert "serves 512 tokens of a prompt with its answer" in output

    write_rows(place / "prompts.jsonl", [item.prompt for item in items])
    code = annotate(
        *server, "--generate", "--input", place / "prompts.jsonl", "--output",
        place / "answers.jsonl", "--temperature", 1, "--seed", 0,
    )  # fmt: skip
    assert code == 0
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6 and all(answer["text"] for answer in answers)
