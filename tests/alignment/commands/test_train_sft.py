"""Tests of `train-sft` and `generate`: equal on any number of ranks, and to transformers."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from alignment.commands.evaluate import main as evaluate
from alignment.data.record_writer import RecordWriter
from alignment.record_files import read_all
from alignment.records import Message, Prompt, Response
from megatron_ext.errors import UserError
from tests.alignment.chat_model import make_model, write_rows
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow

ANSWERS = {"red": "the house is red", "blue": "a bird sings", "green": "river under stone"}


def prompt_of(number, colour):
    return Prompt(f"p{number}", (Message("user", f"{colour} {number % 10}"),))


def rows(count, begin=0):
    colours = [list(ANSWERS)[n % 3] for n in range(begin, begin + count)]
    return [
        Response(
            f"r{n}", Prompt(f"p{n}", (Message("user", f"{colour} {n % 10}"),)), ANSWERS[colour]
        )
        for n, colour in enumerate(colours, begin)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    make_model(folder / "model", num_hidden_layers=1, max_position_embeddings=128)
    write_rows(folder / "train.jsonl", rows(48))
    write_rows(folder / "validation.jsonl", rows(9, 100))
    write_rows(folder / "prompts.jsonl", [row.prompt for row in rows(7, 200)])
    return folder


def learn_and_answer(folder, run):
    from alignment.commands import generate
    from alignment.commands import train_sft as sft

    def call(tool, *words):
        try:
            return tool.main([str(word) for word in words])
        except UserError as error:
            return str(error)

    trained = call(
        sft, "--model", folder / "model", "--run-dir", run, "--input", folder / "train.jsonl",
        "--validation-input", folder / "validation.jsonl", "--epochs", 10, "--batch-size", 16,
        "--seq-length", 64, "--lr", 1e-2, "--eval-interval", 10, "--micro-batch-size", 2,
    )  # fmt: skip
    results = [trained]
    for name, *more in (
        ("greedy", "--temperature", 0),
        ("drawn", "--temperature", 1, "--samples", 2, "--seed", 5),
        ("greedy", "--temperature", 1),
    ):
        results.append(
            call(
                generate, "--model", run / "best", "--input", folder / "prompts.jsonl",
                "--output", run / f"{name}.jsonl", "--max-new-tokens", 12,
                "--generation-batch-size", 3, *more,
            )
        )  # fmt: skip
    return results


def test_a_model_learns_to_answer(place, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        trained, greedy, sampled_texts, refused = run_ranks(learn_and_answer, ranks, place, run)[0]
        assert (trained, greedy, sampled_texts) == (0, 0, 0)
        assert "greedy.jsonl was made with another model" in refused
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        valid = {r["step"]: r["validation/log_prob"] for r in metrics if "validation/log_prob" in r}
        assert list(valid) == [0, 10, 20, 30] and valid[0] < -4 and valid[30] > -0.3
        answers = read_all(run / "greedy.jsonl", Response)
        assert [row.text for row in answers] == [row.text for row in rows(7, 200)]
        assert len({row.id.removeprefix(f"{row.prompt.id}-0-") for row in answers}) == 1
        samples = read_all(run / "drawn.jsonl", Response)
        ids = [row.id.rpartition("-") for row in samples]
        assert [name for name, *_ in ids[:3]] == ["p200-0", "p200-1", "p201-0"]
        assert {mark for *_, mark in ids} != {answers[0].id.rpartition("-")[2]}
        best = json.loads((run / "best" / "best.json").read_text())
        assert best["validation/log_prob"] == max(valid.values())
        results.append((list(valid.values()), [row.text for row in samples]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    assert results[0][1] == results[1][1]

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    total, count = 0.0, 0
    for row in rows(9, 100):
        messages = [m.__dict__ for m in row.prompt.messages]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(f"{prompt}{row.text}<|end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        total += sum(float(logs[i - 1, ids[i]]) for i in range(begin, len(ids)))
        count += len(ids) - begin
    assert results[0][0][0] == pytest.approx(total / count, abs=1e-4)


def generate_of(folder, models):
    from alignment.commands.generate import main

    return [
        main(
            [
                "--model", str(model), "--input", str(folder / "prompts.jsonl"),
                "--output", f"{model}.jsonl", "--max-new-tokens", "4", "--temperature", "0",
            ]
        )
        for model in models
    ]  # fmt: skip


def test_generated_responses_of_models_are_evaluated_together(place, tmp_path):
    start, trained = tmp_path / "start", tmp_path / "trained"
    for model, layers in ((start, 1), (trained, 2)):
        make_model(model, num_hidden_layers=layers, max_position_embeddings=128)
    assert run_ranks(generate_of, 1, place, (start, trained)) == [[0, 0]]
    files = [f"{start}.jsonl", f"{trained}.jsonl"]
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{answer}.\n" for answer in ANSWERS.values()) * 40)
    out = tmp_path / "out"
    evaluate(
        ["--responses", *files, "--baseline", files[0], "--output", str(out),
         "--resamples", "20", "--judge", "rule", "--rule-text", str(text)]
    )  # fmt: skip
    report = json.loads((out / "evaluation.json").read_text())
    assert report["policies"] == [str(start), str(trained)] and report["prompts"] == 7
    [of] = report["judges"].values()
    assert of["scores"]["policies"][str(trained)]["judged"] == 7
    assert of["preferences"]["policies"][str(trained)]["judged"] == 7


def test_unusable_training_data_is_refused(place, tmp_path):
    from alignment.commands.train_sft_config import parse

    base = ["--model", str(place / "model"), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="requires --input with responses"):
        parse(base)
    with pytest.raises(UserError, match=r"--epochs 0\.0 must be above 0"):
        parse([*base, "--input", "x", "--epochs", "0"])
    file = tmp_path / "long.jsonl"
    with RecordWriter(file) as writer:
        writer.write(rows(1)[0])
    [message] = run_ranks(learn_from, 1, place, tmp_path / "run", file)
    assert message.startswith(f"All 1 responses of {file} are longer with their prompts")


def learn_late(folder, run):
    """Train such that all ranks but the first see a partial export of rank 0."""
    from alignment.commands.train_sft import main

    is_dir = Path.is_dir

    def late(path):
        return (path.name == "best" and dist.get_rank() > 0) or is_dir(path)

    with mock.patch.object(Path, "is_dir", late):
        return main(
            [
                "--model", str(folder / "model"), "--run-dir", str(run), "--input",
                str(folder / "train.jsonl"), "--epochs", "1", "--batch-size", "48",
                "--seq-length", "64",
            ]
        )  # fmt: skip


def test_rank_0_decides_whether_the_model_is_exported(place, tmp_path):
    assert run_ranks(learn_late, 2, place, tmp_path / "run") == [0, 0]
    assert (tmp_path / "run" / "best" / "config.json").is_file()


def learn_from(folder, run, file):
    from alignment.commands.train_sft import main

    words = ["--model", folder / "model", "--run-dir", run, "--input", file, "--seq-length", 4]
    try:
        return main([str(word) for word in words])
    except UserError as error:
        return str(error)
