"""Copy of a run's tokenizer in its directory, with which the run can be moved.

The copy is RUN_DIR/tokenizer: the tokenizer's files, and `run_tokenizer.json` with the type, the
digest and the path of the original. A run and everything that loads its model use the original as
long as its content is that of the training, and the copy otherwise.
"""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import TRACKER
from megatron_ext.console import console
from megatron_ext.data.tokenizer_identity import (
    cached_folder,
    check_tokenizer_content,
    tokenizer_digest,
    tokenizer_of_path,
)
from megatron_ext.errors import UserError
from megatron_ext.new_folder import new_folder

RECORD = "run_tokenizer.json"
_FOLDER = "tokenizer"
_SENTENCEPIECE = "tokenizer.model"


def keep_tokenizer(args: Namespace, run_dir: Path) -> None:
    """Copy the tokenizer of a run into its directory, unless it is there.

    The copy appears when it is complete. A copy of an earlier start with another tokenizer is
    replaced: a run with a checkpoint has been refused by then.

    Args:
        args: Arguments of the run, with `tokenizer_sha256`.
        run_dir: Directory of the run.

    Raises:
        UserError: The copy differs from the original, or another folder has its name.
    """
    source = _source(args)
    if source is None or args.tokenizer_sha256 is None:
        return
    target = run_dir / _FOLDER
    if _inside(source, target):
        return
    record = _read_record(target)
    if target.exists() and not record:
        if _digest_of(args, target) == args.tokenizer_sha256:
            return
        if not target.is_dir() or any(target.iterdir()):
            raise UserError(
                f"{target} exists, but the run must keep its copy there of --tokenizer-model "
                f"{args.tokenizer_model}. Rename it, or choose another --run-dir."
            )
    if record and _digest_of(args, _path_in(target, record)) == args.tokenizer_sha256:
        return
    with new_folder(target, overwrite=True) as folder:
        file = _copy(args, source, folder)
        content = {
            "type": args.tokenizer_type,
            "file": file,
            "sha256": args.tokenizer_sha256,
            "original": os.path.abspath(source),
        }
        (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if _digest_of(args, _path_in(folder, content)) != args.tokenizer_sha256:
            raise UserError(
                f"The copy of --tokenizer-model {args.tokenizer_model} in {target} differs from "
                "the original. Check the disk and start again."
            )


def tokenizer_flags(args: Namespace, explicit: set[str]) -> list[str]:
    """Return flags that complete or replace those of the tokenizer of a run.

    Without --tokenizer-type, the type is that of the files. A run that resumes uses its copy if the
    flags name no tokenizer, or one that does not exist or has changed since.

    Args:
        args: Arguments as parsed, before Megatron's validation.
        explicit: Names of the arguments that the command line or a recipe sets.
    """
    model = args.tokenizer_model
    copy = _copy_of_run(args)
    if copy is not None and "vocab_file" not in explicit:
        record = _read_record(copy)
        kind = args.tokenizer_type or record["type"]
        reason = _why_copy(Namespace(**{**vars(args), "tokenizer_type": kind}), record)
        if reason is not None and kind == record["type"]:
            path = _path_in(copy, record)
            _say(f"using the run's copy of the tokenizer, {path}, because {reason}")
            return ["--tokenizer-type", kind, "--tokenizer-model", str(path)]
    if model is None or not os.path.exists(model):
        return []
    if args.tokenizer_type is None:
        kind, model = tokenizer_of_path(model)
        return ["--tokenizer-type", kind, "--tokenizer-model", model]
    if args.tokenizer_type == "HuggingFaceTokenizer" and Path(model).name == "tokenizer.json":
        return ["--tokenizer-model", str(Path(model).parent)]
    return []


def locate_tokenizer(args: Namespace, checkpoint: Path) -> None:
    """Set `tokenizer_model` to the tokenizer with which a checkpoint was trained.

    This is the original if its content is still the same, or else the copy that the run keeps or
    that conversion put next to the checkpoint.

    Args:
        args: Arguments of the checkpoint, which are modified.
        checkpoint: Folder of the iteration.

    Raises:
        UserError: The original does not exist or has changed, and there is no copy.
    """
    model, digest = args.tokenizer_model, getattr(args, "tokenizer_sha256", None)
    if model is None or args.tokenizer_type == "NullTokenizer":
        return
    exists = _source(args) is not None
    if exists and (digest is None or _digest_of(args, model) == digest):
        return
    for copy in _copies(args, checkpoint):
        if copy.exists() and (digest is None or _digest_of(args, copy) == digest):
            reason = "has another content than in training" if exists else "does not exist"
            _say(f"using the tokenizer {copy}, because {model} {reason}")
            args.tokenizer_model = str(copy)
            return
    if exists:
        check_tokenizer_content(checkpoint, args)


def _copies(args: Namespace, checkpoint: Path) -> Iterator[Path]:
    """Yield the paths of possible copies: in the run directory, and next to the iterations."""
    folder = checkpoint.resolve().parent
    for parent in (folder.parent, folder):
        copy = parent / _FOLDER
        if record := _read_record(copy):
            yield _path_in(copy, record)
        elif args.tokenizer_type == "HuggingFaceTokenizer":
            yield copy
        else:
            yield parent / _SENTENCEPIECE


def _copy_of_run(args: Namespace) -> Path | None:
    """Return the copy that a run keeps, if it has a checkpoint to resume from."""
    if args.run_dir is None or args.load is None or args.finetune:
        return None
    copy = Path(args.run_dir, _FOLDER)
    resumes = Path(args.load, TRACKER).is_file()
    return copy if resumes and _read_record(copy) else None


def _why_copy(args: Namespace, record: dict[str, Any]) -> str | None:
    """Return why a run that resumes uses its copy, or None if it uses what the flags name."""
    model = args.tokenizer_model
    if model is None:
        return "the flags name no other"
    if _source(args) is None:
        return f"--tokenizer-model {model} does not exist"
    if os.path.abspath(model) != record["original"]:
        return None  # the checks of the run compare it with that of the checkpoint
    changed = _digest_of(args, model) != record["sha256"]
    return f"--tokenizer-model {model} has changed since" if changed else None


def _source(args: Namespace) -> Path | None:
    """Return the file or folder of a run's tokenizer, that of the hub's cache included."""
    model = args.tokenizer_model
    if model is None:
        return None
    if Path(model).exists():
        return Path(model)
    return cached_folder(model) if args.tokenizer_type == "HuggingFaceTokenizer" else None


def _copy(args: Namespace, source: Path, folder: Path) -> str | None:
    """Copy a tokenizer into a folder, and return the name of its file if it is only one."""
    from megatron_ext.hf.end_tokens import carry_generation_config
    from megatron_ext.hf.tokenizer_export import copy_tokenizer

    if source.is_dir():
        copy_tokenizer(args, source, folder)
        carry_generation_config(source, folder)
        return None
    name = source.name if args.tokenizer_type == "TikTokenizer" else _SENTENCEPIECE
    shutil.copy(source, folder / name)
    carry_generation_config(source, folder / name)
    return name


def _digest_of(args: Namespace, path: Path | str) -> str | None:
    """Return the digest of a tokenizer of the run's type; None if it cannot be read."""
    try:
        return tokenizer_digest(Namespace(**{**vars(args), "tokenizer_model": str(path)}))
    except UserError:
        return None


def _path_in(folder: Path, record: dict[str, Any]) -> Path:
    return folder / record["file"] if record.get("file") else folder


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a copy, or an empty one if there is no intact copy."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if {"type", "sha256", "original"} <= record.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve() == folder.resolve() or folder.resolve() in path.resolve().parents


def _say(message: str) -> None:
    """Print a message on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        console.warn(f"{Path(sys.argv[0]).stem}: {message}")
