"""Tests of commands that refuse to train a model with Gated DeltaNet layers before they start."""

from pathlib import Path
from typing import Any

import pytest

from alignment.records import Message, Prompt
from megatron_ext.errors import UserError
from tests.alignment.chat_model import BRIEF, gold, make_tokenizer, responses, write_rows
from tests.alignment.engines.test_engines import HYBRID, make_expert_threshold
from tests.distributed import run_ranks

LAYOUT = (
    "A model with Gated DeltaNet layers is trained with several samples per row, which requires "
    "tensor and context parallel sizes of 1. Use data, expert or pipeline parallelism."
)
DEEPSPEED = (
    "Several samples per row of a model with linear attention (layer_types in config.json) are not "
    "supported by the DeepSpeed engine, which would mix them. Use the Megatron engine."
)
TENSOR, CONTEXT = ("--tensor-model-parallel-size", 2), ("--context-parallel-size", 2)
CASES = [
    *(("train-policy", flags, LAYOUT) for flags in (TENSOR, CONTEXT)),
    ("train-sft", TENSOR, LAYOUT),
    ("train-judge", CONTEXT, LAYOUT),
    ("train-policy", (*TENSOR, "--dry-run", 2), LAYOUT),
    # The engine of DeepSpeed comes last, because it starts before it reads a model.
    *((name, ("--engine", "deepspeed"), DEEPSPEED) for name in ("train-policy", "train-sft")),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with a small hybrid model, and with data for each command."""
    size = make_tokenizer(tmp_path / "model")
    make_expert_threshold(
        tmp_path / "model", **HYBRID, vocab_size=size, max_position_embeddings=192
    )
    items = responses(16)
    write_rows(tmp_path / "responses.jsonl", items)
    write_rows(tmp_path / "gold.jsonl", gold(items))
    write_rows(
        tmp_path / "prompts.jsonl", [Prompt(f"p{n}", (Message("user", "say"),)) for n in range(8)]
    )
    (tmp_path / "pointwise-brief.txt").write_text(BRIEF)
    (tmp_path / "text.txt").write_text("the house is good\n" * 400)
    (tmp_path / "rule.yaml").write_text(f"{{kind: rule, rule_text: {tmp_path / 'text.txt'}}}")
    return tmp_path


def refusals(place: Path) -> list[Any]:
    """Return the exit code or the message of each case."""
    from alignment.commands import train_judge, train_policy, train_sft

    commands: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "train-policy": (
            train_policy,
            (
                *("--prompts", place / "prompts.jsonl", "--judge", place / "rule.yaml"),
                *("--batch-size", 8, "--group-size", 4, "--max-new-tokens", 8, "--steps", 1),
            ),
        ),
        "train-sft": (train_sft, ("--input", place / "responses.jsonl", "--batch-size", 8)),
        "train-judge": (
            train_judge,
            (
                *("--stage", "sft", "--template", place / "pointwise-brief.txt", "--batch-size", 8),
                *("--input", place / "responses.jsonl", "--gold", place / "gold.jsonl"),
            ),
        ),
    }
    results: list[Any] = []
    for name, flags, _ in CASES:
        command, words = commands[name]
        shared = ("--model", place / "model", "--run-dir", place / "run", "--seq-length", 192)
        try:
            results.append(command.main([str(word) for word in (*shared, *words, *flags)]))
        except UserError as error:
            results.append(str(error))
    return results


@pytest.mark.slow
def test_commands_refuse_layouts_and_engines_that_would_mix_samples(place: Path) -> None:
    expected: list[Any] = [message for _, _, message in CASES]
    for number, results in enumerate(run_ranks(refusals, 2, place, timeout=300)):
        if number:  # only the first rank plans a dry run
            dry = [index for index, (_, flags, _) in enumerate(CASES) if "--dry-run" in flags]
            expected = [0 if index in dry else message for index, message in enumerate(expected)]
        assert results == expected
    assert not (place / "run").exists()
