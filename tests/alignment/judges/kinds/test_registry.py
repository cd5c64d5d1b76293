"""Tests of the registry of judge kinds: keys of files, and settings that must match on resume."""

import json
import os
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest

from alignment.commands import annotate, evaluate
from alignment.commands.annotate_config import parse as parse_annotate
from alignment.judges.kinds.judge_kind import MAY_CHANGE, JudgeConfig, JudgeContext
from alignment.judges.kinds.local_judge import local_judge_identity
from alignment.judges.kinds.program_judge import ProgramJudge
from alignment.judges.kinds.registry import JUDGE_KINDS, read_judge
from alignment.judges.questions import Question
from alignment.record_files import read_all
from alignment.records import Message, Outcome, Prompt, Response, Verdict
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from tests.alignment.chat_model import write_rows

LOCAL = {"kind": "local", "model": "m"}
ENDPOINT = {"kind": "endpoint", "model": "m", "url": "http://a/v1"}


def read(folder, name="judge", **settings):
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(settings))
    return read_judge(str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_batch_size": 0}, "generation_batch_size must be at least 1, not 0"),
        (
            {"generation_batch_size": "many"},
            "generation_batch_size must be a whole number, not 'many'",
        ),
        ({"generation_batch_size": True}, "generation_batch_size must be a whole number, not True"),
        ({"generation_batch_size": 1.5}, "generation_batch_size must be a whole number, not 1.5"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": float("nan")}, "temperature must be a number, not "),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, not -1"),
        ({"length": "10k"}, "length must be a whole number, not '10k'"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"model": 5}, "model must be text, not 5"),
        ({"kind": ["a"]}, r"kind must be text, not \['a'\]"),
        ({"template": 5}, "template must be text, not 5"),
        ({"chat_template_kwargs": None}, "chat_template_kwargs must be a mapping, not null"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=rf"judge\.yaml: {message}"):
        read(tmp_path, **{**LOCAL, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tries": 0}, "tries must be at least 1, not 0"),
        ({"timeout": 0}, "timeout must be above 0, not 0"),
        ({"expected_score": "no"}, "expected_score must be true or false, not 'no'"),
        ({"concurrency": True}, "concurrency must be a whole number, not True"),
        ({"thinking": "maybe"}, "thinking is one of 'none', 'asked' or 'opened', not 'maybe'"),
    ],
)
def test_values_of_an_endpoint_of_a_wrong_kind_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=rf"judge\.yaml: {message}"):
        read(tmp_path, **{**ENDPOINT, **settings})


def test_misspelt_key_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"judge\.yaml: modle is not .* local, .* mean model\?"):
        read(tmp_path, kind="local", modle="m")
    with pytest.raises(UserError, match=r"kind is one of .*, not 'locl'\. Did you mean local\?"):
        read(tmp_path, kind="locl")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (9, "scale must be a list, not 9"),
        (["0", 9], "scale must be a list whose elements are each a number, not "),
        ([0, True], "scale must be a list whose elements are each a number, not "),
        ([0], "scale 0 must be two finite numbers, the lower one first"),
        ([9, 0], "scale 9 0 must be two finite numbers, the lower one first"),
    ],
)
def test_scale_of_a_function_must_be_two_numbers_in_order(tmp_path, scale, message):
    with pytest.raises(UserError, match=rf"judge\.yaml: {message}"):
        read(tmp_path, kind="function", function="checks.py:f", scale=scale)


def test_scale_of_a_function_must_match_on_resume(tmp_path):
    (tmp_path / "checks.py").write_text("")
    settings = {"kind": "function", "function": f"{tmp_path}/checks.py:f"}
    plain, scaled = read(tmp_path, **settings), read(tmp_path, **settings, scale=[0, 1], timeout=5)
    assert (plain.timeout, scaled.timeout) == (60.0, 5)
    assert "scale" not in plain.resume_settings() and scaled.resume_settings()["scale"] == [0, 1]
    assert plain.fingerprint != scaled.fingerprint
    with pytest.raises(UserError, match="max_wait must not be negative, not -1"):
        read(tmp_path, **ENDPOINT, max_wait=-1)


