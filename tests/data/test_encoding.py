"""Tests of encoding word by word against SentencePiece on the whole text."""

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.preprocessing import encoding
from megatron_ext.data.preprocessing.encoding import DocumentEncoder, words_are_independent
from tests.tools.preprocessed import make_texts

# Spaces and their runs, SentencePiece's own mark, line ends, and what needs byte tokens.
TEXTS = st.text(
    st.one_of(st.sampled_from("  \u2581\n\tthe."), st.characters(exclude_categories=["Cs"]))
)


def encoded(encoder, text):
    return np.frombuffer(encoder(text), dtype=np.uint16).tolist()


def trained(path, texts=None, **flags):
    """Train a BPE model with byte tokens and without normalization, except for `flags`."""
    model = io.BytesIO()
    asis = {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": False, "byte_fallback": True,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts or make_texts(200)), model_writer=model, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 360, **asis, **flags},
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_tokens_of_words_equal_those_of_the_whole_text(model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert words_are_independent(tokenizer)
    encoder = DocumentEncoder(str(model), "uint16")

    @settings(max_examples=500)
    @given(TEXTS)
    def check(text):
        assert encoded(encoder, text) == [*tokenizer.encode(text), tokenizer.eos_id()]

    check()
    for text in make_texts(300, seed=5):  # words met before
        assert encoded(encoder, text) == [*tokenizer.encode(text), tokenizer.eos_id()]


def test_spaces_next_to_the_mark_of_a_space_are_encoded_as_one_run(tmp_path):
    indented = [text.replace(" ", "    ") for text in make_texts(200)]
    model = tmp_path / "model"
    tokenizer = trained(model, indented, allow_whitespace_only_pieces=True)
    assert words_are_independent(tokenizer)
    assert tokenizer.piece_to_id("\u2581\u2581") != tokenizer.unk_id()  # a run may be one piece
    encoder = DocumentEncoder(str(model), "uint16")
    choose = random.Random(0)
    texts = ["".join(choose.choices("a \u2581", k=choose.randrange(9))) for _ in range(500)]
    for text in ["a\u2581 b", "a \u2581b", *texts]:
        assert encoded(encoder, text) == [*tokenizer.encode(text), tokenizer.eos_id()], text


def test_encoder_with_a_full_cache_and_long_words_gives_equal_tokens(model, monkeypatch):
    monkeypatch.setattr(encoding, "_MOST_WORDS", 5)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    encoder = DocumentEncoder(str(model), "uint16")
    for text in [*make_texts(50), "a " + "x" * 500]:
        assert encoded(encoder, text)[:-1] == tokenizer.encode(text)
    assert encoder._words is not None and len(encoder._words) == 5


@pytest.mark.parametrize(
    "flags",
    [
        {"user_defined_symbols": ["the gate"]},  # reaches over a space
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False, "vocab_size": 100},
        {"model_type": "unigram", "hard_vocab_limit": False},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_other_models_encode_whole_documents(tmp_path, flags):
    tokenizer = trained(tmp_path / "model", **flags)
    assert not words_are_independent(tokenizer)
    encoder = DocumentEncoder(str(tmp_path / "model"), "uint16")
    choose = random.Random(0)
    for text in make_texts(40):
        text = text.replace("the", choose.choice(["the gate", "  the", "漢漢 é", "the"]))
        assert encoded(encoder, text) == [*tokenizer.encode(text), tokenizer.eos_id()]
