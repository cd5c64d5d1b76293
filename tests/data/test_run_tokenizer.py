"""Tests of the copies of tokenizers in run directories."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from alignment.data.model_tokenizer import read_tokenizer
from megatron_ext.checkpoint import TRACKER
from megatron_ext.data.run_tokenizer import (
    RECORD,
    keep_tokenizer,
    locate_tokenizer,
    tokenizer_flags,
)
from megatron_ext.data.tokenizer_identity import tokenizer_digest
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens
from tests.data import hf_tokenizers


@pytest.fixture(params=["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def args(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Namespace:
    """Return the arguments of a run with a separate tokenizer, which a test may change."""
    if request.param == "HuggingFaceTokenizer":
        original = hf_tokenizers.byte_level(tmp_path / "original")
    else:
        original = tmp_path / "original.model"
        shutil.copy(model, original)
    run = Namespace(
        tokenizer_type=request.param,
        tokenizer_model=str(original),
        run_dir=str(tmp_path / "run"),
        load=str(tmp_path / "run/checkpoints"),
        finetune=False,
    )
    run.tokenizer_sha256 = tokenizer_digest(run)
    return run


def keep(args: Namespace) -> tuple[Path, Path]:
    """Store the tokenizer of a run with a checkpoint; return its copy and its folder."""
    run = Path(args.run_dir)
    iteration = run / "checkpoints/iter_0000001"
    iteration.mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / TRACKER).write_text("1")
    for name in ("metadata.json", ".metadata"):
        (iteration / name).touch()
    keep_tokenizer(args, run)
    record = json.loads((run / "tokenizer" / RECORD).read_text())
    assert record["sha256"] == args.tokenizer_sha256 and record["type"] == args.tokenizer_type
    return run / "tokenizer" / (record["file"] or ""), iteration


def change(args: Namespace) -> None:
    """Replace the tokenizer of the run by another one."""
    original = Path(args.tokenizer_model)
    if original.is_dir():
        shutil.rmtree(original)
        hf_tokenizers.byte_level(original, 290)
    else:
        original.write_bytes(original.read_bytes()[:-1])


def remove(args: Namespace) -> None:
    original = Path(args.tokenizer_model)
    shutil.rmtree(original) if original.is_dir() else original.unlink()


def test_copy_is_the_same_tokenizer_and_is_made_once(args: Namespace) -> None:
    copy, _ = keep(args)
    assert tokenizer_digest(Namespace(**vars(args) | {"tokenizer_model": str(copy)})) == (
        args.tokenizer_sha256
    )
    if copy.is_dir():
        text = "naïve 漢字 <|endoftext|>\n\n 2024"
        ids = [
            AutoTokenizer.from_pretrained(p)(text).input_ids for p in (copy, args.tokenizer_model)
        ]
        assert ids[0] == ids[1]
    before = copy.stat().st_ino
    keep(args)
    assert copy.stat().st_ino == before
    (copy / "tokenizer.json" if copy.is_dir() else copy).write_text("{}")  # damaged
    keep(args)
    assert copy.stat().st_ino != before
    assert not list(Path(args.run_dir).glob(".tokenizer*"))


def test_model_is_loaded_with_the_copy_where_the_original_is_gone_or_changed(
    args: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, iteration = keep(args)
    original = args.tokenizer_model
    locate_tokenizer(args, iteration)
    assert args.tokenizer_model == original and capsys.readouterr().err == ""
    for spoil, reason in ((change, "another content"), (remove, "does not exist")):
        args.tokenizer_model = original
        spoil(args)
        locate_tokenizer(args, iteration)
        assert args.tokenizer_model == str(copy)
        assert (
            f"{copy}, because {original}" in (message := capsys.readouterr().err)
            and reason in message
        )
    moved = Path(args.run_dir).rename(tmp_path / "moved")
    args.tokenizer_model = original
    locate_tokenizer(args, moved / "checkpoints/iter_0000001")
    assert args.tokenizer_model == str(copy).replace("/run/", "/moved/")


def test_changed_tokenizer_without_a_copy_is_refused(args: Namespace, tmp_path: Path) -> None:
    change(args)
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        locate_tokenizer(args, tmp_path / "run/checkpoints/iter_0000001")


def flags_of(args: Namespace, **changes: Any) -> list[str]:
    return tokenizer_flags(Namespace(**{**vars(args), **changes}), set())


def test_resumed_run_uses_its_copy_and_reports_why(
    args: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flags_of(args) == []
    copy, _ = keep(args)
    use_copy = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", str(copy)]
    assert flags_of(args) == []
    assert flags_of(args, tokenizer_model=None, tokenizer_type=None) == use_copy
    assert "the flags name no other" in capsys.readouterr().err
    other = hf_tokenizers.byte_level(tmp_path / "other", 280)
    if copy.is_dir():  # the checks of the run refuse it
        assert flags_of(args, tokenizer_model=str(other)) == []
    change(args)
    assert flags_of(args) == use_copy
    assert "has changed since" in capsys.readouterr().err
    remove(args)
    assert flags_of(args) == use_copy
    assert "does not exist" in capsys.readouterr().err
    assert flags_of(args, finetune=True) == []


def test_type_follows_from_the_files(args: Namespace) -> None:
    kind, path = args.tokenizer_type, args.tokenizer_model
    expected = ["--tokenizer-type", kind, "--tokenizer-model", path]
    assert flags_of(args, tokenizer_type=None) == expected
    if Path(path).is_dir():
        file = f"{path}/tokenizer.json"
        assert flags_of(args, tokenizer_type=None, tokenizer_model=file) == expected
        assert flags_of(args, tokenizer_model=file) == expected[2:]


def test_folder_of_the_user_is_not_replaced(args: Namespace) -> None:
    folder = Path(args.run_dir, "tokenizer")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="Rename it, or choose another --run-dir"):
        keep_tokenizer(args, Path(args.run_dir))
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    if Path(args.tokenizer_model).is_dir():
        shutil.copytree(args.tokenizer_model, folder, dirs_exist_ok=True)
        inside = Namespace(**vars(args) | {"tokenizer_model": str(folder)})
        keep_tokenizer(inside, Path(args.run_dir))
        assert not (folder / RECORD).exists()


def test_alignment_reads_the_copy_with_its_special_tokens(args: Namespace) -> None:
    keep(args)
    original, run = Path(args.tokenizer_model), Path(args.run_dir)
    text = "naïve 漢字\n\n 2024"
    if original.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(original)
        ids, end = tokenizer(text).input_ids, tokenizer.eos_token_id
    else:
        processor = SentencePieceProcessor(model_file=str(original))
        ids, end = processor.encode(text), processor.eos_id()
    for folder in (run, run / "tokenizer"):
        tokenizer = read_tokenizer(folder)
        assert tokenizer(text).input_ids == ids
        assert tokenizer.eos_token_id == end and end_tokens(tokenizer) == {end}
