"""Tokenize text into Megatron's indexed datasets, one for training and one for validation.

The tool writes PREFIX_train_text_document.{bin,idx}, PREFIX_valid_text_document.{bin,idx} and the
manifest PREFIX.json, which describes their source. Every document is followed by the tokenizer's
end-of-document id. A Hugging Face tokenizer gives the ids of transformers.AutoTokenizer, encoded in
Rust. Empty documents and documents of whitespace are skipped. The split of a document
depends only on its text and --seed, so that duplicates stay in one split. The output is identical
for any number of workers.

Files are processed in shards, and many small files together. Finished parts are stored in
PREFIX.parts, which takes about as much space as the output, until the output is complete. After a
stop or a kill the same command resumes from there. The output is compared with the parts and the
source before it is renamed to its final name.
"""

import argparse
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from megatron_ext.data.preprocessing.dataset_output import DatasetOutput
from megatron_ext.data.preprocessing.indexed_dataset import (
    check_dataset,
    import_megatron,
    write_dataset,
)
from megatron_ext.data.preprocessing.parts import FORMAT_VERSION, SPLITS, PartSpec, group_shards
from megatron_ext.data.preprocessing.source_tokenizer import SourceTokenizer, open_tokenizer
from megatron_ext.data.preprocessing.workers import write_parts
from megatron_ext.data.shards import FORMATS, TextFormat, expand_inputs, file_identity, plan_shards
from megatron_ext.errors import ToolParser, UserError, run_tool


class PreprocessFlags:
    """Values of the command line."""

    input: list[str]
    tokenizer_model: str
    parse_special_tokens: bool
    output_prefix: str
    valid_fraction: float | None
    valid_input: list[str]
    seed: int
    format: str
    text_key: str
    document_separator: str | None
    max_malformed: int
    workers: int
    shard_bytes: int
    overwrite: bool

    @property
    def valid_share(self) -> float:
        """Share of the documents of --input for validation."""
        if self.valid_fraction is None:
            return 0.0 if self.valid_input else 0.01
        return self.valid_fraction


