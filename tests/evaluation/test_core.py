"""Tests of the CORE benchmark against a plain loop over transformers, and between layouts.

The results are also compared between batches, restarts and kinds of models.
"""

import csv
import json
import os
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import UserError
from megatron_ext.evaluation.core.bundle import read_bundle
from tests.distributed import run_ranks
from tests.evaluation.conftest import TASKS, write_bundle
from tests.inference.checkpoint import MAX_LENGTH


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, hf_model, hf_tokenizer):
    def predict(context, choose):
        """Return the model's prediction for some contexts, so that some answers are right."""
        if choose.random() < 0.4:
            return "ba"
        ids = [2, *hf_tokenizer(context.strip()).input_ids]
        with torch.no_grad():
            new = hf_model.generate(
                torch.tensor([ids]), max_new_tokens=1, do_sample=False, pad_token_id=3
            )
        return hf_tokenizer.decode(new[0, len(ids) :]).strip() or "ba"

    return write_bundle(tmp_path_factory.mktemp("core") / "bundle", predict)


def run_tool(load, bundle, out, *flags):
    from tools import eval_core

    eval_core.main(["--load", str(load), "--bundle", str(bundle), "--out", str(out), *flags])


def evaluate(load, bundle, out, *flags):
    run_tool(load, bundle, out, *flags)
    return outcome(out)


def outcome(out):
    _, *rows = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    table = json.loads((out / "core.json").read_text())
    return SimpleNamespace(
        answers={row["task"]: row["answers"] for row in rows},
        cropped={row["task"]: row["cropped"] for row in rows},
        table=table,
        files={name: (out / name).read_text() for name in ("core.csv", "core.md")},
    )


def on_one_rank(run, hf, bundle, out):
    facts = SimpleNamespace(
        whole=evaluate(run, bundle, out / "whole"),
        hf=evaluate(hf, bundle, out / "hf"),
        single=evaluate(run, bundle, out / "single", "--batch-tokens", "1"),
        parts=[
            evaluate(run, bundle, out / "parts", "--tasks", "which,pick"),
            evaluate(run, bundle, out / "parts"),
        ],
        few=evaluate(run, bundle, out / "few", "--max-items", "9", "--tasks", "pick,go_on"),
    )
    with pytest.raises(UserError) as refused:
        evaluate(run, bundle, out / "few", "--tasks", "pick")
    facts.other_settings = str(refused.value)
    changing, few = shutil.copytree(hf, out / "hf_folder"), ("--max-items", "9", "--tasks", "pick")
    evaluate(changing, bundle, out / "changed", *few)
    for file in changing.glob("*.safetensors"):
        weights = {name: 2 * tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError) as refused:
        evaluate(changing, bundle, out / "changed", *few)
    facts.other_weights = str(refused.value)
    return facts


