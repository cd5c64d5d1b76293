"""Tests that a tokenizer has the same ids next to the config.json of any model and without one."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import CONFIG_MAPPING, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from megatron_ext.data.run_tokenizer import keep_tokenizer
from megatron_ext.data.tokenizer_identity import tokenizer_digest
from megatron_ext.errors import UserError
from megatron_ext.hf.tokenizer_export import (
    carry_tokenizer,
    copy_exported_tokenizer,
    export_tokenizer,
    import_tokenizer,
    match_exported_tokenizer,
)
from tests.data.hf_tokenizers import byte_level
from tests.distributed import run_ranks
from tests.hf.models import make

FAMILIES = ("llama", "mixtral", "qwen2", "qwen3")
CLASSES = ("LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None)
TEXTS = (
    "<s> [INST] a [/INST] b</s> [INST] c",
    "cafe\u0301 12345",
    "a  b\n",
    "x  =  3.14",
)


def llama_2(folder: Path) -> Path:
    """Write a tokenizer.json like Llama 2's, whose spaces are pieces that a normalizer makes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"INST[]/abcfex=.", *"12345", "▁[", "▁a", "▁b", "▁c", "IN", "ST", "INST"]
    merges = [("▁", "["), ("▁", "a"), ("▁", "b"), ("▁", "c"), ("I", "N"), ("S", "T"), ("IN", "ST")]
    pieces = list(dict.fromkeys(pieces))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def gpt_2(folder: Path) -> Path:
    """Write the byte-level BPE of `tools.train_tokenizer`."""
    return byte_level(folder)


def name_class(folder: Path, name: str | None) -> None:
    settings: dict[str, Any] = {"eos_token": "</s>" if is_llama_2(folder) else "<|endoftext|>"}
    if is_llama_2(folder):
        settings |= {"bos_token": "<s>", "unk_token": "<unk>"}
    if name is not None:
        settings["tokenizer_class"] = name
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def is_llama_2(folder: Path) -> bool:
    return "<0x00>" in (folder / "tokenizer.json").read_text()


def add_config(folder: Path, family: str) -> None:
    CONFIG_MAPPING[family]().save_pretrained(folder)


def ids(folder: Path, **options: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return [tokenizer(text).input_ids for text in TEXTS]


def run_with(folder: Path) -> Namespace:
    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), vocab_size=512
    )
    args.tokenizer_sha256 = tokenizer_digest(args)
    return args


@pytest.fixture(params=[llama_2, gpt_2])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "source")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_imported_tokenizer_has_the_ids_of_the_folder(
    family: str, name: str | None, source: Path, tmp_path: Path
) -> None:
    name_class(source, name)
    add_config(source, family)
    expected = ids(source)
    folders = {folder: tmp_path / folder for folder in ("imported", "again", "carried")}
    for folder in folders.values():
        folder.mkdir()
    imported = Path(import_tokenizer(source, 512, folders["imported"])[-1])
    assert ids(imported) == expected
    carried = Path(carry_tokenizer(run_with(imported), folders["carried"])[-1])
    assert ids(carried) == expected
    export_tokenizer(run_with(imported), folders["again"])
    add_config(folders["again"], family)
    match_exported_tokenizer(imported, folders["again"])
    assert ids(folders["again"]) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "qwen3"])
def test_run_keeps_the_ids_of_a_tokenizer_in_the_folder_of_a_model(
    family: str, source: Path, tmp_path: Path
) -> None:
    """The digest, which datasets and checkpoints contain, is that of the original."""
    name_class(source, None if family == "qwen3" else "LlamaTokenizer")
    add_config(source, family)
    args = run_with(source)
    keep_tokenizer(args, tmp_path / "run")
    (tmp_path / "carried").mkdir()
    carried = Path(carry_tokenizer(args, tmp_path / "carried")[-1])
    for copy in (tmp_path / "run" / "tokenizer", carried):
        assert ids(copy) == ids(source)
        assert tokenizer_digest(run_with(copy)) == args.tokenizer_sha256


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_exported_tokenizer_has_the_ids_of_training(
    family: str, name: str, source: Path, tmp_path: Path
) -> None:
    name_class(source, name)
    (folder := tmp_path / "hf").mkdir()
    special = export_tokenizer(run_with(source), folder)
    add_config(folder, family)
    match_exported_tokenizer(source, folder)
    exported = AutoTokenizer.from_pretrained(folder)
    assert ids(folder) == ids(folder, trust_remote_code=True) == ids(source)
    assert special["eos_token_id"] == exported.eos_token_id
    exported.save_pretrained(tmp_path / "saved")
    add_config(tmp_path / "saved", family)
    assert ids(tmp_path / "saved") == ids(source)
    # An export of the export, and a checkpoint that is made of it.
    for place in ("copy", "checkpoints"):
        (tmp_path / place).mkdir()
    copy_exported_tokenizer(folder, tmp_path / "copy")
    add_config(tmp_path / "copy", family)
    match_exported_tokenizer(folder, tmp_path / "copy")
    assert ids(tmp_path / "copy") == ids(tmp_path / "copy", trust_remote_code=True) == ids(source)
    imported = Path(import_tokenizer(folder, 512, tmp_path / "checkpoints")[-1])
    assert ids(imported) == ids(source)


