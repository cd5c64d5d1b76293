"""A trained model, the same model as a Hugging Face folder, and benchmark questions for both."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.distributed import run_ranks
from tests.inference.checkpoint import _SYLLABLES as SYLLABLES
from tests.inference.checkpoint import run_dir  # noqa: F401

TASKS = {
    "pick": ("multiple_choice", 2, "\nAnswer: ", 25),
    "pick_zero": ("multiple_choice", 0, " ", 50),
    "which": ("schema", 1, " ", 50),
    "go_on": ("language_modeling", 3, " ", 0),
    "long": ("multiple_choice", 12, "\n", 25),
}


def texts(choose: random.Random, most: int) -> str:
    return " ".join("".join(choose.choices(SYLLABLES, k=2)) for _ in range(choose.randint(1, most)))


def question(kind: str, choose: random.Random, predict) -> dict[str, object]:
    if kind == "multiple_choice":
        choices = [texts(choose, 3) for _ in range(4)]
        # One option begins with another one, so that only its end distinguishes them.
        choices[3] = choices[0] + " lo"
        return {"query": texts(choose, 5), "choices": choices, "gold": choose.randrange(4)}
    if kind == "schema":
        contexts = [texts(choose, 4), texts(choose, 4) + " né"]
        gold = choose.randrange(2)
        return {"context_options": contexts, "continuation": texts(choose, 3), "gold": gold}
    context = texts(choose, 4) + " "
    return {"context": context, "continuation": predict(context, choose), "category": "x"}


def write_bundle(folder: Path, predict) -> Path:
    """Write a bundle in the exact format; `predict` continues some contexts as the model would."""
    choose = random.Random(3)
    (folder / "eval_data" / "some").mkdir(parents=True)
    entries = []
    for label, (kind, shots, delimiter, _) in TASKS.items():
        entry: dict[str, object] = {
            "label": label,
            "dataset_uri": f"some/{label}.jsonl",
            "num_fewshot": [shots],
        }
        entry |= {"icl_task_type": kind, "has_categories": False}
        if delimiter != " ":
            entry["continuation_delimiter"] = delimiter
        entries.append(entry)
        lines = [json.dumps(question(kind, choose, predict)) for _ in range(14)]
        (folder / "eval_data" / "some" / f"{label}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "#shots", "Random baseline", "Description"])
        for label, (_, shots, _, baseline) in TASKS.items():
            writer.writerow([label, "words", shots, baseline, "made, up"])
    return folder


def convert(run: Path, folder: Path) -> None:
    """Convert, on a rank, the run's checkpoint to a Hugging Face folder."""
    from tools import convert_checkpoint

    flags = ["--from", "megatron", "--to", "hf", "--load", str(run), "--save", str(folder)]
    convert_checkpoint.main(flags)


@pytest.fixture(scope="session")
def hf_folder(run_dir, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("evaluation") / "hf"
    run_ranks(convert, 1, run_dir, folder)
    return folder


@pytest.fixture(scope="session")
def hf_model(hf_folder):
    """Return the folder's model, loaded by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        hf_folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def hf_tokenizer(hf_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Return the prefix of an indexed dataset.

    It counts upwards, as in training, with mistakes and a stretch of a few words, which overload
    some experts.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    choose = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("evaluation") / "valid"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length, words in ((150, 450), (3, 450), (480, 4), (97, 450)):
        tokens = np.arange(length) * choose.integers(1, 3) % 450 + 20
        noise = choose.random(length) < (0.2 if words == 450 else 1)
        tokens[noise] = choose.integers(20, 20 + words, noise.sum())
        builder.add_document(np.append(tokens, 2), [length + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix
