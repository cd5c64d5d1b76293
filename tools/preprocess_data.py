"""Turn text into Megatron's indexed datasets, one for training and one for validation.

Writes PREFIX_train_text_document.{bin,idx}, PREFIX_valid_text_document.{bin,idx} and PREFIX.json,
which says what they were made of. Every document is followed by the tokenizer's end-of-document id;
documents without a letter or sign are left out. A document's split depends on its text and --seed
alone, so copies of it stay together. The result has the same bytes for any number of workers.

Files are worked through in shards, small files many at a time, and finished parts are kept in
PREFIX.parts (about as large as the output) until the output is complete: after a stop or a kill,
the same command resumes from there. The output is compared with the parts and the source before it
takes its name.
"""

import argparse
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import sentencepiece

from megatron_ext.data.preprocessing.indexed_dataset import (
    check_dataset,
    import_megatron,
    write_dataset,
)
from megatron_ext.data.preprocessing.output import DatasetOutput
from megatron_ext.data.preprocessing.parts import FORMAT_VERSION, SPLITS, PartSpec, group_shards
from megatron_ext.data.preprocessing.workers import write_parts
from megatron_ext.data.shards import FORMATS, TextFormat, expand_inputs, file_identity, plan_shards
from megatron_ext.errors import ToolParser, UserError, run_tool


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(prog="python -m tools.preprocess_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # fmt: off
    add("--input", nargs="+", required=True, metavar="FILE",
        help="files or globs (** goes into folders): .jsonl, .parquet, .txt; plain, .gz, .zst, "
             ".bz2 or .xz")
    add("--tokenizer-model", required=True, metavar="FILE", help="SentencePiece model")
    add("--output-prefix", required=True, metavar="PREFIX", help="how the output's names begin")
    add("--valid-fraction", type=float, metavar="SHARE",
        help="share of the documents for validation, 0 for none; default 0.01")
    add("--valid-input", nargs="+", default=[], metavar="FILE",
        help="validate on these files or globs, and train on all of --input")
    add("--seed", type=int, default=0, help="seed of the split; default 0")
    add("--format", choices=("auto", *FORMATS), default="auto",
        help="format of the input; auto goes by each file's suffix")
    add("--text-key", default="text", metavar="KEY",
        help="field (JSONL) or column (Parquet) that holds the text; default text")
    add("--document-separator", metavar="LINE",
        help="plain text: a line equal to this ends a document, '' is a blank line; '\\n': every "
             "line is a document; without it each file is one (=-- for one that begins with -)")
    add("--max-malformed", type=int, default=100, metavar="N",
        help="stop when more than N lines (rows, plain-text documents) are malformed; they are "
             "left out and reported with file and line; default 100")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes; default: one a core")
    add("--shard-bytes", type=int, default=64 << 20, metavar="N",
        help="size of the pieces that are shared out and kept after a stop; default 64 MiB. "
             "Compressed files are not cut")
    add("--overwrite", action="store_true", help="replace output made with other settings")
    # fmt: on
    arguments = parser.parse_args(argv)
    for flag, least in (("max_malformed", 0), ("workers", 1), ("shard_bytes", 1)):
        if getattr(arguments, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}")
    if arguments.valid_input and arguments.valid_fraction is not None:
        raise UserError("--valid-input and --valid-fraction exclude each other: give one of them")
    if arguments.valid_fraction is None:
        arguments.valid_fraction = 0.0 if arguments.valid_input else 0.01
    if not 0 <= arguments.valid_fraction < 1:
        raise UserError("--valid-fraction must be at least 0 and below 1")
    if os.path.basename(arguments.output_prefix) == "":
        raise UserError("--output-prefix must end in the beginning of a file's name, not in /")
    if not -(2**63) <= arguments.seed < 2**63:
        raise UserError("--seed must fit in 64 bits")
    return arguments


def open_tokenizer(model: str) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """A SentencePiece tokenizer and the sha256 of its file.

    Raises:
        UserError: it cannot be read, or cannot end a document.
    """
    try:
        content = Path(model).read_bytes()
    except OSError as error:
        raise UserError(f"--tokenizer-model {model}: {error.strerror}") from error
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(content)
    except RuntimeError as error:
        raise UserError(
            f"--tokenizer-model {model} is no SentencePiece model: make one with "
            f"python -m tools.train_tokenizer"
        ) from error
    if tokenizer.eos_id() < 0:
        raise UserError(f"--tokenizer-model {model} has no eos id to end documents: train another")
    return tokenizer, hashlib.sha256(content).hexdigest()


@contextmanager
def stopping_on_signals(output: DatasetOutput) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run in order, with a word on what is kept."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        finished = len(list(output.parts.glob("*.json")))
        print(f"stopped: the same command goes on with {finished:,} finished parts", flush=True)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    separator = arguments.document_separator
    layout = TextFormat(
        arguments.format, arguments.text_key, "\n" if separator == r"\n" else separator
    )
    tokenizer, sha256 = open_tokenizer(arguments.tokenizer_model)
    inputs = {
        "train": expand_inputs(arguments.input),
        "valid": expand_inputs(arguments.valid_input, "--valid-input"),
    }
    identities = {file_identity(path) for path in inputs["train"]}
    if both := [path for path in inputs["valid"] if file_identity(path) in identities]:
        raise UserError(f"{both[0]} is in --input and in --valid-input: take it out of one")
    status = {path: os.stat(path) for path in inputs["train"] + inputs["valid"]}
    files = {
        split: [[path, status[path].st_size, status[path].st_mtime_ns] for path in paths]
        for split, paths in inputs.items()
    }
    settings: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "tokenizer_sha256": sha256,
        "input": files["train"],
        "valid_input": files["valid"],
        "format": layout.format,
        "text_key": layout.text_key,
        "document_separator": layout.separator,
        "valid_fraction": arguments.valid_fraction,
        "seed": arguments.seed,
    }
    output = DatasetOutput(os.path.abspath(arguments.output_prefix))
    if output.is_complete(settings, arguments.overwrite):
        shutil.rmtree(output.parts, ignore_errors=True)
        print(f"{output.prefix}: all done already, with the same settings")
        return
    shards = {s: plan_shards(paths, layout, arguments.shard_bytes) for s, paths in inputs.items()}
    vocab_size = tokenizer.get_piece_size()
    dtype = np.dtype(import_megatron().DType.optimal_dtype(vocab_size)).name
    works = [
        PartSpec(
            shards=group,
            file_stamps=tuple(status[shard.path].st_mtime_ns for shard in group),
            layout=layout,
            tokenizer_model=os.path.abspath(arguments.tokenizer_model),
            tokenizer_sha256=sha256,
            eod=tokenizer.eos_id(),
            dtype=dtype,
            valid_fraction=1.0 if split == "valid" else arguments.valid_fraction,
            seed=arguments.seed,
        )
        for split in SPLITS
        for group in group_shards(shards[split], arguments.shard_bytes)
    ]
    with output.locked(), stopping_on_signals(output):
        run(arguments, settings, works, output, vocab_size)


def run(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    works: list[PartSpec],
    output: DatasetOutput,
    vocab_size: int,
) -> None:
    """Parts, datasets, comparison, final names."""
    parts, tally = write_parts(works, output.parts, arguments.workers, arguments.max_malformed)
    splits = [split for split in SPLITS if any(part["documents"][split] for part in parts)]
    if "train" not in splits:
        raise UserError("no document is left for training: lower --valid-fraction")
    if arguments.valid_fraction and "valid" not in splits:
        raise UserError(
            f"--valid-fraction {arguments.valid_fraction} puts none of {tally.documents:,} "
            f"documents in validation: raise it, set it to 0 or give --valid-input"
        )
    summary = {}
    for split in splits:
        prefix = str(output.parts / f"{split}.dataset")
        write_dataset(split, works, output.parts, prefix)
        outcome = check_dataset(split, works, parts, prefix)
        summary[split] = {
            key: sum(part[key][split] for part in parts) for key in ("documents", "tokens")
        }
        print(
            f"{split}: {summary[split]['documents']:,} documents, "
            f"{summary[split]['tokens']:,} tokens, {outcome}",
            flush=True,
        )
    manifest = {
        "settings": settings,
        "tokenizer": {
            "path": works[0].tokenizer_model,
            "sha256": works[0].tokenizer_sha256,
            "vocab_size": vocab_size,
            "eod": works[0].eod,
        },
        "dtype": works[0].dtype,
        "splits": summary,
        "empty_documents": tally.empty,
        "malformed_lines": tally.malformed,
        "malformed_examples": tally.examples,
        "inputs": tally.files,
    }
    output.commit(manifest, splits)
    shutil.rmtree(output.parts)
    print(
        f"wrote {output.prefix}_{{{','.join(splits)}}}_text_document.{{bin,idx}} and .json; "
        f"left out {tally.empty:,} empty and {tally.malformed:,} malformed documents"
    )


if __name__ == "__main__":
    run_tool(main)
