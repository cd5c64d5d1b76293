"""Rollouts by a server with vLLM's protocol, which loads the weights of the training."""

import json
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.errors import UserError
from tests.alignment.chat_model import make_model
from tests.alignment.judges.kinds.test_endpoint_judge import wait_at_most
from tests.alignment.rl.vllm_training import drawn, learn
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow


class Server(ThreadingHTTPServer):
    """Server of the model that it loaded last, as vLLM does: token ids in and out.

    What a body does not say is as in the folder's generation_config.json.

    Attributes:
        loads: how often the weights were read.
        context: most tokens of a prompt with its response.
        shift: added to the log-probabilities of prompts, as another model would.
        lose: calls for completions whose connection ends without an answer, from now on.
        abort: completions that end with the reason "abort", from now on.
        bodies: of completions.
        away: calls to be answered with an error of the server's.
        busy: resets of the prefix cache that are answered with a failure.
        keys: that callers gave.
        deaf: does not answer health checks until it is `freed`.
        paused: answers no requests.
        broken: cannot read weights, which it reports as vLLM does.
        raw: reports log-probabilities of temperature 1, as vLLM does by default.
        most: completions that it answers; others hang until it is `freed`, and get no answer.
    """

    daemon_threads = True
    # By default 5 connections may wait; the system then resets others when all ranks ask at once.
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model: Any = None
        self.loads, self.away, self.most = 0, 2, 10**6
        self.begun, self.deaf, self.freed = 0, False, threading.Event()
        self.busy, self.raw = 0, False
        self.paused = self.broken = False
        self.context, self.shift, self.lose, self.abort = 64, 0.0, 0, 0
        self.lock = threading.Lock()
        self.calls: list[str] = []
        self.keys: set[str | None] = set()
        self.bodies: list[dict[str, Any]] = []

    def completions(self):
        return self.calls.count("/v1/completions")

    def reload(self, folder):
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.defaults = json.loads((folder / "generation_config.json").read_text())
        self.loads += 1

    def score(self, prompt):
        import torch

        with torch.no_grad():
            table = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        values = [
            {str(token): {"logprob": float(table[place, token]) + self.shift}}
            for place, token in enumerate(prompt[1:])
        ]
        return {"choices": [{"prompt_logprobs": [None, *values]}]}

    def complete(self, body):
        import torch

        generator = torch.Generator().manual_seed(body["seed"])
        tokens, values = list(body["prompt"]), []
        penalty = body.get("repetition_penalty", self.defaults["repetition_penalty"])
        ends = {*body.get("stop_token_ids", [])}
        ends |= set() if body["ignore_eos"] else {*self.defaults["eos_token_id"]}
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens])).logits[0, -1]
            observed = logits[tokens]
            logits[tokens] = torch.where(observed > 0, observed / penalty, observed * penalty)
            table = (logits / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(table.exp(), 1, generator=generator))
            tokens.append(token)
            values.append(float((logits.log_softmax(-1) if self.raw else table)[token]))
            if token in ends:
                break
        completion = tokens[len(body["prompt"]) :]
        reason = "stop" if completion[-1] in ends else "length"
        logprobs = {"token_logprobs": values}
        return {
            "choices": [{"token_ids": completion, "logprobs": logprobs, "finish_reason": reason}]
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server: Any = self.server
        if server.deaf:
            server.freed.wait()
        models = {"data": [{"id": "policy", "max_model_len": server.context}]}
        self.reply(200, models if self.path == "/v1/models" else None)

    def do_POST(self):
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "prompt_logprobs" in body:
            return self.reply(200, server.score(body["prompt"]))
        if self.path == "/v1/completions":
            with server.lock:
                server.lose -= 1
                if server.lose >= 0:
                    self.close_connection = True
                    return None
                server.begun += 1
                late = server.begun > server.most
            if late:
                server.freed.wait()
                self.close_connection = True
                return None
        with server.lock:
            server.calls.append(self.path)
            server.keys.add(self.headers["Authorization"])
            if server.away:
                server.away -= 1
                return self.reply(503, {})
            if self.path in ("/pause?mode=abort", "/resume"):
                server.paused = self.path != "/resume"
                return self.reply(200, {"status": "paused" if server.paused else "resumed"})
            if self.path == "/collective_rpc":
                assert body["method"] == "reload_weights" and server.paused
                if server.broken:
                    return self.reply(500, {"error": {"message": "no such weights"}})
                server.reload(Path(body["kwargs"]["weights_path"]))
                return self.reply(200, {"results": [None]})
            if self.path == "/reset_prefix_cache":
                server.busy -= 1
                return self.reply(200, {"success": server.busy < 0})
            assert self.path == "/v1/completions" and body["model"] == "policy"
            assert body["return_token_ids"] and body["logprobs"] == 0
            server.bodies.append(body)
            answer = server.complete(body)
            server.abort -= 1
            if server.abort >= 0:
                answer["choices"][0] |= {"finish_reason": "abort"}
            return self.reply(200, answer)

    def reply(self, status, value):
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=64)
    # As those of many released models: more than one end token, and a penalty.
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(40)), "repetition_penalty": 1.5})
    )
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.freed.set()
    server.shutdown()
    server.server_close()


