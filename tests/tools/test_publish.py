"""Tests of folders for a model hub: they load elsewhere, and their cards state measurements."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from megatron_ext.errors import UserError
from tests.distributed import run_ranks
from tests.inference.checkpoint import MAX_LENGTH, run_dir  # noqa: F401
from tests.vllm.servers import FP32, make_model, serve
from tests.vllm.test_served_models import differences


def publish(model, out, *flags):
    from tools import publish

    publish.main([str(model), "--out", str(out), *map(str, flags)])


def as_a_user(run, folder):
    from megatron_ext.data.token_stream import sequences_of
    from megatron_ext.inference.forward import full_logits
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.text_routing import route_text

    corpus = run.parent / "corpus.jsonl"
    core = folder / "core.json"
    task = {
        "task": "made up", "kind": "multiple_choice", "shots": 0, "items": 4, "cropped": 0,
        "accuracy": 0.75, "baseline": 0.5, "centered": 0.5,
    }  # fmt: skip
    place = run / "checkpoints" / "iter_0000040"
    core.write_text(json.dumps({"model": str(place.resolve()), "tasks": [task], "core": 0.5}))
    flags = ["--data", corpus, "--tokens", 2000, "--license", "apache-2.0", "--core", core]
    publish(run, folder / "out", *flags)
    trained = load_model(run)
    tokens = torch.arange(10, 40)[None]
    sequences = sequences_of([str(corpus)], trained, MAX_LENGTH, 2000)
    routed = [route_text(trained, sequence.tolist()) for sequence in sequences]
    logits = full_logits(trained, tokens)
    assert logits is not None
    return SimpleNamespace(
        logits=logits[..., : trained.vocab_size],
        fan_out=torch.cat([routing.fan_out for routing in routed], dim=1),
        loss=float(torch.cat([routing.losses[1:] for routing in routed]).mean()),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def facts(run_dir, folder):  # noqa: F811
    [facts] = run_ranks(as_a_user, 1, run_dir, folder, timeout=240)
    return facts


def test_published_run_has_the_logits_of_training_in_transformers(facts, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = folder / "out"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="float32")
    with torch.no_grad():
        logits = model(torch.arange(10, 40)[None]).logits
    difference = (logits - facts.logits).abs().max()
    assert difference < 1e-5 * facts.logits.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer.decode(tokenizer("ba kélo").input_ids) == "ba kélo"
    assert (out / "generation_config.json").is_file() and (out / "modeling_et.py").is_file()


def test_card_and_cap_state_what_was_measured(facts, folder):
    card = (folder / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
    largest = int(facts.fan_out.max())
    assert json.loads((folder / "out" / "config.json").read_text())["max_fan_out"] == largest
    assert f"`max_fan_out` in config.json is {largest}" in card
    shares = re.findall(r"^\| (\d+) \| ([\d.]+)% \|$", card, flags=re.MULTILINE)
    assert [int(number) for number, _ in shares] == list(range(largest + 1))
    for number, share in shares:
        expected = (facts.fan_out == int(number)).float().mean()
        assert float(share) / 100 == pytest.approx(float(expected), abs=1e-5)
    assert f"nats per token | {facts.loss:.4f} |" in card
    assert "| validation loss, nats per token | " in card and "mock data of Megatron" in card
    assert "after 40 updates with decay 0.9" in card
    assert "| made up | multiple_choice |" in card and "| CORE " in card
    [settings] = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    recipe = yaml.safe_load(settings)
    assert recipe["num_experts"] == 8 and recipe["train_iters"] == 40
    assert "/" not in settings, "paths of the machine are published"


def refusals(run, folder):
    make_model(folder / "uncalibrated", "paper", updates=0)
    other = folder / "other.json"
    other.write_text(json.dumps({"model": "another", "tasks": [{}], "core": 0.5}))
    corpus = run.parent / "corpus.jsonl"
    messages = []
    for model, flags in (
        (folder / "uncalibrated", ["--data", corpus]),
        (run, []),
        (run, ["--data", corpus, "--core", other]),
        (run, ["--data", corpus, "--tokens", "0"]),
    ):
        with pytest.raises(UserError) as error:
            publish(model, folder / "refused", *flags)
        messages.append(str(error.value))
    return messages, (folder / "refused").exists(), [p.name for p in folder.iterdir()]


def test_publish_refuses_by_a_sentence_and_writes_nothing(run_dir, tmp_path):  # noqa: F811
    [(messages, exists, names)] = run_ranks(refusals, 1, run_dir, tmp_path, timeout=240)
    uncalibrated, without_text, other_core, no_tokens = messages
    assert "have no value yet" in uncalibrated and "tools.calibrate_thresholds" in uncalibrated
    assert "--data is missing" in without_text
    assert "not of" in other_core
    assert "--tokens 0 is below 1" in no_tokens
    assert not exists and sorted(names) == ["other.json", "uncalibrated"]


def publish_folder(folder):
    text = folder / "text.txt"
    words = torch.randint(256, (4000,), generator=torch.Generator().manual_seed(1))
    text.write_text(" ".join(f"w{word}" for word in words.tolist()))
    publish(folder / "model", folder / "out", "--data", text)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_published_folder_has_the_log_probabilities_of_the_original_in_vllm(tmp_path):
    model = make_model(tmp_path / "model", "paper")
    run_ranks(publish_folder, 1, tmp_path, timeout=240)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert 2 < config["max_fan_out"] <= 8
    with serve(tmp_path / "out", log=tmp_path / "log") as url:
        sampled, of_prompts, wrong = differences(model, url)
    assert not any(wrong)
    assert sampled.abs().max() < FP32 and of_prompts.abs().max() < FP32