def parse_arguments(argv: list[str] | None) -> PreprocessFlags:
    """Parse and check the command line.

    Raises:
        UserError: A flag is missing, unknown or has a wrong value.
    """
    parser = ToolParser(prog="python -m tools.preprocess_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # fmt: off
    add("--input", nargs="+", required=True, metavar="FILE",
        help="Files, folders or globs to tokenize (** matches any folders): .txt, .md, .jsonl, "
             ".csv, .tsv or .parquet, plain or compressed as .gz, .zst, .bz2 or .xz. A folder "
             "stands for all such files in it and its subfolders.")
    add("--tokenizer-model", required=True, metavar="FILE",
        help="Tokenizer of the text: a SentencePiece model, or a folder with a Hugging Face "
             "tokenizer.json, or that file.")
    add("--parse-special-tokens", action="store_true",
        help="Encode the names of special tokens in the text, such as <|im_start|>, as these "
             "tokens, for text that was written with a chat template. Default: they are encoded "
             "like other text, so that no text can end a document.")
    add("--output-prefix", required=True, metavar="PREFIX",
        help="Path and beginning of the names of the output files.")
    add("--valid-fraction", type=float, metavar="SHARE",
        help="Share of the documents for validation, from 0 (none) to below 1. Default: 0.01, or "
             "0 with --valid-input.")
    add("--valid-input", nargs="+", default=[], metavar="FILE",
        help="Files or globs for validation. All of --input is then used for training.")
    add("--seed", type=int, default=0, metavar="N",
        help="Seed of the split into training and validation. Default: %(default)s.")
    add("--format", choices=("auto", *FORMATS), default="auto",
        help="Format of the input; auto determines it from the suffix of each file. "
             "Default: %(default)s.")
    add("--text-key", default="text", metavar="KEY",
        help="Field (JSONL) or column (CSV, Parquet) that contains the text. "
             "Default: %(default)s.")
    add("--document-separator", metavar="LINE",
        help="Line that ends a document in plain text; '' stands for a blank line, and '\\n' makes "
             "every line a document. Write --document-separator=-- for a separator that begins "
             "with a hyphen. Default: each file is one document.")
    add("--max-malformed", type=int, default=100, metavar="N",
        help="Maximum number of malformed lines (Parquet: rows). They are skipped and reported "
             "with file and line; with more, the run stops. Default: %(default)s.")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="Number of processes. Default: one per core.")
    add("--shard-bytes", type=int, default=64 << 20, metavar="N",
        help="Size of the pieces that are distributed to the workers and from which a run resumes, "
             "in bytes. Compressed files are not divided. Default: 67108864 (64 MiB).")
    add("--overwrite", action="store_true",
        help="Replace existing output that was made with other settings.")
    # fmt: on
    flags = parser.parse_args(argv, PreprocessFlags())
    for name, value, least in (
        ("--max-malformed", flags.max_malformed, 0),
        ("--workers", flags.workers, 1),
        ("--shard-bytes", flags.shard_bytes, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value} is below {least}. Set it to {least} or more.")
    if flags.valid_input and flags.valid_fraction is not None:
        raise UserError("--valid-input and --valid-fraction exclude each other. Give one of them.")
    if not 0 <= flags.valid_share < 1:
        raise UserError(
            f"--valid-fraction {flags.valid_fraction} is out of range. Set it to at least 0 and "
            "below 1."
        )
    if os.path.basename(flags.output_prefix) == "":
        raise UserError(
            f"--output-prefix {flags.output_prefix} ends in a slash. Append the beginning of the "
            "file names."
        )
    if not -(2**63) <= flags.seed < 2**63:
        raise UserError(f"--seed {flags.seed} does not fit in 64 bits. Choose a smaller number.")
    return flags


@contextmanager
def stopping_on_signals(output: DatasetOutput) -> Iterator[None]:
    """Stop cleanly on SIGINT and SIGTERM, and print the number of finished parts."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        finished = len(list(output.parts.glob("*.json")))
        print(
            f"stopped with {finished:,} finished parts; run the same command to resume", flush=True
        )
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    flags = parse_arguments(argv)
    separator = flags.document_separator
    layout = TextFormat(flags.format, flags.text_key, "\n" if separator == r"\n" else separator)
    inputs = {
        "train": expand_inputs(flags.input),
        "valid": expand_inputs(flags.valid_input, "--valid-input"),
    }
    identities = {file_identity(path) for path in inputs["train"]}
    if both := [path for path in inputs["valid"] if file_identity(path) in identities]:
        raise UserError(
            f"{both[0]} is in --input and in --valid-input. Remove it from one of them."
        )
    tokenizer = open_tokenizer(flags.tokenizer_model, flags.parse_special_tokens)
    status = {path: os.stat(path) for path in inputs["train"] + inputs["valid"]}
    files = {
        split: [[path, status[path].st_size, status[path].st_mtime_ns] for path in paths]
        for split, paths in inputs.items()
    }
    settings: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "input": files["train"],
        "valid_input": files["valid"],
        "format": layout.format,
        "text_key": layout.text_key,
        "document_separator": layout.separator,
        "valid_fraction": flags.valid_share,
        "seed": flags.seed,
    }
    if flags.parse_special_tokens:
        settings["parse_special_tokens"] = True
    output = DatasetOutput(os.path.abspath(flags.output_prefix))
    if output.is_complete(settings, flags.overwrite):
        shutil.rmtree(output.parts, ignore_errors=True)
        print(f"{output.prefix} is complete already, made with the same settings")
        return
    shards = {s: plan_shards(paths, layout, flags.shard_bytes) for s, paths in inputs.items()}
    dtype = np.dtype(import_megatron().DType.optimal_dtype(tokenizer.vocab_size)).name
    specs = [
        PartSpec(
            shards=group,
            file_stamps=tuple(status[shard.path].st_mtime_ns for shard in group),
            layout=layout,
            tokenizer_sha256=tokenizer.sha256,
            eod=tokenizer.eod,
            parse_special=tokenizer.parse_special,
            dtype=dtype,
            valid_fraction=1.0 if split == "valid" else flags.valid_share,
            seed=flags.seed,
        )
        for split in SPLITS
        for group in group_shards(shards[split], flags.shard_bytes)
    ]
    with output.locked(), stopping_on_signals(output):
        write_output(flags, settings, specs, output, tokenizer)


def write_output(
    flags: PreprocessFlags,
    settings: dict[str, Any],
    specs: list[PartSpec],
    output: DatasetOutput,
    tokenizer: SourceTokenizer,
) -> None:
    """Write the parts, join them into datasets, check these and give them their final names.

    Args:
        flags: The command line.
        settings: Everything that determines the output, for the manifest.
        specs: The parts, in order.
        output: Names of the files.
        tokenizer: The tokenizer.

    Raises:
        UserError: The input is malformed, or a split would be empty.
    """
    parts, counts = write_parts(specs, tokenizer, output.parts, flags.workers, flags.max_malformed)
    splits = [split for split in SPLITS if any(part["documents"][split] for part in parts)]
    if "train" not in splits:
        raise UserError("No document is left for training. Lower --valid-fraction.")
    if flags.valid_share and "valid" not in splits:
        raise UserError(
            f"--valid-fraction {flags.valid_share} assigns none of {counts.documents:,} "
            "documents to validation. Raise it, set it to 0 or give --valid-input."
        )
    summary = {}
    for split in splits:
        prefix = str(output.parts / f"{split}.dataset")
        write_dataset(split, specs, output.parts, prefix)
        outcome = check_dataset(split, specs, tokenizer, parts, prefix)
        summary[split] = {
            key: sum(part[key][split] for part in parts) for key in ("documents", "tokens", "bytes")
        }
        documents = summary[split]["documents"]
        print(
            f"{split}: {documents:,} document{'s' * (documents != 1)}, "
            f"{summary[split]['tokens']:,} tokens, {outcome}",
            flush=True,
        )
    manifest = {
        "settings": settings,
        "tokenizer": {
            "type": tokenizer.kind,
            "path": os.path.abspath(tokenizer.path),
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "dtype": specs[0].dtype,
        "splits": summary,
        "empty_documents": counts.empty,
        "malformed_lines": counts.malformed,
        "malformed_examples": counts.examples,
        "inputs": counts.files,
    }
    output.commit(manifest, splits)
    shutil.rmtree(output.parts)
    names = splits[0] if len(splits) == 1 else f"{{{','.join(splits)}}}"
    print(
        f"wrote {output.prefix}_{names}_text_document.{{bin,idx}} and .json; "
        f"skipped {counts.empty:,} empty and {counts.malformed:,} malformed documents"
    )


if __name__ == "__main__":
    run_tool(main)
