"""Rollouts by a server that speaks vLLM's protocol, with the weights of the training."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.alignment.chat_model import make_model
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow


class Server(ThreadingHTTPServer):
    """Serves the model of a folder by transformers, as vLLM does: token ids in and out.

    Attributes:
        loads: how often the weights were read.
        away: calls to be answered with an error of the server's.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model: Any = None
        self.folder, self.loads, self.away = folder, 0, 2
        self.lock = threading.Lock()
        self.calls: list[str] = []

    def reload(self):
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.loads += 1

    def complete(self, body):
        import torch

        generator = torch.Generator().manual_seed(body["seed"])
        tokens, values = list(body["prompt"]), []
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens])).logits[0, -1] / body["temperature"]
            table = logits.log_softmax(-1)
            token = int(torch.multinomial(table.exp(), 1, generator=generator))
            tokens.append(token)
            values.append(float(table[token]))
            if token == 0:
                break
        drawn = tokens[len(body["prompt"]) :]
        reason = "stop" if drawn[-1] == 0 else "length"
        logprobs = {"token_logprobs": values}
        return {"choices": [{"token_ids": drawn, "logprobs": logprobs, "finish_reason": reason}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.calls.append(self.path)
            if server.away:
                server.away -= 1
                return self.reply(503, {})
            if self.path == "/collective_rpc":
                assert body == {"method": "reload_weights"}
                server.reload()
                return self.reply(200, {"results": [None]})
            if self.path == "/reset_prefix_cache":
                return self.reply(200, None)
            assert self.path == "/v1/completions" and body["model"] == "policy"
            assert body["return_token_ids"] and body["logprobs"] == 0
            return self.reply(200, server.complete(body))

    def reply(self, status, value):
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def learn(folder, place, url, patience):
    """Rows of three steps with rollouts of the server, on two ranks."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.rl import served
    from alignment.rl.algorithms import ALGORITHMS
    from alignment.rl.rollouts import Rewarded
    from alignment.rl.trainer import ReinforcementStep, Settings, Task
    from alignment.training.loop import Plan, fit
    from alignment.training.run import Run
    from megatron_ext.inference.sampling import Sampling

    served._WAIT = 0.05
    engine = MegatronEngine(folder, Optimization(lr=1e-2, steps=9), MegatronLayout(micro_batch=4))
    rollouts = served.ServedRollouts(engine, [url], "policy", place / "served", 0, patience)
    tasks = [Task(str(n), [5, n, 7], None) for n in range(12)]

    def reward(groups, check):
        return [
            [Rewarded(sum(t % 2 for t in r.tokens) / 6, "score", {}) for r in rollouts_]
            for _, rollouts_ in groups
        ]

    rows = []
    settings = Settings(ALGORITHMS["grpo"], 4, 4, 1, 64, Sampling(6, temperature=0.8))
    with Run(place, engine, {}) as run:
        step = ReinforcementStep(
            engine, run, tasks, reward, settings, 0, generate=rollouts.generate
        )

        def train(number):
            rows.append(step(number))
            return rows[-1]

        fit(run, Plan(3, 100, 100), train)
    return rows


def test_the_server_draws_with_the_weights_of_every_step(tmp_path):
    make_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=64)
    server = Server(tmp_path / "run" / "served")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    rows, _ = run_ranks(learn, 2, tmp_path / "model", tmp_path / "run", url, 60.0)
    assert server.loads == 3 and server.calls.count("/reset_prefix_cache") == 3
    # Its log-probabilities are those that training computes, at the same temperature.
    assert all(row["rollout_gap_max"] < 1e-4 for row in rows)
    assert all(row["grad_norm"] > 0.01 for row in rows)
    server.away = 1000
    with pytest.raises(Exception, match="has not answered for 1 s"):
        run_ranks(learn, 1, tmp_path / "model", tmp_path / "other", url, 1.0)
    server.shutdown()
    server.server_close()