def test_files_of_a_tokenizer_that_loads_equally_are_not_changed(tmp_path: Path) -> None:
    source = gpt_2(tmp_path / "source")
    add_config(source, "qwen3")
    (folder := tmp_path / "hf").mkdir()
    export_tokenizer(run_with(source), folder)
    add_config(folder, "qwen3")
    match_exported_tokenizer(source, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert not (folder / "tokenization_exact.py").exists()


def export_both_ways(folder: Path) -> None:
    """Write, on a rank, a checkpoint of Qwen2 that was trained with another tokenizer."""
    from alignment.engines.export import export
    from megatron_ext.hf.sources import open_model
    from tools import convert_checkpoint

    def convert(source: str, target: str, load: str, save: str, *more: str) -> None:
        flags = ["--from", source, "--to", target, "--load", str(folder / load)]
        convert_checkpoint.main([*flags, "--save", str(folder / save), *more])

    convert("hf", "megatron", "hf", "checkpoints")
    tokenizer = ("--tokenizer-model", str(folder / "source"))
    convert("megatron", "hf", "checkpoints", "converted", *tokenizer)
    source = open_model(folder / "checkpoints")
    assert source.args is not None
    source.args.tokenizer_model = str(folder / "source")
    tensors = ((name, source.tensors.read(name)) for name in source.tensors.shapes)
    export(folder / "policy", source, tensors)


def test_checkpoint_of_qwen2_is_exported_with_the_tokenizer_of_its_training(
    tmp_path: Path,
) -> None:
    source = gpt_2(tmp_path / "source")
    make("qwen2", tmp_path / "hf")
    shutil.copytree(source, tmp_path / "hf", dirs_exist_ok=True)
    run_ranks(export_both_ways, 1, tmp_path)
    assert ids(tmp_path / "hf") != ids(source)
    for folder in (tmp_path / "converted", tmp_path / "policy"):
        assert ids(folder) == ids(folder, trust_remote_code=True) == ids(source)


def test_class_of_qwen2_replaces_the_rules_of_other_tokenizers(tmp_path: Path) -> None:
    """If this fails, `match_encoding` need not name code for Qwen2 any more."""
    source = gpt_2(tmp_path / "source")
    shutil.copytree(source, copy := tmp_path / "copy")
    add_config(copy, "qwen2")
    assert isinstance(AutoTokenizer.from_pretrained(copy), Qwen2Tokenizer)
    assert ids(copy) != ids(source)


def test_tokenizer_without_rules_in_a_file_is_refused_where_its_class_is_replaced(
    tmp_path: Path,
) -> None:
    """The reason and the remedy are named; CTRL's tokenizer is one of Python code."""
    (source := tmp_path / "source").mkdir()
    names = ["<unk>", "a</w>", "b</w>", "c</w>", "ab</w>", "a", "b"]
    (source / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (source / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    (folder := tmp_path / "hf").mkdir()
    export_tokenizer(run_with(source), folder)
    add_config(folder, "qwen2")
    with pytest.raises(UserError) as refused:
        match_exported_tokenizer(source, folder)
    message = str(refused.value)
    assert "as CTRLTokenizer there and as Qwen2Tokenizer here" in message
    assert "because of the model_type qwen2 in config.json" in message
    assert "Choose a tokenizer with a tokenizer.json" in message


def test_damaged_tokenizer_is_refused_with_its_folder(tmp_path: Path) -> None:
    source = gpt_2(tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"source cannot be loaded by transformers: .*Copy its"):
        import_tokenizer(source, 512, tmp_path / "checkpoints")
