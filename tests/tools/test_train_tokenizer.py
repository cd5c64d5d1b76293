"""tools.train_tokenizer: properties of the tokenizer, its sample, and refusals."""

import functools
import gzip
import json
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer

from megatron_ext.data.line_sample import LineSample
from megatron_ext.errors import run_tool
from tools import train_tokenizer

WORDS = ["".join(random.Random(i).choices(string.ascii_lowercase, k=2 + i % 7)) for i in range(500)]


def write_corpus(path, documents=300):
    choose = random.Random(5)
    with open(path, "w") as file:
        for _ in range(documents):
            lines = [" ".join(choose.choices(WORDS, k=12)) + ".  Zürich 2024" for _ in range(4)]
            file.write(json.dumps({"text": "\n".join(lines)}) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def model(corpus):
    path = corpus.with_name("tokenizer.model")
    train_tokenizer.main(["--input", str(corpus), "--vocab-size", "600", "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}
    )


def test_megatron_reads_the_tokenizer_with_its_special_ids(tokenizer):
    assert tokenizer.vocab_size == 600
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 3)
    assert tokenizer.eod == tokenizer.eos


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decoding_restores_any_text_without_special_tokens(tokenizer, text):
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert not set(ids) & {0, 1, 2, 3}


def test_names_of_special_tokens_are_encoded_as_text(tokenizer):
    text = "a </s> b <s><unk><pad> <0x41>"
    ids = tokenizer.tokenize(text)
    assert not set(ids) & {0, 1, 2, 3}
    assert tokenizer.detokenize(ids) == text


def test_digits_are_separate_tokens(tokenizer):
    assert tokenizer.detokenize(tokenizer.tokenize("2024")[:1]) == "2"


def test_training_is_deterministic_and_appends_the_suffix(corpus, model, tmp_path):
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    output = tmp_path / "again"
    train_tokenizer.main(["--input", str(packed), "--vocab-size", "600", "--output", str(output)])
    assert output.with_suffix(".model").read_bytes() == model.read_bytes()


def test_vocabulary_of_65536_trains():
    choose = random.Random(1)
    lines = [
        " ".join("".join(choose.choices(string.ascii_lowercase, k=9)) for _ in range(10))
        for _ in range(4000)
    ]
    model = train_tokenizer.train_sentencepiece(lines, 65536, 1.0)
    tokenizer = train_tokenizer.sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.get_piece_size() == 65536


def test_sample_is_bounded_and_deterministic():
    texts = [f"line {i} " + "x" * (i % 50) for i in range(5000)]
    first, same, other = (
        train_tokenizer.sample_lines(iter(texts), 400, 20_000, seed) for seed in (0, 0, 1)
    )
    assert first.lines() == same.lines() != other.lines()
    assert len(first.lines()) <= 400
    assert first.bytes == sum(map(len, first.lines())) <= 20_000
    assert first.bytes > 20_000 - 100 or len(first.lines()) == 400
    assert first.seen_lines == 5000


def test_sample_is_uniform_over_the_stream_and_over_lengths():
    texts = ["a" * (1 + 30 * (i % 2)) for i in range(2000)]
    early = long = total = 0
    for seed in range(60):
        sample = LineSample(10**9, 3000, seed)
        for i, text in enumerate(texts):
            sample.add(f"{i:04}{text}")
        lines = sample.lines()
        total += len(lines)
        early += sum(int(line[:4]) < 1000 for line in lines)
        long += sum(len(line) > 20 for line in lines)
    assert abs(early / total - 0.5) < 0.02  # five standard deviations
    assert abs(long / total - 0.5) < 0.02


def test_sample_of_all_lines_keeps_their_order():
    lines = [f"{i}\n" for i in range(100)]
    assert train_tokenizer.sample_lines(["".join(lines)], 10**9, 10**9, 0).lines() == lines


def refusal(capsys, *arguments):
    """The one line on stderr of a run that must exit with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_tool(functools.partial(train_tokenizer.main, list(map(str, arguments))))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_tokenizer_training_refusals_are_one_line(corpus, tmp_path, capsys):
    output = tmp_path / "new.model"
    base = ["--output", output, "--vocab-size", 600]
    assert "too large" in refusal(capsys, "--input", corpus, *base[:2], "--vocab-size", 10**6)
    assert "too small" in refusal(capsys, "--input", corpus, *base[:2], "--vocab-size", 200)
    assert "--vocab-size" in refusal(capsys, "--input", corpus, *base[:2], "--vocab-size", "x")
    assert "matches no file" in refusal(capsys, "--input", tmp_path / "*.jsonl", *base)
    assert "does not exist" in refusal(capsys, "--input", tmp_path / "none.jsonl", *base)
    assert "--text-key" in refusal(capsys, "--input", corpus, "--text-key", "body", *base)
    assert "required: --input" in refusal(capsys, *base)
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n")
    assert "no text" in refusal(capsys, "--input", blank, *base)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(corpus.read_bytes())[:-300])
    assert "truncated" in refusal(capsys, "--input", broken, *base)
    below = corpus / "folder" / "x.model"
    assert "cannot be created" in refusal(
        capsys, "--input", corpus, "--output", below, "--vocab-size", 600
    )
    assert not list(tmp_path.glob("new*"))


def test_existing_output_needs_overwrite(corpus, model, capsys):
    before = model.read_bytes()
    arguments = ["--input", str(corpus), "--output", str(model), "--vocab-size", "500"]
    assert "--overwrite" in refusal(capsys, *arguments)
    assert model.read_bytes() == before