@pytest.fixture(scope="module")
def one_rank(run_dir, hf_folder, bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("core_out")
    [facts] = run_ranks(on_one_rank, 1, run_dir, hf_folder, bundle, out, timeout=240)
    facts.out = out
    return facts


def plain_answers(label, kind, shots, delimiter, bundle, model, tokenizer, most=None):
    """Return answers by the rules written again: no batches, no shared code, fp64 means."""
    lines = (bundle / "eval_data" / "some" / f"{label}.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(items)
    items = items[:most]

    def losses(text):
        ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
        lost = max(0, len(ids) - MAX_LENGTH)
        ids = ids[lost:]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        loss = [-float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids))]
        likeliest = [int(logits[i - 1].argmax()) == ids[i] for i in range(1, len(ids))]
        return ids, loss, likeliest, lost

    answers, right, cropped = [], 0, 0
    for index, item in enumerate(items):
        others = [other for other in range(len(items)) if other != index]
        prompt = ""
        for other in random.Random(1234 + index).sample(others, shots):
            shot = items[other]
            if kind == "multiple_choice":
                prompt += shot["query"] + delimiter + shot["choices"][shot["gold"]]
            elif kind == "schema":
                prompt += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"]
            else:
                prompt += shot["context"].strip() + delimiter + shot["continuation"]
            prompt += "\n\n"
        if kind == "language_modeling":
            start = prompt + item["context"].strip() + delimiter
            before = tokenizer(start.strip()).input_ids
            ids, _, likeliest, lost = losses(start + item["continuation"])
            first = 1 + len(before) - lost  # the end-of-document token is first
            assert lost or ids[1:first] == before
            met = all(likeliest[max(first, 1) - 1 :])
            answers.append(0 if met else -1)
            right += met
            cropped += lost > 0
            continue
        if kind == "multiple_choice":
            options = [prompt + item["query"] + delimiter + choice for choice in item["choices"]]
        else:
            options = [
                prompt + context + delimiter + item["continuation"]
                for context in item["context_options"]
            ]
        scored = [losses(option) for option in options]
        whole = [[tokenizer.eos_token_id, *tokenizer(option).input_ids] for option in options]
        shortest = min(map(len, whole))
        means = []
        for (_, loss, _, lost), ids in zip(scored, whole):
            if kind == "multiple_choice":
                first = 0
                while first < shortest - 1 and len({option[first] for option in whole}) == 1:
                    first += 1
            else:
                common = 0
                while len({option[-1 - common] for option in whole}) == 1:
                    common += 1
                first = len(ids) - common
            part = loss[max(first - lost, 1) - 1 :]
            means.append(sum(part) / len(part))
            cropped += lost > 0
        answers.append(min(range(len(means)), key=means.__getitem__))
        right += answers[-1] == item["gold"]
    return answers, right / len(items), cropped


@pytest.mark.parametrize("label", TASKS)
def test_choices_and_accuracy_are_those_of_a_plain_loop(
    label, one_rank, bundle, hf_model, hf_tokenizer
):
    kind, shots, delimiter, baseline = TASKS[label]
    answers, accuracy, cropped = plain_answers(
        label, kind, shots, delimiter, bundle, hf_model, hf_tokenizer
    )
    assert len(set(answers)) > 1  # constant answers would hide differences
    assert one_rank.whole.answers[label] == answers
    assert one_rank.whole.cropped[label] == cropped and (cropped > 0) == (label == "long")
    [row] = [row for row in one_rank.whole.table["tasks"] if row["task"] == label]
    assert row["accuracy"] == pytest.approx(accuracy)
    chance = baseline / 100
    assert row["centered"] == pytest.approx((accuracy - chance) / (1 - chance))


def test_fewer_questions_are_the_first_of_the_shuffled_and_bring_their_own_shots(
    one_rank, bundle, hf_model, hf_tokenizer
):
    for label in ("pick", "go_on"):
        kind, shots, delimiter, _ = TASKS[label]
        answers, _, _ = plain_answers(
            label, kind, shots, delimiter, bundle, hf_model, hf_tokenizer, 9
        )
        assert one_rank.few.answers[label] == answers
    assert "core" not in one_rank.few.table and "mean_centered" in one_rank.few.table


def test_core_is_the_mean_and_the_tables_agree(one_rank):
    table = one_rank.whole.table
    centered = [row["centered"] for row in table["tasks"]]
    assert table["core"] == pytest.approx(sum(centered) / len(TASKS))
    rows = list(csv.DictReader(one_rank.whole.files["core.csv"].splitlines()))
    assert [row["task"] for row in rows] == list(TASKS)
    assert [float(row["centered"]) for row in rows] == centered
    last = one_rank.whole.files["core.md"].splitlines()[-1]
    assert last.startswith("| CORE ") and f"{table['core']:.4f}" in last


def test_core_results_do_not_depend_on_format_and_batches(one_rank):
    assert one_rank.hf.answers == one_rank.single.answers == one_rank.whole.answers
    assert one_rank.hf.table["core"] == one_rank.whole.table["core"]


