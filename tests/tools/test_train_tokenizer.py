"""Tests of tools.train_tokenizer: properties of the tokenizer, its sample, and refusals."""

import functools
import gzip
import json
import os
import random
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizer
from transformers import AutoTokenizer

from megatron_ext.data.line_sample import LineSample
from megatron_ext.errors import run_tool
from megatron_ext.hf.end_tokens import special_ids
from tests.distributed import ROOT
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


def test_short_lines_train() -> None:
    proto = train_tokenizer.train_sentencepiece(["ab", "aba", "b ab"], 264, 1.0)
    tokenizer = train_tokenizer.sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert tokenizer.vocab_size() == 264 and tokenizer.decode(tokenizer.encode("b aba")) == "b aba"


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
    """Return the one line on stderr of a run that must exit with 2."""
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
    assert "requires --input" in refusal(capsys, *base)
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


def train_hf(corpus, output, *more, size=600):
    train_tokenizer.main(
        ["--input", str(corpus), "--kind", "huggingface", "--vocab-size", str(size)]
        + ["--output", str(output), *more]
    )
    return output


@pytest.fixture(scope="module")
def hf_folder(corpus):
    return train_hf(corpus, corpus.with_name("hf"))


def test_hugging_face_tokenizer_is_exact_and_megatron_reads_it(hf_folder):
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == 600
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    megatron = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(hf_folder), metadata_path={"library": "huggingface"}
    )
    assert (megatron.vocab_size, megatron.eod) == (600, 0)
    assert tokenizer.decode(tokenizer("2024").input_ids[:1]) == "2"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_hugging_face_tokenizer_restores_any_text(hf_folder, text):
    tokenizer = loaded(hf_folder)
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert not set(ids) & {0, 1}


@functools.cache
def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_hugging_face_training_is_deterministic_for_any_number_of_threads(
    corpus, hf_folder, tmp_path
):
    for threads in ("1", "3"):
        arguments = [corpus, "--kind", "huggingface", "--vocab-size", 600]
        arguments += ["--output", tmp_path / threads]
        subprocess.run(
            [sys.executable, "-m", "tools.train_tokenizer", "--input", *map(str, arguments)],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
        )  # fmt: skip
        for file in hf_folder.iterdir():
            assert (tmp_path / threads / file.name).read_bytes() == file.read_bytes()


def test_runs_of_newlines_are_learned(tmp_path):
    (tmp_path / "a.txt").write_text("one paragraph\n\nanother one\n\n\n" * 50)
    folder = train_hf(tmp_path / "a.txt", tmp_path / "hf", size=270)
    assert "ĊĊ" in AutoTokenizer.from_pretrained(folder).get_vocab()


def test_chat_template_and_special_tokens(corpus, tmp_path):
    folder = train_hf(
        corpus, tmp_path / "hf", "--chat-template", "chatml", "--end-token", "</s>",
        "--special-tokens", "<tool>",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "</s>" and len(tokenizer) == 600
    names = ["</s>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(5))
    messages = [{"role": "user", "content": "Zürich?"}, {"role": "assistant", "content": "Yes."}]
    text = "<|im_start|>user\nZürich?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opened.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert special_ids(folder)["eos_token_id"] == [0, 3]  # generation stops after a turn, too


def test_hugging_face_refusals_are_one_line(corpus, hf_folder, tmp_path, capsys):
    base = ["--input", corpus, "--kind", "huggingface", "--output", tmp_path / "new"]
    assert "Set it to at most" in refusal(capsys, *base, "--vocab-size", 10**6)
    assert "at least 258" in refusal(capsys, *base, "--vocab-size", 200)
    base += ["--vocab-size", 600]
    assert "has no effect" in refusal(capsys, *base, "--character-coverage", 1)
    assert "cannot be read" in refusal(capsys, *base, "--chat-template", tmp_path / "none")
    assert "empty token" in refusal(capsys, *base, "--special-tokens", " ")
    assert "not a folder" in refusal(capsys, *base, "--output", tmp_path / "tokenizer.json")
    assert "--overwrite" in refusal(capsys, *base, "--output", hf_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    error = refusal(capsys, *base, "--output", tmp_path / "mine", "--overwrite")
    assert "other files" in error and (tmp_path / "mine/thesis.txt").exists()
    error = refusal(capsys, "--input", corpus, "--output", tmp_path / "x", "--vocab-size", 600,
                    "--chat-template", "chatml")  # fmt: skip
    assert "use --kind huggingface" in error
    assert not (tmp_path / "new").exists()
