"""Tests that a text has the same ids wherever it is encoded."""

import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignment.data.model_tokenizer import read_tokenizer
from megatron_ext.chat_templates import prompt_ids
from megatron_ext.data.preprocessing.encoding import DocumentEncoder
from megatron_ext.errors import UserError
from megatron_ext.evaluation.text_codec import TextCodec
from megatron_ext.hf.end_tokens import end_tokens, record_end_tokens
from megatron_ext.hf.tokenizer_export import (
    as_transformers,
    carry_tokenizer,
    export_tokenizer,
    import_tokenizer,
)
from tests.tools.preprocessed import make_texts
from tools import train_tokenizer

AWKWARD = [
    "", " ", "  ", "\n", "\0", "a\0b", "<s>", "</s>", "<unk>", "<pad>", "a <s>b</s>", "<0x41>",
    "\u2581", "a\u2581 b", "\u2581\u2581", " lead", "trail ", "two  spaces", "\t\ttabs",
    "line\r\nends\n\n", "e\u0301", "é", "ﬁ ligature", "Ⅷ", "Å", "１２", "👩‍👩‍👧", "🏳️‍🌈", "\u200b",
    "\ufeffbom", "▅", "\u2047", "\ue000", "漢字", "مرحبا", "it is not . good ?",
]  # fmt: skip


def texts() -> list[str]:
    draw = random.Random(0)
    words = [*AWKWARD[1:], "the", " the", "threshold", "expert ", "2024", "."]
    made = ["".join(draw.choices(words, k=draw.randrange(1, 9))) for _ in range(4000)]
    return [*AWKWARD, *made]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SentencePiece model whose runs of spaces are pieces."""
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    indented = [text.replace(" ", "   ") for text in make_texts(200)]
    file.write_bytes(train_tokenizer.train_sentencepiece([*make_texts(200), *indented], 380, 1.0))
    return file


def arguments(kind: str, model: Path, vocab: int) -> Namespace:
    return Namespace(tokenizer_type=kind, tokenizer_model=str(model), vocab_size=vocab)


def test_sentencepiece_ids_equal_those_of_training(model: Path, tmp_path: Path) -> None:
    trained = sentencepiece.SentencePieceProcessor(model_file=str(model))
    folder = tmp_path / "hf"
    folder.mkdir()
    args = arguments("SentencePieceTokenizer", model, trained.get_piece_size())
    export_tokenizer(args, folder)
    megatron = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}
    )
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    exported.save_pretrained(tmp_path / "again")
    preprocess = DocumentEncoder(str(model), "uint16")
    encoders = {
        "server and training": megatron.tokenize,
        "preprocessing": lambda text: np.frombuffer(preprocess(text), np.uint16).tolist()[:-1],
        "transformers": lambda text: exported(text).input_ids,
        "vLLM": lambda text: exported.encode(text, add_special_tokens=True),
        "saved again": AutoTokenizer.from_pretrained(
            tmp_path / "again", trust_remote_code=True
        ).encode,
        "evaluation of a checkpoint": TextCodec(of_megatron=megatron).encode,
        "evaluation of a folder": TextCodec(of_transformers=exported).encode,
        "alignment": read_tokenizer(folder).encode,
        "chat": as_transformers(megatron).encode,
    }
    for text in texts():
        expected = trained.encode(text)
        for name, encode in encoders.items():
            assert encode(text) == expected, (name, text)


def test_sentencepiece_control_tokens_come_from_the_template_only(
    model: Path, tmp_path: Path
) -> None:
    args = arguments("SentencePieceTokenizer", model, 380)
    export_tokenizer(args, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = [{"role": "user", "content": "a </s>"}]
    plain = tokenizer("a </s>").input_ids
    assert prompt_ids(tokenizer, rows) == [*plain, tokenizer.eos_token_id]
    rows[0]["content"] = "a"
    ids = tokenizer.apply_chat_template(rows, return_dict=False)
    assert ids == prompt_ids(tokenizer, rows) == [*tokenizer("a").input_ids, tokenizer.eos_token_id]


def byte_level(folder: Path, bos: bool = True, chat_template: str | None = None) -> Any:
    """Return a tokenizer of transformers that adds <s> to a text and pads with its end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(make_texts(200), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=chat_template,
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("bos", [True, False])
def test_transformers_tokenizer_ids_survive_conversion(bos: bool, tmp_path: Path) -> None:
    original = byte_level(tmp_path / "hf", bos)
    for name in ("checkpoints", "back"):
        (tmp_path / name).mkdir()
    flags = import_tokenizer(tmp_path / "hf", 512, tmp_path / "checkpoints")
    assert flags[1] == "HuggingFaceTokenizer"
    export_tokenizer(arguments(flags[1], Path(flags[3]), 512), tmp_path / "back")
    megatron = MegatronTokenizer.from_pretrained(
        tokenizer_path=flags[3], metadata_path={"library": "huggingface"}
    )
    exported = AutoTokenizer.from_pretrained(tmp_path / "back")
    codec = TextCodec(of_transformers=exported)
    every = texts() if bos else texts()[:400]
    whole, plain = (original(every, add_special_tokens=s).input_ids for s in (True, False))
    assert exported(every).input_ids == whole
    for text, expected, ids in zip(every, whole, plain):
        assert megatron.tokenize(text) == expected, text
        assert codec.encode(text) == ids and codec.decode(ids) == text, text
        once = expected[1:] if bos and ids[:1] == [0] else expected
        assert codec.encode(text, special=True) == once, text


def test_end_tokens_travel_with_the_tokenizer(tmp_path: Path) -> None:
    byte_level(tmp_path / "hf")
    settings = '{"eos_token_id": [1, 2], "temperature": 0.6}'
    (tmp_path / "hf" / "generation_config.json").write_text(settings)
    places = [tmp_path / name for name in ("checkpoints", "recalibrated", "back")]
    for place in places:
        place.mkdir()
    flags = import_tokenizer(tmp_path / "hf", 512, places[0])
    args = arguments(flags[1], Path(flags[3]), 512)
    args.tokenizer_model = carry_tokenizer(args, places[1])[-1]
    ids = export_tokenizer(args, places[2])
    assert ids == {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 1}
    assert (places[2] / "generation_config.json").read_text() == settings
    (places[2] / "config.json").write_text("{}")
    assert end_tokens(read_tokenizer(places[2])) == {1, 2}


def test_export_of_another_models_tokenizer_copies_end_tokens_only(tmp_path: Path) -> None:
    """The --tokenizer-model of the run is the folder of another model."""
    byte_level(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"eos_token_id": 1}')
    settings = '{"eos_token_id": [1, 2], "temperature": 0.6}'
    (tmp_path / "hf" / "generation_config.json").write_text(settings)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"large")
    (out := tmp_path / "out").mkdir()
    ids = export_tokenizer(arguments("HuggingFaceTokenizer", tmp_path / "hf", 512), out)
    assert ids["eos_token_id"] == [1, 2]
    assert "temperature" not in (out / "generation_config.json").read_text()
    (copy := tmp_path / "copy").mkdir()
    carry_tokenizer(arguments("HuggingFaceTokenizer", tmp_path / "hf", 512), copy)
    assert not list(copy.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"eos_token_id": ["</s>"]}', "Give the id of")],
)
def test_a_damaged_generation_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        record_end_tokens(byte_level(tmp_path / "hf"), tmp_path)


def test_end_tokens_come_from_the_config_without_a_generation_config(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    assert end_tokens(tokenizer) == {1}
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')
    record_end_tokens(tokenizer, tmp_path)
    assert end_tokens(tokenizer) == {1, 2}