def url_of(server):
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def test_vllm_rollouts_use_the_weights_of_every_step(tmp_path, server):
    url = url_of(server)
    key = {"MEGATRON_ET_ROLLOUT_API_KEY": "a key", "MEGATRON_ET_JUDGE_API_KEY": "x"}
    server.busy = 2
    (rows, _), _ = run_ranks(learn, 2, tmp_path / "model", tmp_path / "run", url, 60.0, env=key)
    assert server.keys == {"Bearer a key"}
    assert server.loads == 3 and server.calls.count("/reset_prefix_cache") == 3 + 2
    neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "min_p": 0}
    assert len(server.bodies) == 48
    assert all(body | neutral == body for body in server.bodies)
    # Its log-probabilities are those that training computes, at the same temperature.
    assert all(row["rollout_gap_max"] < 1e-4 for row in rows)
    assert all(row["grad_norm"] > 0.01 for row in rows)
    assert all(row["rollout_staleness"] == 0 for row in rows)
    server.busy = 1000
    with pytest.raises(Exception, match="has not emptied its prefix cache for 1 s"):
        run_ranks(learn, 1, tmp_path / "model", tmp_path / "another", url, 1.0)
    server.away = 1000
    with pytest.raises(Exception, match="has not answered for 1 s"):
        run_ranks(learn, 1, tmp_path / "model", tmp_path / "other", url, 1.0)


def test_vllm_rollouts_stop_at_once_if_weights_cannot_be_loaded(tmp_path, server):
    server.away, server.broken = 0, True
    with pytest.raises(Exception, match=r"refuses every question with status 500: no such weights"):
        run_ranks(learn, 1, tmp_path / "model", tmp_path / "run", url_of(server), 600.0)
    assert server.calls == ["/pause?mode=abort", "/collective_rpc", "/resume"]


def test_vllm_rollouts_with_log_probs_of_temperature_1_end_the_run(tmp_path, server):
    server.away, server.raw = 0, True
    with pytest.raises(Exception, match=r"those of temperature 1, and .* --temperature 0\.8"):
        run_ranks(learn, 1, tmp_path / "model", tmp_path / "run", url_of(server), 60.0)


def test_vllm_rollouts_refuse_servers_of_other_models(tmp_path, server):
    server.away, model, url = 0, tmp_path / "model", url_of(server)
    server.shift = -1.0
    with pytest.raises(Exception, match=r"another model than the policy: .* differ by 1 nats"):
        run_ranks(learn, 2, model, tmp_path / "a", url, 60.0)
    with pytest.raises(Exception, match=r"serves 64 tokens .* --seq-length is 65\. Start it with"):
        run_ranks(learn, 1, model, tmp_path / "b", url, 60.0, False, 16, False, 65)
    assert server.calls.count("/collective_rpc") == 1  # the second one was refused before


def test_vllm_rollouts_load_weights_into_a_server_that_was_lost(tmp_path, server):
    server.away, server.lose, server.abort = 0, 3, 5
    [(rows, _)] = run_ranks(learn, 1, tmp_path / "model", tmp_path / "run", url_of(server), 60.0)
    assert server.loads > 3  # once more, or more often if calls were lost after that
    assert server.completions() == 48 + 5
    assert all(row["rollout_gap_max"] < 1e-4 for row in rows)
    served = tmp_path / "run" / "served"
    assert sorted(path.name for path in served.iterdir()) == ["latest", "v000001", "v000002"]
    assert (served / "latest").resolve() == served / "v000002"


def test_vllm_rollouts_divide_prompts_among_servers(tmp_path, server):
    other = Server()
    threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
    server.away = other.away = 0
    urls = f"{url_of(server)} {url_of(other)}"
    [(rows, _)] = run_ranks(learn, 1, tmp_path / "model", tmp_path / "run", urls, 60.0)
    other.shutdown()
    other.server_close()
    assert server.completions() == other.completions() == 24
    prompts = [{tuple(body["prompt"]) for body in each.bodies} for each in (server, other)]
    assert len(prompts[0]) == len(prompts[1]) == 6 and not prompts[0] & prompts[1]
    assert all(row["rollout_gap_max"] < 1e-4 for row in rows)


@pytest.mark.parametrize("host, warns", [("127.0.0.1", 0), ("10.1.2.3", 0), ("8.8.8.8", 1)])
def test_public_addresses_get_a_warning(host, warns, capsys):
    from alignment.rl.vllm_servers import warn_of_public_address

    warn_of_public_address([f"http://{host}:8000/v1"])
    assert capsys.readouterr().err.count("is no address of a private network") == warns


def log_probs(model, prompt, tokens):
    import torch

    with torch.no_grad():
        table = (model(torch.tensor([prompt + tokens])).logits[0] / 0.8).log_softmax(-1)
    return [float(table[len(prompt) + i - 1, token]) for i, token in enumerate(tokens)]


