"""Tests of the files that describe the judges of a training."""

import json

import pytest

from alignment.judges.kinds.registry import read_judge
from megatron_ext.errors import UserError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind: oracle", "kind is one of local, endpoint, rule, function, .*, not 'oracle'"),
        ("model: x", "must be a mapping with a kind"),
        ("kind: local", "a judge of kind local needs model"),
        ("kind: rule\nrule_text: a\ncolour: red", "colour is not a key of a judge"),
        ("kind: [", "is not YAML"),
    ],
)
def test_read_judge_refuses_wrong_files(tmp_path, content, message):
    (tmp_path / "judge.yaml").write_text(content)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_judge(str(tmp_path / "judge.yaml"))


def test_resume_settings_ignore_the_server_but_not_the_judge(tmp_path):
    def lasting(**changes):
        settings = {"kind": "endpoint", "model": "m", "url": "http://a/v1"} | changes
        (tmp_path / "judge.yaml").write_text(json.dumps(settings))
        return read_judge(str(tmp_path / "judge.yaml")).resume_settings()

    assert lasting() == lasting(url="http://b/v1", concurrency=3, tries=1)
    assert lasting() != lasting(temperature=0.5) and lasting() != lasting(model="n")


@pytest.mark.parametrize("name", ["people.jsonl", "people.csv", "people.parquet", "a.jsonl.gz"])
def test_labels_of_people_are_no_judge(tmp_path, name):
    (tmp_path / name).write_text("")
    message = r"labels of people on existing responses, .* Train a judge on them"
    with pytest.raises(UserError, match=message):
        read_judge(str(tmp_path / name))