def test_whole_number_is_a_number_and_optional_key_may_be_null(tmp_path):
    spec = read(tmp_path, **ENDPOINT, temperature=0, timeout=5, template=None)
    assert (spec.temperature, spec.timeout, spec.template) == (0, 5, None)


def sampling_of(spec):
    return spec.temperature, spec.top_k, spec.top_p, spec.max_new_tokens


def test_defaults_of_an_endpoint_are_those_of_annotate(tmp_path):
    files = ["--input", "items", "--output", "verdicts"]
    options = parse_annotate([*files, "--judge", "http://a/v1", "--model", "m"]).judge
    annotate = (options.temperature, options.top_k, options.top_p, options.max_tokens)
    assert sampling_of(read(tmp_path, **ENDPOINT)) == annotate == (0.0, None, None, 8192)
    assert sampling_of(read(tmp_path, **ENDPOINT, top_k=None, top_p=0.9)) == (0.0, None, 0.9, 8192)
    assert sampling_of(read(tmp_path, **LOCAL)) == (0.7, 20, 0.95, 4096)
    with pytest.raises(UserError, match="top_p must be a number, not null"):
        read(tmp_path, **LOCAL, top_p=None)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("endpoint", {"length": 512}),
        ("endpoint", {"chat_template": "chat.jinja"}),
        ("endpoint", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("local", {"url": "http://a/v1"}),
        ("local", {"reasoning_effort": "high"}),
        ("rule", {"model": "m"}),
        ("function", {"rule_text": "text.txt"}),
    ],
)
def test_key_of_another_kind_is_refused(tmp_path, kind, settings):
    needed = {"rule": {"rule_text": "t"}, "function": {"function": "f.py:f"}}
    whole = {"local": LOCAL, "endpoint": ENDPOINT}.get(kind) or {"kind": kind, **needed[kind]}
    read(tmp_path, **whole, agreement="agreement.json")
    with pytest.raises(
        UserError,
        match=rf"judge\.yaml: {next(iter(settings))} is not a key of a judge of kind {kind},",
    ):
        read(tmp_path, **whole, **settings)


@pytest.fixture
def files(tmp_path):
    """Return a file of each kind of judge, and the files that it names."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    (model / "chat_template.jinja").write_text("chat")
    (tmp_path / "chat.jinja").write_text("other chat")
    (tmp_path / "pointwise-own.txt").write_text("ask")
    (tmp_path / "checks.py").write_text("def score(response): return 1")
    (tmp_path / "text.txt").write_text("\n".join(f"the house is good {n % 7}" for n in range(400)))
    return tmp_path


def specs(folder):
    template = str(folder / "pointwise-own.txt")
    local = {"kind": "local", "model": str(folder / "model")}
    return {
        "weights": (local, "model/model.safetensors"),
        "own chat": (local, "model/chat_template.jinja"),
        "chat": ({**local, "chat_template": str(folder / "chat.jinja")}, "chat.jinja"),
        "template": ({**local, "template": template}, "pointwise-own.txt"),
        "endpoint": (
            {"kind": "endpoint", "model": "m", "url": "u", "template": template},
            "pointwise-own.txt",
        ),
        "function": ({"kind": "function", "function": f"{folder}/checks.py:score"}, "checks.py"),
        "rule": ({"kind": "rule", "rule_text": str(folder / "text.txt")}, "text.txt"),
    }


def test_resume_settings_depend_on_content_of_files_not_on_their_place(files):
    before = {
        n: read(files, **settings).resume_settings() for n, (settings, _) in specs(files).items()
    }
    moved = files.with_name("moved")
    files.rename(moved)
    for name, (settings, file) in specs(moved).items():
        spec = read(moved, **settings)
        assert spec.resume_settings() == before[name], name
        content = (moved / file).read_text()
        (moved / file).write_text(f"{content}\nsomething else is here")
        assert spec.resume_settings() != before[name], name
        (moved / file).write_text(content)
        assert spec.resume_settings() == before[name], name
    (moved / "checks.py").unlink()
    with pytest.raises(UserError, match=r"names .*checks\.py, which cannot be read"):
        read(moved, **specs(moved)["function"][0]).resume_settings()


def test_unchanged_model_is_hashed_once(files, monkeypatch):
    import hashlib

    whole, read_files = hashlib.file_digest, []

    def digest(stream, name):
        read_files.append(stream.name)
        return whole(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    spec = read(files, **specs(files)["weights"][0])
    assert spec.resume_settings() == spec.resume_settings() and len(read_files) == 1
    os.utime(files / "model" / "model.safetensors", (0, 0))
    spec.resume_settings()
    assert len(read_files) == 2


def test_identity_of_a_local_judge_depends_on_its_chat_template(files):
    def identity(template):
        judge_format: Any = SimpleNamespace(
            identity="format",
            parser=SimpleNamespace(thinks=False),
            tokenizer=SimpleNamespace(chat_template=template),
        )
        return local_judge_identity(str(files / "model"), judge_format, Sampling(16))

    assert identity("a") == identity("a") != identity("b")


def test_fingerprint_ignores_the_template(files):
    local, _ = specs(files)["weights"]
    pairs = read(files, "pairs", **local, template="pairwise-rubric", generation_batch_size=2)
    scores = read(files, "scores", **local, template="pointwise")
    assert (
        pairs.fingerprint == scores.fingerprint
        and pairs.resume_settings() != scores.resume_settings()
    )
    rules = [read(files, **specs(files)["rule"][0], rule=rule) for rule in ("gold", "no-copying")]
    assert len({pairs.fingerprint, *(rule.fingerprint for rule in rules)}) == 3


class WordCount:
    """Judge that scores the number of words."""

    def __init__(self, target: int) -> None:
        self.target, self.identity = target, f"words-{target}"

    def verdict(self, item: Any, swapped: bool = False, sample: int = 0) -> Verdict:
        score = max(0.0, 9.0 - abs(len(item.text.split()) - self.target))
        return Verdict(item.id, Outcome.SCORE, score, sample=sample, judge=self.identity)


class WordCountConfig(JudgeConfig):
    """Configuration of this test's judge kind."""

    kind: Literal["words"] = "words"
    target: int = 20
    note: Annotated[str, MAY_CHANGE] = ""

    def open(self, context: JudgeContext) -> ProgramJudge:
        return ProgramJudge(WordCount(self.target))


