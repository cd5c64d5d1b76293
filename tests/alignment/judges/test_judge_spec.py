"""The file of a judge: what it may say, and what of it must stay the same in a run."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.commands import judge_flags as flags
from alignment.judges.judge_spec import JudgeSpec
from alignment.judges.kinds.local_judge import local_judge_identity
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

LOCAL = {"kind": "local", "model": "m"}
ENDPOINT = {"kind": "endpoint", "model": "m", "url": "http://a/v1"}


def read(folder, name="judge", **given):
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(given))
    return JudgeSpec.read(str(file))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"rows": "many"}, "rows must be a whole number, not 'many'"),
        ({"rows": True}, "rows must be a whole number, not True"),
        ({"rows": 1.5}, "rows must be a whole number, not 1.5"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": float("nan")}, "temperature must be a number, not "),
        ({"tries": 0}, "tries must be at least 1, not 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, not -1"),
        ({"length": "10k"}, "length must be a whole number, not '10k'"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"timeout": 0}, "timeout must be above 0, not 0"),
        ({"model": 5}, "model must be text, not 5"),
        ({"kind": ["a"]}, r"kind must be text, not \['a'\]"),
        ({"template": 5}, "template must be text, not 5"),
        ({"expected_score": "no"}, "expected_score must be true or false, not 'no'"),
        ({"chat_template_kwargs": None}, "chat_template_kwargs must be a mapping, not None"),
    ],
)
def test_values_of_a_wrong_kind_are_told(tmp_path, given, told):
    with pytest.raises(UserError, match=rf"judge\.yaml: {told}"):
        read(tmp_path, **{**LOCAL, **given})


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (9, "scale must be a list, not 9"),
        (["0", 9], "scale must be two numbers, not "),
        ([0, True], "scale must be two numbers, not "),
        ([0], "scale 0 must be two finite numbers, the lower one first"),
        ([9, 0], "scale 9 0 must be two finite numbers, the lower one first"),
    ],
)
def test_the_scale_of_a_function_is_two_numbers_in_order(tmp_path, scale, told):
    with pytest.raises(UserError, match=rf"judge\.yaml: {told}"):
        read(tmp_path, kind="function", function="checks.py:f", scale=scale)


def test_a_function_has_a_time_limit_and_its_scale_is_of_its_verdicts(tmp_path):
    (tmp_path / "checks.py").write_text("")
    given = {"kind": "function", "function": f"{tmp_path}/checks.py:f"}
    plain, scaled = read(tmp_path, **given), read(tmp_path, **given, scale=[0, 1], timeout=5)
    assert (plain.timeout, scaled.timeout) == (60.0, 5)
    assert "scale" not in plain.lasting() and scaled.lasting()["scale"] == [0, 1]
    assert plain.who != scaled.who
    with pytest.raises(UserError, match="max_wait must not be negative, not -1"):
        read(tmp_path, **ENDPOINT, max_wait=-1)


def test_a_whole_number_is_a_number_and_what_may_be_left_out_may_be_null(tmp_path):
    spec = read(tmp_path, **ENDPOINT, temperature=0, timeout=5, template=None)
    assert (spec.temperature, spec.timeout, spec.template) == (0, 5, None)


def drawn(spec):
    return spec.temperature, spec.top_k, spec.top_p, spec.max_new_tokens


def test_an_endpoint_is_asked_as_annotate_asks_where_its_file_does_not_say(tmp_path):
    files = ["--input", "items", "--output", "verdicts"]
    options = flags.parse([*files, "--judge", "http://a/v1", "--model", "m"], "")
    annotate = (options.temperature, options.top_k, options.top_p, options.max_tokens)
    assert drawn(read(tmp_path, **ENDPOINT)) == annotate == (0.0, None, None, 8192)
    assert drawn(read(tmp_path, **ENDPOINT, top_k=None, top_p=0.9)) == (0.0, None, 0.9, 8192)
    assert drawn(read(tmp_path, **LOCAL)) == (0.7, 20, 0.95, 4096)
    with pytest.raises(UserError, match="top_p may be null of an endpoint alone"):
        read(tmp_path, **LOCAL, top_p=None)


@pytest.mark.parametrize(
    ("kind", "given"),
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
def test_what_a_kind_does_not_use_is_refused(tmp_path, kind, given):
    needed = {"rule": {"rule_text": "t"}, "function": {"function": "f.py:f"}}
    whole = {"local": LOCAL, "endpoint": ENDPOINT}.get(kind) or {"kind": kind, **needed[kind]}
    read(tmp_path, **whole, agreement="agreement.json")
    with pytest.raises(UserError, match=rf"judge\.yaml: {next(iter(given))} is not of .* {kind},"):
        read(tmp_path, **whole, **given)


@pytest.fixture
def files(tmp_path):
    """Of each kind of judge, its file and the files that it names."""
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


def test_what_a_file_of_a_judge_holds_must_stay_and_its_place_may_change(files):
    before = {n: read(files, **given).lasting() for n, (given, _) in specs(files).items()}
    moved = files.with_name("moved")
    files.rename(moved)
    for name, (given, file) in specs(moved).items():
        spec = read(moved, **given)
        assert spec.lasting() == before[name], name
        content = (moved / file).read_text()
        (moved / file).write_text(f"{content}\nsomething else is here")
        assert spec.lasting() != before[name], name
        (moved / file).write_text(content)
        assert spec.lasting() == before[name], name
    (moved / "checks.py").unlink()
    with pytest.raises(UserError, match=r"names .*checks\.py, which cannot be read"):
        read(moved, **specs(moved)["function"][0]).lasting()


def test_a_model_that_did_not_change_is_read_once(files, monkeypatch):
    import hashlib

    whole, read_files = hashlib.file_digest, []

    def digest(stream, name):
        read_files.append(stream.name)
        return whole(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    spec = read(files, **specs(files)["weights"][0])
    assert spec.lasting() == spec.lasting() and len(read_files) == 1
    os.utime(files / "model" / "model.safetensors", (0, 0))
    spec.lasting()
    assert len(read_files) == 2


def test_a_judge_depends_on_the_chat_template_wherever_it_is(files):
    def identity(template):
        judge_format: Any = SimpleNamespace(
            identity="format",
            parser=SimpleNamespace(thinks=False),
            tokenizer=SimpleNamespace(chat_template=template),
        )
        return local_judge_identity(str(files / "model"), judge_format, Sampling(16))

    assert identity("a") == identity("a") != identity("b")


def test_a_judge_is_the_same_whatever_template_asks_it(files):
    local, _ = specs(files)["weights"]
    pairs = read(files, "pairs", **local, template="pairwise-rubric", rows=2)
    scores = read(files, "scores", **local, template="pointwise")
    assert pairs.who == scores.who and pairs.lasting() != scores.lasting()
    rules = [read(files, **specs(files)["rule"][0], rule=rule) for rule in ("gold", "no-copying")]
    assert len({pairs.who, *(rule.who for rule in rules)}) == 3