def test_core_results_keep_finished_tasks_and_refuse_other_settings(one_rank):
    first, second = one_rank.parts
    assert list(first.answers) == ["pick", "which"]
    assert second.answers == one_rank.whole.answers
    assert second.table == one_rank.whole.table
    assert "max_items 9" in one_rank.other_settings and "--out" in one_rank.other_settings
    assert "has results with weights " in one_rank.other_weights


def killed_in_the_third_task(run, bundle, out):
    from megatron_ext.evaluation.core import core_scoring as judging

    real = judging.judge

    def fatal(task, *rest):
        if task.label == "which":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(task, *rest)

    judging.judge = fatal
    run_tool(run, bundle, out)


def on_two_ranks(run, hf, bundle, out, sizes):
    flags = [f"--{name}-model-parallel-size={size}" for name, size in sizes.items()]
    run_tool(run, bundle, out / "megatron", *flags)
    if "expert" in sizes:
        run_tool(hf, bundle, out / "hf")


@pytest.mark.parametrize("sizes", [{"expert": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_core_on_two_ranks_equals_one_rank_and_resumes_after_a_kill(
    sizes,
    one_rank,
    run_dir,
    hf_folder,
    bundle,
    tmp_path,
):
    if "expert" in sizes:  # the other half of the run is computed on one rank
        with pytest.raises(RuntimeError, match="died"):
            run_ranks(killed_in_the_third_task, 1, run_dir, bundle, tmp_path / "megatron")
        _, *rows = (tmp_path / "megatron" / "results.jsonl").read_text().splitlines()
        assert len(rows) == 2
    run_ranks(on_two_ranks, 2, run_dir, hf_folder, bundle, tmp_path, sizes)
    for folder in tmp_path.iterdir():
        facts = outcome(folder)
        assert facts.answers == one_rank.whole.answers
        assert facts.table["tasks"] == one_rank.whole.table["tasks"]


def break_line(folder):
    file = folder / "eval_data" / "some" / "pick.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = lines[4][:-5]
    file.write_text("\n".join(lines))


def change(name, before, after):
    def apply(folder):
        file = folder / name
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after, 1))

    return apply


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "core.yaml").unlink(), "has no core.yaml"),
        (lambda folder: (folder / "eval_meta_data.csv").unlink(), "has no eval_meta_data.csv"),
        (lambda folder: shutil.rmtree(folder / "eval_data"), "has no eval_data"),
        (lambda folder: (folder / "eval_data/some/which.jsonl").unlink(), "which.jsonl, the data"),
        (break_line, "pick.jsonl, line 5 is not a multiple_choice question"),
        (change("eval_data/some/pick.jsonl", '"query"', '"quary"'), "line 1 .* no 'query'"),
        (change("eval_data/some/which.jsonl", '"gold": ', '"gold": 7'), "gold is 7"),
        (change("core.yaml", "type: schema", "type: essay"), "unknown icl_task_type essay"),
        (change("core.yaml", "icl_tasks", "tasks"), "no list icl_tasks"),
        (change("core.yaml", "num_fewshot", "few"), "Task .* has no valid 'num_fewshot'"),
        (change("eval_meta_data.csv", "pick,", "pack,"), "no row for task pick"),
        (change("eval_meta_data.csv", ",25,", ",a lot,"), "line 2 has no Eval Task"),
        (change("eval_meta_data.csv", ",25,", ",100,"), "line 2 has the Random baseline 100"),
    ],
)
def test_read_bundle_refuses_an_incomplete_bundle(bundle, tmp_path, damage, message):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    damage(copy)
    with pytest.raises(UserError, match=message) as refused:
        for task in read_bundle(copy):
            task.items()
    assert "\n" not in str(refused.value).strip()


def test_read_bundle_refuses_unknown_tasks_and_folders(bundle, tmp_path):
    with pytest.raises(UserError, match=r"--tasks other is not a task of .* It has pick, "):
        read_bundle(bundle, ["other"])
    with pytest.raises(UserError, match="is not a CORE bundle"):
        read_bundle(tmp_path)