def test_async_rollouts_sample_the_next_step_during_training(tmp_path, server):
    from transformers import AutoModelForCausalLM

    url, place = url_of(server), tmp_path / "run"
    server.away = 0
    (rows, _), _ = run_ranks(learn, 2, tmp_path / "model", place, url, 60.0, True)
    load = ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    draw = ["/v1/completions"]
    # The second step's responses arrive before the weights of the first step.
    assert server.calls == [*load, *draw * 32, *load, *draw * 16]
    assert [row["rollout_staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["rollout_gap_max"] < 1e-4 < 1e-3 < rows[1]["rollout_gap"]
    assert rows[0]["rollout_weight"] == pytest.approx(1, abs=1e-4) != rows[1]["rollout_weight"]
    start, retained = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 0
    for file in place.glob("rollouts/step_000001/ahead_*.jsonl"):
        for row in (json.loads(line)["answer"] for line in file.read_text().splitlines()):
            values = log_probs(start, [5, int(row["task"]), 7], row["tokens"])
            assert row["version"] == 0 and row["log_probs"] == pytest.approx(values, abs=1e-4)
            retained += 1
    assert retained == 16

    # As a kill leaves it: no checkpoint yet, and half of the third step's on the disk.
    shutil.rmtree(place / "checkpoints")
    server.calls.clear()
    for file in place.glob("rollouts/step_000002/*.jsonl"):
        if file.name.startswith("ahead"):
            file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:4])[:-5])
        else:
            file.unlink()
    [(again, _)] = run_ranks(learn, 1, tmp_path / "model", place, url, 60.0, True)
    assert server.completions() == 16 - 2 * 3
    for row, other in zip(rows, again):
        for name in ("reward", "loss", "grad_norm", "rollout_weight", "rollout_staleness"):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name


def test_async_rollouts_stop_with_the_run(tmp_path, server):
    url = url_of(server)
    server.most = 16 + 4
    [(rows, ended)] = run_ranks(
        learn, 1, tmp_path / "model", tmp_path / "run", url, 60.0, True, 4, True
    )
    assert ended == signal.SIGTERM and len(rows) == 1
    assert drawn(tmp_path / "run", 1) == 4  # responses that had arrived are stored
    # A server that is lost while it samples in advance: the next step reports it.
    server.freed.set()
    server.most = server.begun + 16
    with pytest.raises(Exception, match=r"has not answered for 5 s"):
        run_ranks(learn, 1, tmp_path / "model", tmp_path / "other", url, 5.0, True, 0)
    assert (tmp_path / "other" / "rollouts" / "step_000001").is_dir()


def generate_without_server(folder, url):
    """The sentence that a call ends with, and after how many seconds."""
    from alignment.rl.vllm_rollouts import VLLMRollouts
    from megatron_ext.inference.sampling import Sampling

    engine: Any = SimpleNamespace(data_rank=0, data_size=1, step=0, export=lambda folder, **_: None)
    rollouts = VLLMRollouts(engine, [url], "policy", folder, frozenset([0]), patience=3)
    rollouts._served = 0 if "127.0.0.1" in url else None
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        rollouts.generate([[5]], Sampling(1))
    return str(caught.value), time.monotonic() - begin


def test_vllm_rollouts_abandon_a_hanging_but_not_a_busy_server(tmp_path, server):
    url = url_of(server)
    server.away = server.most = 0
    threading.Timer(6, setattr, (server, "deaf", True)).start()  # it answers at first
    [(message, seconds)] = run_ranks(generate_without_server, 1, tmp_path / "model", url)
    assert "has not answered for 3 s" in message and seconds > 6
    for address in ("localhost:8000/v1", "http://localhost:80a0/v1"):
        [(message, seconds)] = run_ranks(generate_without_server, 1, tmp_path / "model", address)
        assert (
            f"--rollout-url {address.removesuffix('/v1')}" in message
            and "is not the address" in message
        )


class Slow(Server):
    """Takes longer to read weights and to answer than ranks wait for each other."""

    def reload(self, folder):
        time.sleep(5)

    def complete(self, body):
        time.sleep(5 if body["prompt"] == [0] else 0)
        logprobs = {"token_logprobs": [0.0]}
        return {"choices": [{"token_ids": [7], "logprobs": logprobs, "finish_reason": "length"}]}


def draw(folder, url):
    """A response of this rank, and whether signals were looked at meanwhile."""
    import torch.distributed as dist

    from alignment.rl.vllm_rollouts import VLLMRollouts
    from megatron_ext.inference.sampling import Sampling

    wait_at_most(3)
    rank, checks = dist.get_rank(), []
    engine: Any = SimpleNamespace(
        data_rank=rank, data_size=dist.get_world_size(), step=0, export=lambda folder, **_: None
    )
    rollouts = VLLMRollouts(
        engine, [url], "policy", folder, frozenset([0]), check=lambda: checks.append(rank)
    )
    [result] = rollouts.generate([[rank]], Sampling(1))
    return result.tokens, len(checks) > 1


def test_vllm_rollouts_may_take_longer_than_the_collective_timeout(tmp_path):
    server = Slow()
    server.away = 0
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    assert run_ranks(draw, 2, tmp_path, url_of(server)) == [([7], True)] * 2
    server.shutdown()
    server.server_close()
