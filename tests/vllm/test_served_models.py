"""Expert Threshold models in a real vLLM: log-probabilities equal those of transformers."""

import json
import os
import random
import subprocess
import time

import httpx
import pytest
import torch

from tests.vllm.servers import FP32, VOCAB, complete, make_model, serve, start, stop, vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]


def prompts():
    draw = random.Random(0)
    return [
        [draw.randrange(VOCAB) for _ in range(length)] for length in (1, 2, 9, 40, 130, 200, 2000)
    ]


def differences(model, url, **settings):
    """Return differences of log-probabilities from transformers, and whether greedy tokens differ.

    Args:
        model: The model in transformers.
        url: The server.
        settings: Further settings of the requests.

    Returns:
        Differences for sampled tokens, differences for prompts, and one bool per sampled token.
    """
    sampled, of_prompts, wrong = [], [], []
    for prompt, choice in zip(prompts(), complete(url, prompts(), **settings), strict=True):
        tokens = choice["token_ids"]
        with torch.no_grad():
            table = model(torch.tensor([prompt + tokens])).logits[0].float().log_softmax(-1)
        for index, token in enumerate(tokens):
            row = table[len(prompt) + index - 1]
            wrong.append(int(row.argmax()) != token)
            sampled.append(float(row[token]) - choice["logprobs"]["token_logprobs"][index])
        for index, token in enumerate(prompt[1:] if choice["prompt_logprobs"] else [], 1):
            value = choice["prompt_logprobs"][index][str(token)]["logprob"]
            of_prompts.append(float(table[index - 1, token]) - value)
    return torch.tensor(sampled), torch.tensor(of_prompts), wrong


def assert_equal(model, url):
    sampled, of_prompts, wrong = differences(model, url)
    assert not any(wrong)
    assert sampled.abs().max() < FP32
    assert len(of_prompts) > 2300
    assert of_prompts.abs().max() < FP32
    # Requests without log-probabilities of the prompt take prompts from the prefix cache.
    sampled, _, wrong = differences(model, url, prompt_logprobs=None)
    assert not any(wrong)
    assert sampled.abs().max() < FP32


@pytest.mark.parametrize("kind", ["paper", "upcycled"])
def test_plug_in_equals_transformers_before_and_after_a_reload(kind, tmp_path):
    model = make_model(tmp_path / "first", kind)
    config = tmp_path / "first" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_fan_out": 1}))
    # Chunked prefill: the longest prompt takes 63 passes. Prefix caching is on by default.
    flags = ["--enable-chunked-prefill", "--max-num-batched-tokens", "32"]
    with serve(tmp_path / "first", *flags, log=tmp_path / "log") as url:
        assert_equal(model, url)
        other = make_model(tmp_path / "second", kind, seed=1)  # other weights and thresholds
        body = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(tmp_path / "second")},
        }
        httpx.post(f"{url}/collective_rpc", json=body, timeout=60).raise_for_status()
        response = httpx.post(f"{url}/reset_prefix_cache", timeout=60)
        assert response.json()["success"] is not False
        assert_equal(other, url)
    # The experts have no buffer on a CPU, and answer right above the cap.
    assert "A batch was routed to more experts than max_fan_out" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("kind", ["paper", "upcycled"])
def test_remote_code_without_the_plug_in_equals_transformers(kind, tmp_path):
    model = make_model(tmp_path / "model", kind)
    folder, log = tmp_path / "model", tmp_path / "log"
    with serve(folder, "--trust-remote-code", log=log, VLLM_PLUGINS="none") as url:
        assert_equal(model, url)
    assert "falling back to Transformers implementation" in log.read_text()


# Without pipeline stages: on CPUs vLLM 0.32 has no buffers for what stages send each other.
@pytest.mark.parametrize(
    "flags",
    [
        ["--tensor-parallel-size", "2"],
        ["--tensor-parallel-size", "2", "--enable-expert-parallel"],
    ],
    ids=["tensor", "expert"],
)
def test_parallel_ranks_equal_transformers(flags, tmp_path):
    model = make_model(tmp_path / "model", "paper")
    with serve(tmp_path / "model", *flags, log=tmp_path / "log") as url:
        assert_equal(model, url)


def test_bf16_is_as_close_to_fp32_as_transformers_in_bf16(tmp_path):
    model = make_model(tmp_path / "model", "upcycled")
    rounded = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    folder, flags = tmp_path / "model", ["--dtype", "bfloat16"]
    with serve(folder, *flags, log=tmp_path / "log") as url:
        _, of_prompts, _ = differences(model, url)
    errors = []
    for prompt in prompts()[1:]:
        places, targets = torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])
        with torch.no_grad():
            tables = [m(torch.tensor([prompt])).logits[0].float() for m in (model, rounded)]
        exact, inexact = (table.log_softmax(-1)[places, targets] for table in tables)
        errors.append(inexact - exact)
    # Root mean squares, as a token that crosses a threshold by rounding changes its experts.
    assert of_prompts.square().mean() < 4 * torch.cat(errors).square().mean()


def refused(folder, tmp_path, *flags):
    """Return the log of a server that ends by itself."""
    process, _ = start(folder, *flags, log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 250
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert process.poll() not in (None, 0)
    except subprocess.TimeoutExpired:
        pytest.fail("the server did not end")
    finally:
        stop(process)
    return (tmp_path / "log").read_text()


def test_thresholds_without_a_value_are_refused(tmp_path):
    make_model(tmp_path / "model", "paper", updates=0)
    assert "The thresholds of the model were never updated" in refused(tmp_path / "model", tmp_path)


def test_heads_that_cpus_do_not_have_are_refused(tmp_path):
    make_model(tmp_path / "model", "paper", head_dim=16)
    assert "no heads of size 16 (head_dim in config.json)" in refused(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("version, registered", [("0.32.5", True), ("0.33.0", False)])
def test_versions_of_vllm_that_were_not_tested_are_refused(version, registered):
    code = f"""
import vllm
vllm.__version__ = "{version}"
from megatron_ext.vllm import register
register()
print("ExpertThresholdForCausalLM" in vllm.ModelRegistry.get_supported_archs())
"""
    # Without plug-ins, as vLLM itself would have loaded this one before.
    environment = os.environ | {"VLLM_PLUGINS": "none"}
    command = [vllm_python(), "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(registered)
    message = f"tested with vLLM 0.32, and this is {version}"
    assert (message in done.stdout + done.stderr) is not registered
