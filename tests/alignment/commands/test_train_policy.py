"""Tests of `train-policy`: rewards by judges, grades by gold, alarms; failures are not rewards."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from alignment.data.model_tokenizer import load_tokenizer
from alignment.monitors.lengths import ReferenceLengths
from alignment.monitors.limits import MonitorLimits
from alignment.monitors.text_features import words_of
from alignment.monitors.training_monitor import Monitor
from alignment.record_files import read_all
from alignment.records import Message, Prompt, Response
from alignment.rl.gaming_alarm import GamingAlarm
from alignment.rl.grading import Grader
from alignment.rl.response_monitor import ResponseMonitor
from alignment.rl.rollouts import Rollout
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from tests.alignment.chat_model import make_model, write_rows
from tests.alignment.endpoints.endpoint import Endpoint, chat, status
from tests.distributed import run_ranks

NO_RUN: Any = ResponseMonitor(SimpleNamespace(), Monitor())  # type: ignore[arg-type]


def test_the_divergence_is_that_of_what_is_sampled(place, tmp_path):
    """The reference is the mean over all single-token responses, weighted by probability."""
    logits = {"policy": np.log([0.8, 0.2]), "start": np.log([0.9, 0.1])}

    def table(name, temperature):
        return torch.tensor(logits[name] / temperature).log_softmax(0)

    def scores(name, batch, temperature):
        return torch.where(batch.loss_mask, table(name, temperature)[batch.tokens % 2], 0)

    policy = SimpleNamespace(
        log_probs=lambda batch, temperature, **_: SimpleNamespace(
            log_probs=scores("policy", batch, temperature)
        )
    )
    held_out = read_all(place / "held_out.jsonl", Prompt)
    grader = Grader(
        policy, load_tokenizer(place / "model", None), held_out, Sampling(12, 0.7), {}, tmp_path,
        template={}, reference=lambda batch, temperature: scores("start", batch, temperature),
        length=96, generation_batch_size=4, monitor=NO_RUN, alarm=GamingAlarm(),
        check=lambda: None, writes=True,
    )  # fmt: skip
    rollouts = [Rollout("p", n, [n], [0.0], True) for n in range(2)]
    log_ratios = grader._divergence([(held_out[0], [1])] * 2, rollouts)
    sampled, start = (table(name, 0.7).exp().numpy() for name in ("policy", "start"))
    assert np.dot(sampled, log_ratios) == pytest.approx(entropy(sampled, start))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_model(folder / "model", num_hidden_layers=1, max_position_embeddings=128)
    for name, count in (("prompts", 24), ("held_out", 6)):
        messages = [Message("user", f"say good {name} {n}") for n in range(count)]
        prompts = [Prompt(f"{name}-{n}", (message,)) for n, message in enumerate(messages)]
        write_rows(folder / f"{name}.jsonl", prompts)
    (folder / "text.txt").write_text("\n".join(f"the house is good {n % 7}" for n in range(400)))
    text = f"rule_text: {folder / 'text.txt'}\n"
    (folder / "rule.yaml").write_text(f"kind: rule\n{text}")
    (folder / "other.yaml").write_text(f"kind: rule\nrule: no-copying\n{text}")
    return folder


def train(folder, run, judge, steps, *more):
    """Return the exit code of `train-policy`, or its error message."""
    from alignment.commands.train_policy import main

    data = {"--prompts": folder / "prompts.jsonl", "--held-out": folder / "held_out.jsonl"}
    words = [
        *("--model", folder / "model", "--run-dir", run, "--steps", steps, "--judge", judge),
        *(word for flag, file in data.items() if flag not in more for word in (flag, file)),
        *("--gold", folder / "other.yaml", "--batch-size", 16, "--group-size", 4),
        *("--mini-batches", 1, "--max-new-tokens", 12, "--temperature", 0.8, "--seq-length", 96),
        *("--lr", 1e-2, "--eval-interval", 2, "--save-interval", 2, "--micro-batch-size", 4),
        *more,
    ]
    try:
        return main([str(word) for word in words])
    except UserError as error:
        return str(error)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_monitors(run, responses_of_steps, limits, held_out):
    """Check metrics and alarms against the responses and the lengths of the first grading."""
    first = json.loads((run / "first.json").read_text())
    lengths = ReferenceLengths.from_words([len(words_of(row["text"])) for row in first.values()])
    monitor = Monitor(MonitorLimits.read(str(limits)), lengths)
    rows = [row for row in rows_of(run) if "reward" in row]
    alarms = 0
    for row, responses in zip(rows, responses_of_steps, strict=True):
        findings = monitor.check_batch(responses)
        assert {name: row[f"monitor/{name}"] for name in findings.shares} == findings.shares
        file = run / "alarms" / f"step_{row['step']:06d}.json"
        entries = json.loads(file.read_text()) if file.is_file() else {}
        entries.pop("reward_length_correlation", None)  # the files do not contain the rewards
        assert entries.keys() == findings.alarms.keys()
        for name, alarm in entries.items():
            assert alarm["value"] == findings.shares[name] and alarm["examples"]
        alarms += len(entries)
        assert row["monitor_alarms"] >= len(entries)
    assert alarms, "nothing was tested"
    nobody: Any = SimpleNamespace()
    graded = Grader(
        SimpleNamespace(), load_tokenizer(run / "final", None),
        held_out, Sampling(12, 0.8), {}, run, template={},
        reference=None, length=96, generation_batch_size=4,
        monitor=ResponseMonitor(nobody, Monitor()), alarm=GamingAlarm(),
        check=lambda: None, writes=True,
    )  # fmt: skip
    graded.restore(3)  # as a run that resumes there does
    assert graded.monitor.monitor.reference_lengths == lengths
    assert [row["step"] for row in graded.history] == [
        0,
        2,
    ]


def check_errors_over_prompts(run, row):
    """Check the standard errors of the changes against the samples of all six prompts."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    scores = {(s["step"], s["prompt"]): s["scores"] for s in samples}
    pairs = [(scores[0, p], scores[row["step"], p]) for step, p in scores if step == 0]
    assert row["grade/prompts"] == len(pairs) == 6
    changes = {
        name: np.array([now[name] - first[name] for first, now in pairs])
        for name in ("proxy", "gold")
    }
    changes["gap"] = changes["proxy"] - changes["gold"]
    for name, values in changes.items():
        error = np.std(values, ddof=1) / np.sqrt(6)
        assert row[f"grade/{name}_error"] == pytest.approx(error)