def test_registered_kind_serves_annotate_evaluate_and_rewards(tmp_path, monkeypatch):
    monkeypatch.setitem(JUDGE_KINDS, "words", WordCountConfig)
    config = read(tmp_path, "words", kind="words", target=3)
    judge = str(tmp_path / "words.yaml")
    texts = {"base": "one two", "better": "one two three"}
    for name, text in texts.items():
        prompt = Prompt("p", (Message("user", "count"),))
        items = [Response(f"{name}-p", prompt, text, name)]
        write_rows(tmp_path / f"{name}.jsonl", items)

    output = tmp_path / "verdicts.jsonl"
    files = ["--input", str(tmp_path / "base.jsonl"), "--output", str(output)]
    assert annotate.main([*files, "--judge", judge]) == 0
    assert [v.score for v in read_all(output, Verdict)] == [8.0]
    with pytest.raises(UserError, match=r"no short form for --judge\. Describe it in a YAML file"):
        annotate.main([*files, "--judge", "words:3"])
    write_rows(tmp_path / "prompts.jsonl", [Prompt("p", (Message("user", "count"),))])
    generate = ["--input", str(tmp_path / "prompts.jsonl"), *files[2:], "--generate"]
    for flags in (generate, [*files, "--max-cost", "1"]):
        with pytest.raises(UserError, match="requires a judge at an endpoint, and words is"):
            annotate.main([*flags, "--judge", judge])

    base, better = (str(tmp_path / f"{name}.jsonl") for name in texts)
    compared = ["--responses", base, better, "--baseline", base, "--output", str(tmp_path / "out")]
    assert evaluate.main([*compared, "--judge", judge, "--ask", "scores"]) == 0
    [scores] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["judges"].values()
    assert "scores" in scores

    context = JudgeContext(False, tmp_path)
    questions = [Question(item) for item in read_all(tmp_path / "better.jsonl", Response)]
    assert [v.score for v in config.open(context).judge(questions)] == [9.0]
    assert config.resume_settings() == {"kind": "words", "target": 3}
    assert read(tmp_path, "other", kind="words", target=4).fingerprint != config.fingerprint
