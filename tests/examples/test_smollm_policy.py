"""Tests of the prompts and commands of the SmolLM policy example."""

from alignment.commands.generate_config import parse as generate
from alignment.commands.train_judge import parse as train_judge
from alignment.commands.train_policy import parse as train_policy
from alignment.data.packages import PACKAGES
from alignment.judges.kinds.function import FunctionJudgeConfig
from alignment.judges.kinds.local import LocalJudgeConfig
from alignment.judges.kinds.registry import read_judge
from alignment.judges.training_examples import read_labeled_questions
from alignment.record_files import read_all
from alignment.records import Prompt, Response
from examples.alignment.checks import constraints_of
from examples.alignment.smollm_policy import MOST_WORDS, _choose, _judge, _parse, _policy
from examples.quickstart.steps import run_steps
from tests.alignment.chat_model import write_rows


def test_smollm_policy_prompts_and_commands(tmp_path):
    for name in ("ifbench", "mtbench"):
        rows = [row for row in PACKAGES[name].read(None) if isinstance(row, Prompt)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    _choose(tmp_path)
    parts = {
        name: read_all(tmp_path / f"{name}.prompts.jsonl", Prompt)
        for name in ("held_out", "test", "train")
    }
    ids = [prompt.id for part in parts.values() for prompt in part]
    assert len(set(ids)) == len(ids) and [len(parts[n]) for n in ("held_out", "test")] == [30, 20]
    for part in parts.values():
        checked = [bool(constraints_of(prompt.rubric)) for prompt in part]
        assert 0.3 < sum(checked) / len(part) < 0.8  # of both packages in each
        assert max(len(p.messages[-1].content.split()) for p in part) <= MOST_WORDS + 6
        assert all(p.messages[-1].content.endswith(" Answer in one short sentence.") for p in part)

    options = _parse(["--steps", "4", "--judge-samples", "1"])
    (tmp_path / "model").mkdir()
    (tmp_path / "judge" / "best").mkdir(parents=True)
    steps = {step.name: step for step in [*_judge(tmp_path, options), *_policy(tmp_path, options)]}
    generation = generate(steps["generate-train"].command[3:])
    assert generation.samples == 1 and generation.sampling.temperature == 0.7
    written = [
        Response(p.id, p, "A cow sees. Does it? " * (n % 3 + 1))
        for n, p in enumerate(parts["train"])
    ]
    write_rows(tmp_path / "train.responses.jsonl", written)
    run_steps([steps["gold-train"]], tmp_path / "steps")
    judge = train_judge(steps["judge"].command[3:])
    labelled = read_labeled_questions(judge.input, judge.gold, True)
    assert len(labelled) == len(parts["train"]) and len({row.label for row in labelled}) > 3
    policy = train_policy(steps["policy"].command[3:])
    assert policy.steps == 4 and policy.run.eval_interval == 2 and policy.reference
    proxy, gold = read_judge(policy.judge[0]), read_judge(policy.gold[0])
    assert isinstance(proxy, LocalJudgeConfig) and proxy.model.endswith("judge/best")
    assert isinstance(gold, FunctionJudgeConfig) and gold.function.endswith("checks.py:score")
    steps = {step.name: step for step in _policy(tmp_path, _parse(["--against", "gold"]))}
    policy = train_policy(steps["policy-gold"].command[3:])
    assert policy.judge == policy.gold and policy.steps == 10