@pytest.mark.slow
def test_a_policy_is_trained_graded_and_reported_on_any_ranks(place, tmp_path):
    from alignment.commands.report import main as report

    runs = []
    for ranks in (1, 2):
        run = tmp_path / f"runs-{ranks}"
        (tmp_path / "limits.yaml").write_text("repetition: 0\nverbose: 0\nnull: 0\n")
        more = (
            *("--second-gold", place / "rule.yaml", "--kl", 0.1, "--keep-responses", 16),
            *("--monitor-limits", tmp_path / "limits.yaml"),
        )
        assert set(run_ranks(train, ranks, place, run, place / "rule.yaml", 4, *more)) == {0}
        rows = rows_of(run)
        names = ("step", "reward", "loss", "grade/proxy", "grade/gold", "grade/gap", "grade/kl")
        runs.append([[row.get(name) or 0 for name in names] for row in rows])
        first = next(row for row in rows if "kl_from_reference" in row)
        # At the temperature of the loss, the start policy is the policy.
        assert first["kl_from_reference"] == pytest.approx(0, abs=1e-5)
        graded = [row for row in rows if "grade/gold" in row]
        assert [row["step"] for row in graded] == [0, 2, 4]
        for row in graded:
            assert row["grade/proxy"] == row["grade/second_gold"]  # the same rule
            assert row["grade/gap"] == pytest.approx(row["grade/proxy"] - row["grade/gold"])
        assert graded[0]["grade/kl"] == pytest.approx(0, abs=1e-4) and graded[2]["grade/kl"] != 0
        check_errors_over_prompts(run, graded[2])
        assert (run / "final" / "config.json").is_file()
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert {row["step"] for row in samples} == {0, 2, 4} and len(samples) == 18
        responses = [read_all(file, Response) for file in sorted((run / "responses").iterdir())]
        assert [len(rows) for rows in responses] == [16] * 4
        assert responses[2][0].source == "policy at step 3"
        held_out = read_all(place / "held_out.jsonl", Prompt)
        check_monitors(run, responses, tmp_path / "limits.yaml", held_out)
    for row, other in zip(*runs):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    report([str(tmp_path / "runs-1"), "--output", str(tmp_path / "page")])
    assert list((tmp_path / "page").glob("*.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--critic-lr", 1e-3), "--critic-lr requires --algorithm ppo"),
        (("--algorithm", "ppo", "--gae-lambda", 2), "--gae-lambda 2.0 must be at least 0"),
        (("--rollouts-ahead", 1), "--rollouts-ahead 1 requires servers"),
        (("--rollout-url", "http://a/v1", "--top-k", 20), "--top-k 20 is incompatible with"),
        (("--rollout-url", "http://a/v1", "--top-p", 0.9), "--top-p 0.9 is incompatible with"),
        (("--rollout-url", "http://a/v1", "--temperature", 0.001), "--temperature 0.001 is incomp"),
        (("--algorithm", "dapo", "--overlong-margin", 0), "--overlong-margin 0 must be above 0"),
        (("--alarm-gap", "nan"), "--alarm-gap nan must be at least 0"),
        (
            ("--rollouts-ahead", 1, "--rollout-url", "http://a/v1", "--algorithm", "dapo"),
            "--algorithm dapo may sample several times per step",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(place, tmp_path, words, message):
    assert message in train(place, tmp_path, place / "rule.yaml", 2, *words)


@pytest.mark.slow
def test_a_policy_is_trained_with_a_critic(place, tmp_path):
    more = ("--algorithm", "ppo", "--group-size", 1, "--batch-size", 8, "--critic-warmup", 1)
    assert run_ranks(train, 1, place, tmp_path, place / "rule.yaml", 2, *more) == [0]
    learnt = [row for row in rows_of(tmp_path) if "value_loss" in row]
    assert ["loss" in row for row in learnt] == [False, True]
    # Ten times that of the policy, whose first step comes after the warm-up; both fall to 0.
    assert [row["value_lr"] for row in learnt] == pytest.approx([0.1, 0.05])
    assert learnt[1]["lr"] == pytest.approx(0.01) and (tmp_path / "final").is_dir()


@pytest.mark.slow
def test_failing_judges_end_the_run_and_are_called_again_on_resume(place, tmp_path):
    (tmp_path / "pointwise-brief.txt").write_text(
        "=== user ===\n{mark} <item> {prompt} {response} {answer}\n"
    )
    broken, digits = ["good prompts"], itertools.count()
    run, spec = tmp_path / "run", tmp_path / "http.yaml"

    def faults(text, number):  # gradings and rewards do not make calls at the same time
        content = server.bodies[-1]["messages"][-1]["content"]
        return status(503) if broken[0] in content else None

    with Endpoint(faults) as server:
        server.answer = lambda text: chat(str(next(digits) % 10))
        spec.write_text(
            f"kind: endpoint\nmodel: judge\nurl: {server.url}\ntries: 2\nfirst_wait: 0.01\n"
            f"expected_score: false\ntemplate: {tmp_path / 'pointwise-brief.txt'}\n"
        )
        [message] = run_ranks(train, 1, place, run, spec, 2)
        assert "100% of the responses have no reward" in message and "failed 100%" in message
        assert "The most frequent reasons: status 503" in message and "(16)" in message
        [rollout_file] = run.glob("rollouts/step_000000/*.jsonl")
        before = rollout_file.read_bytes()
        assert before.count(b'"rollout:') == 16 and b'"reward:' not in before
        broken[0] = "good held_out"
        [message] = run_ranks(train, 1, place, run, spec, 2)
        assert (
            "--judge failed 6 times on 6 held-out responses" in message and "status 503" in message
        )
        assert (run / "checkpoints" / "iter_0000002").is_dir()  # the step before is not lost
        broken[0] = "\0"  # in no prompt
        assert run_ranks(train, 1, place, run, spec, 2) == [0]
        # There was one call for each different response; equal ones share the answer.
        assert sum(server.calls.values()) >= 32 and sum(server.answered.values()) <= 32 + 18
    assert [row["step"] for row in rows_of(run) if "reward" in row] == [1, 2]
    assert [row["step"] for row in rows_of(run) if "grade/gold" in row] == [0, 2]


@pytest.mark.slow
def test_win_rates_are_graded_against_the_first_responses(place, tmp_path):
    from alignment.judges.kinds.rule import load_rule_judge

    more = ("--reward", "pairwise", "--no-reference", "--second-gold", place / "rule.yaml")
    assert run_ranks(train, 1, place, tmp_path / "run", place / "rule.yaml", 4, *more) == [0]
    graded = [row for row in rows_of(tmp_path / "run") if "grade/gold" in row]
    first, last = graded[0], graded[-1]
    assert [first[f"grade/{name}"] for name in ("proxy", "gold", "second_gold")] == [0.5] * 3
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    texts = {
        step: {s["prompt"]: s["response"] for s in samples if s["step"] == step} for step in (0, 4)
    }
    messages = {s["prompt"]: tuple(Message(**m) for m in s["messages"]) for s in samples}
    assert len(texts[0]) == len(texts[4]) == 6 and texts[0] != texts[4]
    for name, rule in (("gold", "no-copying"), ("second_gold", "gold"), ("proxy", "gold")):
        judge = load_rule_judge(rule, str(place / "text.txt"))

        def mean(prompt, text, judge=judge):
            return judge.rule.mean(judge.levels(messages[prompt], text))

        wins, scores = [], []
        for prompt, before in texts[0].items():
            new, old = mean(prompt, texts[4][prompt]), mean(prompt, before)
            if name == "proxy":
                wins.append(0.5 if abs(new - old) <= 0.25 else float(new > old))
            else:
                new, old = (int(value + 0.5 + 1e-9) for value in (new, old))
                wins.append((1 + np.sign(new - old)) / 2)
                scores.append(new)
        assert last[f"grade/{name}"] == pytest.approx(np.mean(wins))
        if scores:
            assert last[f"grade/{name}_score"] == pytest.approx(np.mean(scores))
    assert last["grade/gap"] == last["grade/proxy"] - last["grade/gold"]
