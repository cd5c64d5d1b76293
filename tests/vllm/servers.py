"""Real vLLM servers for tests, and Expert Threshold folders that they serve.

`make vllm-test` makes the environment of vLLM and names its Python in VLLM_PYTHON.
"""

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from megatron_ext.hf.configs import save_config
from megatron_ext.hf.families import OWN, read_config
from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM, Router
from megatron_ext.moe.thresholds import Thresholds
from tests.hf.models import add_tokenizer

VOCAB = 256
# Largest distance of log-probabilities in fp32. On one CPU rounding gives 1.05e-5, 11 units in the
# last place of values between 8 and 16. A missing softcap changes log-probabilities by 0.4 nats,
# which greedy tokens alone do not show.
FP32 = 2e-5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention on CPUs has no smaller heads
    "max_position_embeddings": 2048,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "moe_layers": [0, 1, 1, 1],
}
KINDS: dict[str, dict[str, Any]] = {
    # as pretrain_et.py makes them: squared ReLU, norms without scale, a softcap
    "paper": {"shared_expert_intermediate_size": 64},
    # as tools.upcycle makes them
    "upcycled": {
        "gated_mlp": True, "hidden_act": "silu", "norm_scale": True, "qk_norm": False,
        "embedding_norm": False, "qkv_bias": True, "logit_softcap": 0.0,
        "router_gate": "softmax", "tie_word_embeddings": True,
    },
}  # fmt: skip


def set_thresholds(
    router: Router, levels: torch.Tensor, config: ExpertThresholdConfig, updates: int = 5
) -> None:
    """Set the thresholds of a router as the average of some updates; without any they are biased.

    Args:
        router: The router.
        levels: Thresholds, `[experts]`.
        config: Configuration of the model.
        updates: Number of updates.
    """
    decay = config.threshold_ema_decay
    router.threshold_average.copy_(levels * (1 - decay ** max(updates, 1)))
    router.threshold_updates.fill_(updates)
    state = Thresholds(config.num_experts, decay, device="cpu")
    state.load_state_dict(
        {"average": router.threshold_average, "updates": router.threshold_updates}
    )
    router.thresholds.copy_(state.value() if updates else router.threshold_average)


def make_model(folder: Path, kind: str, seed: int = 0, updates: int = 5, **sizes: Any) -> Any:
    """Write a random Expert Threshold model with a fan-out of about two, and return it."""
    config = ExpertThresholdConfig(**SIZES | KINDS[kind] | sizes)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = ExpertThresholdForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for router in model.modules():
            if isinstance(router, Router):
                experts = config.num_experts
                set_thresholds(router, torch.normal(1.0, 0.5, (experts,)), config, updates)
    save_model(model, folder)
    add_tokenizer(folder, config.vocab_size)
    return model


def save_model(model: Any, folder: Path) -> None:
    """Write a model with its code, as tools.convert_checkpoint does."""
    model.save_pretrained(folder)
    save_config(folder, read_config(model.config), OWN, torch.float32, {"eos_token_id": 1})


Process = subprocess.Popen[bytes]


def vllm_python() -> str:
    """Return the Python of vLLM's environment, or skip the test."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("vLLM needs an environment of its own: make vllm-test")
    return python


def free_port() -> int:
    """Return a port that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start(
    folder: Path, *flags: str, log: Path, port: int | None = None, **env: str
) -> tuple[Process, str]:
    """Start a server, and return its process and its address."""
    python = vllm_python()
    port = port or free_port()
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--dtype", "float32", "--max-model-len", "2048",
        "--max-num-seqs", "16", "--logprobs-mode", "processed_logprobs", *flags,
    ]  # fmt: skip
    base = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=base | settings | env,
        stdin=subprocess.DEVNULL,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, f"http://127.0.0.1:{port}"


def stop(process: Process) -> None:
    """Stop a server with its workers."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


def wait_until_ready(process: Process, url: str, log: Path) -> None:
    """Wait until a server is healthy."""
    deadline = time.monotonic() + 280
    while True:
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


@contextmanager
def serve(folder: Path, *flags: str, log: Path, **env: str) -> Iterator[str]:
    """Run a server while the context lasts, and give its address."""
    process, url = start(folder, *flags, log=log, port=None, **env)
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        stop(process)


@contextmanager
def serve_policy(place: Path, *flags: str) -> Iterator[Any]:
    """Serve an Expert Threshold policy while the context lasts.

    Args:
        place: Folder of the model and the logs.
        flags: Further flags of the server.

    Yields:
        Namespace with the `model`, the `url` with /v1, the `process`, and the function `begin` that
        starts the server again on the same port.
    """
    make_model(place / "model", "paper")
    port = free_port()

    def begin(log: str = "log") -> Process:
        return start(place / "model", *flags, log=place / log, port=port)[0]

    url = f"http://127.0.0.1:{port}"
    served = SimpleNamespace(model=place / "model", url=f"{url}/v1", begin=begin, process=begin())
    try:
        wait_until_ready(served.process, url, place / "log")
        yield served
    finally:
        stop(served.process)


def complete(url: str, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Any]:
    """Return the choices of concurrent greedy requests, with log-probabilities."""

    async def one(http: httpx.AsyncClient, prompt: Sequence[int]) -> Any:
        body = {
            "model": "policy", "prompt": list(prompt), "max_tokens": 16, "temperature": 0,
            "logprobs": 0, "prompt_logprobs": 0, "return_token_ids": True, "ignore_eos": True,
        } | settings  # fmt: skip
        response = await http.post(f"{url}/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(timeout=120) as http:
            return await asyncio.gather(*(one(http, prompt) for prompt in prompts))

    return asyncio.run(ask())
