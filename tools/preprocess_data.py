"""Turn text into Megatron's indexed datasets, one for training and one for validation.

Writes PREFIX_train_text_document.{bin,idx}, PREFIX_valid_text_document.{bin,idx} and PREFIX.json,
which says what they were made of. Every document is followed by the tokenizer's end-of-document id;
documents without a letter or sign are left out. A document's split depends on its text and --seed
alone, so copies of it stay together. The result has the same bytes for any number of workers.

Files are worked through in shards, and finished shards are kept in PREFIX.parts (about as large as
the output) until the output is complete: after a stop or a kill, the same command goes on from
there. The output is compared with the parts and the source before it takes its name.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import sentencepiece

from megatron_ext.errors import ToolParser, UserError, run_tool
from tools.documents import (
    FORMATS,
    Layout,
    Malformed,
    Progress,
    Shard,
    ShardReader,
    expand_inputs,
    plan_shards,
)

SPLITS = ("train", "valid")
Part = dict[str, Any]  # what write_part says of a finished part
# Raised whenever the same settings come to give other bytes, so that old parts are not reused.
FORMAT_VERSION = 1
KEPT_MALFORMED = 20  # of each shard, and in the manifest
CHECKED_DOCUMENTS = 8  # of each split, compared with the source

# A worker process's own, set once by start_worker.
_tokenizer: sentencepiece.SentencePieceProcessor
_consumed: Any


@dataclass(frozen=True)
class Work:
    """A shard and everything that decides the tokens made from it."""

    shard: Shard
    file_stamp: int  # modification time of the shard's file in ns
    layout: Layout
    tokenizer_model: str
    tokenizer_sha256: str
    eod: int
    dtype: str
    valid_fraction: float  # 0.0 and 1.0: all documents to one split
    seed: int

    @cached_property
    def name(self) -> str:
        """A name that changes with the content: a part is reused only for the same work."""
        identity = {**asdict(self), "tokenizer_model": "", "version": FORMAT_VERSION}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]

    def split_of(self, text: str) -> str:
        """The document's split, from a hash of its text and the seed."""
        if self.valid_fraction in (0.0, 1.0):
            return "valid" if self.valid_fraction else "train"
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        chosen = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return "valid" if chosen else "train"


def publish(temporary: Path, final: Path) -> None:
    """Give a complete file its name, such that it has all its content even after a power cut."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_part(
    work: Work, folder: Path, tokenizer: sentencepiece.SentencePieceProcessor, consumed: Any
) -> Part:
    """Tokenize a shard into NAME.SPLIT.bin (tokens), NAME.SPLIT.len (int32 tokens of each document)
    and, last, NAME.json (counts), which is returned and whose presence says that all is there."""
    reader = ShardReader(work.shard, work.layout)
    temporary = {split: folder / f"{work.name}.{split}.{os.getpid()}.tmp" for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    checksums = dict.fromkeys(SPLITS, 0)
    malformed: list[Malformed] = []
    malformed_count = empty = reported = 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(temporary[split], "wb")) for split in SPLITS}
        for document in reader:
            if reader.consumed - reported > 1 << 17:
                with consumed.get_lock():
                    consumed.value += reader.consumed - reported
                reported = reader.consumed
            if isinstance(document, Malformed):
                malformed_count += 1
                malformed += [document][: KEPT_MALFORMED - len(malformed)]
            elif not document.strip():
                empty += 1
            else:
                split = work.split_of(document)
                tokens = np.array([*tokenizer.encode(document), work.eod], dtype=work.dtype)
                checksums[split] = zlib.crc32(tokens.data, checksums[split])
                files[split].write(tokens.data)
                lengths[split].append(tokens.size)
    with consumed.get_lock():
        consumed.value += work.shard.size - reported
    for split in SPLITS:
        publish(temporary[split], folder / f"{work.name}.{split}.bin")
        np.array(lengths[split], dtype=np.int32).tofile(temporary[split])
        publish(temporary[split], folder / f"{work.name}.{split}.len")
    part = {
        "documents": {split: len(lengths[split]) for split in SPLITS},
        "tokens": {split: sum(lengths[split]) for split in SPLITS},
        "crc32": checksums,
        "lines": reader.lines,
        "empty": empty,
        "malformed": malformed_count,
        "malformed_lines": malformed,
    }
    temporary["train"].write_text(json.dumps(part))
    publish(temporary["train"], folder / f"{work.name}.json")
    return part


def start_worker(model: str, consumed: Any) -> None:
    """Set a worker process up: one tokenizer, and an end when the main process is killed."""
    global _tokenizer, _consumed
    _tokenizer, _consumed = sentencepiece.SentencePieceProcessor(model_file=model), consumed
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> NoReturn:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def write_part_in_worker(work: Work, folder: Path) -> Part:
    return write_part(work, folder, _tokenizer, _consumed)


def read_part(work: Work, folder: Path) -> Part | None:
    """The counts of a finished part, or None when it has yet to be written."""
    try:
        part = json.loads((folder / f"{work.name}.json").read_text())
        whole = all(
            (folder / f"{work.name}.{split}.{suffix}").stat().st_size == part[of][split] * size
            for suffix, of, size in (
                ("bin", "tokens", np.dtype(work.dtype).itemsize),
                ("len", "documents", np.dtype(np.int32).itemsize),
            )
            for split in SPLITS
        )
    except (FileNotFoundError, ValueError):
        return None
    return part if whole else None


def write_parts(
    works: list[Work], folder: Path, workers: int, max_malformed: int
) -> tuple[list[Part], "Tally"]:
    """Write the parts that are not there yet; the counts of all, in order, and their sum.

    Raises:
        UserError: a broken file, a file without a document, or more than `max_malformed` malformed
            lines.
    """
    known = [read_part(work, folder) for work in works]
    todo = [work for work, part in zip(works, known) if part is None]
    if len(todo) < len(works):
        print(f"reusing {len(works) - len(todo):,} of {len(works):,} finished parts in {folder}")
    context = multiprocessing.get_context("spawn")
    consumed = context.Value("q", 0)
    parts: list[Part] = []
    with Progress("tokenizing", sum(work.shard.size for work in todo)) as progress:
        tally = Tally(works, max_malformed, progress)
        with concurrent.futures.ProcessPoolExecutor(
            max(1, min(workers, len(todo))), context, start_worker,
            (works[0].tokenizer_model, consumed),
        ) as pool:  # fmt: skip
            try:
                # Workers start here and inherit a deaf ear to Ctrl-C; the main process decides.
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
                futures = [pool.submit(write_part_in_worker, work, folder) for work in todo]
                signal.signal(signal.SIGINT, handler)
                pending = iter(futures)
                for part in known:
                    if part is None:
                        future = next(pending)
                        while not concurrent.futures.wait([future], timeout=0.5).done:
                            progress.update(consumed.value, tally.summary)
                        part = future.result()
                    tally.add(part)
                    parts.append(part)
                    progress.update(consumed.value, tally.summary)
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    "a worker was killed, maybe for want of memory: "
                    "run again, with fewer --workers, to go on with the finished parts"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return parts, tally


class Tally:
    """Adds parts up in the files' order, so that malformed lines get their number in the file and
    the limits are met at the same place for any number of workers."""

    def __init__(self, works: list[Work], max_malformed: int, progress: Progress):
        self._works, self._limit, self._progress = works, max_malformed, progress
        self._next = self._lines = self._file_documents = 0
        self.documents = self.tokens = self.empty = self.malformed = 0
        self.examples: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, int]] = {}

    @property
    def summary(self) -> str:
        return f"{self.documents:,} documents, {self.tokens:,} tokens"

    def add(self, part: Part) -> None:
        path = self._works[self._next].shard.path
        self._next += 1
        file = self.files.setdefault(
            path, {"lines": 0, "documents": 0, "tokens": 0, "empty": 0, "malformed": 0}
        )
        for line, reason in part["malformed_lines"][: KEPT_MALFORMED - len(self.examples)]:
            self.examples.append({"path": path, "line": file["lines"] + line, "reason": reason})
            self._progress.log(f"malformed: {self._shown(-1)}")
        counts = {
            "lines": part["lines"],
            "documents": sum(part["documents"].values()),
            "tokens": sum(part["tokens"].values()),
            "empty": part["empty"],
            "malformed": part["malformed"],
        }
        for key, count in counts.items():
            file[key] += count
        self.documents += counts["documents"]
        self.tokens += counts["tokens"]
        self.empty += counts["empty"]
        self.malformed += counts["malformed"]
        if self.malformed > self._limit:
            raise UserError(
                f"{self.malformed:,} malformed lines by {path}, more than --max-malformed "
                f"{self._limit:,}; the first is {self._shown(0)}"
            )
        last = self._next == len(self._works) or self._works[self._next].shard.path != path
        if last and not file["documents"]:
            of_file = (i for i, example in enumerate(self.examples) if example["path"] == path)
            why = "".join(f": {self._shown(i)}" for i in itertools.islice(of_file, 1))
            raise UserError(f"{path} holds no document, leave it out or mend it{why}")

    def _shown(self, index: int) -> str:
        example = self.examples[index]
        return f"{example['path']}: line {example['line']}: {example['reason']}"


def import_megatron() -> Any:
    """Megatron's dataset module, without the warnings of missing GPUs, packages and ranks: none is
    used here. It takes seconds, so workers and errors in the arguments go without."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.disable(logging.WARNING)
    from megatron.core.datasets import indexed_dataset

    logging.disable(logging.NOTSET)
    return indexed_dataset


def write_dataset(split: str, works: list[Work], folder: Path, prefix: str) -> None:
    """Join the parts of a split, in order, into the indexed dataset at `prefix`."""
    dtype = np.dtype(works[0].dtype)
    builder = import_megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for work in works:
        lengths = np.fromfile(folder / f"{work.name}.{split}.len", dtype=np.int32)  # [documents]
        if lengths.size:
            path = folder / f"{work.name}.{split}.bin"
            tokens = np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # [tokens]
            for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                builder.add_document(document, [document.size])
    builder.finalize(f"{prefix}.idx")


def check_dataset(split: str, works: list[Work], parts: list[Part], prefix: str) -> str:
    """Read an indexed dataset back and compare all of it with the parts' counts and checksums, and
    some documents with the source tokenized by Megatron's own class; a sentence on the outcome.

    Raises:
        UserError: it differs.
    """
    from megatron.core.tokenizers import MegatronTokenizer

    dataset = import_megatron().IndexedDataset(prefix)
    documents = np.array([part["documents"][split] for part in parts])
    tokens = [part["tokens"][split] for part in parts]
    same = (
        np.array_equal(dataset.document_indices, np.arange(documents.sum() + 1))
        and dataset.sequence_lengths.sum(dtype=np.int64) == sum(tokens)
        and os.path.getsize(f"{prefix}.bin") == sum(tokens) * np.dtype(works[0].dtype).itemsize
    )
    with open(f"{prefix}.bin", "rb") as file:
        for part, count in zip(parts, tokens):
            same = same and part["crc32"][split] == _crc32(file, count * dataset.index.dtype_size)
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=works[0].tokenizer_model, metadata_path={"library": "sentencepiece"}
    )
    choose = random.Random(works[0].seed)
    checked = exact = 0
    while same and checked < CHECKED_DOCUMENTS:
        index = choose.choices(range(len(works)), weights=documents.tolist())[0]
        ordinal = choose.randrange(min(documents[index], 1000))  # a shard may be a huge file
        text = source_document(works[index], split, ordinal)
        stored = dataset[int(documents[:index].sum()) + ordinal].tolist()
        same = stored == [*tokenizer.tokenize(text), tokenizer.eod]
        exact += tokenizer.detokenize(stored[:-1]) == text
        checked += 1
    if not same:
        raise UserError(
            f"the {split} dataset read back differs from what was written: "
            f"remove the .parts folder and run again, and check the disk"
        )
    return f"read back and equal; {exact} of {checked} documents decode to exactly their source"


def _crc32(file: Any, size: int) -> int:
    checksum = 0
    while size > 0 and (chunk := file.read(min(size, 1 << 24))):
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum


def source_document(work: Work, split: str, ordinal: int) -> str:
    """The shard's document number `ordinal` of a split, read from the source again."""
    for document in ShardReader(work.shard, work.layout):
        if isinstance(document, str) and document.strip() and work.split_of(document) == split:
            if ordinal == 0:
                return document
            ordinal -= 1
    raise UserError(f"{work.shard.path} changed while it was read: run again")


@dataclass(frozen=True)
class Output:
    """The files of a prefix, and their way from the parts folder to their names."""

    prefix: str

    @property
    def manifest(self) -> Path:
        return Path(f"{self.prefix}.json")

    @property
    def parts(self) -> Path:
        return Path(f"{self.prefix}.parts")

    def dataset(self, split: str, suffix: str) -> Path:
        return Path(f"{self.prefix}_{split}_text_document.{suffix}")

    def is_complete(self, settings: dict[str, Any], overwrite: bool) -> bool:
        """Whether everything made with `settings` is there.

        Raises:
            UserError: something else is there, and may not be overwritten.
        """
        there = [self.manifest] + [self.dataset(s, e) for s in SPLITS for e in ("bin", "idx")]
        there = [path for path in there if path.exists()]
        try:
            manifest = json.loads(self.manifest.read_text())
            made_with, files = manifest["settings"], manifest["files"]
        except (OSError, ValueError, KeyError):
            made_with, files = {}, {}
        if made_with == settings:
            paths = {self.manifest.with_name(name): size for name, size in files.items()}
            return all(path.exists() and path.stat().st_size == n for path, n in paths.items())
        if there and not overwrite:
            changed = [key for key in settings if settings[key] != made_with.get(key)]
            what = f"was made with another {' and '.join(changed)}" if made_with else "exists"
            raise UserError(
                f"{there[0]} {what}: give --overwrite to replace it, or another --output-prefix"
            )
        return False

    def commit(self, manifest: dict[str, Any], splits: list[str]) -> None:
        """Put the finished datasets in place. An index comes last and never beside other data; the
        manifest comes first, so that a run cut off here is known as ours and goes on."""
        for split in SPLITS:
            self.dataset(split, "idx").unlink(missing_ok=True)
        files = {
            self.dataset(split, suffix): self.parts / f"{split}.dataset.{suffix}"
            for suffix in ("bin", "idx")
            for split in splits
        }
        manifest["files"] = {to.name: path.stat().st_size for to, path in files.items()}
        temporary = self.parts / "manifest.tmp"
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        publish(temporary, self.manifest)
        for split in set(SPLITS) - set(splits):
            self.dataset(split, "bin").unlink(missing_ok=True)
        for to, path in files.items():
            publish(path, to)


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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(prog="python -m tools.preprocess_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # fmt: off
    add("--input", nargs="+", required=True, metavar="FILE",
        help="files or globs (** goes into folders): .jsonl, .parquet, .txt; plain, .gz or .zst")
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


@contextlib.contextmanager
def locked(output: Output) -> Iterator[None]:
    """Hold the parts folder; a second run on the same prefix is refused. Without a finished part in
    it the folder goes away again."""
    try:
        output.parts.mkdir(parents=True, exist_ok=True)
        lock = open(output.parts / "lock", "w")  # noqa: SIM115 - held until the end
    except OSError as error:
        reason = f"cannot write {output.parts}: {error.strerror}"
        raise UserError(f"--output-prefix {output.prefix}: {reason}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run writes {output.prefix}: wait for its end") from error
        try:
            for leftover in output.parts.glob("*.tmp"):
                leftover.unlink()
            yield
        finally:
            if not any(output.parts.glob("*.json")):
                shutil.rmtree(output.parts, ignore_errors=True)


def stop_on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    separator = arguments.document_separator
    layout = Layout(arguments.format, arguments.text_key, "\n" if separator == r"\n" else separator)
    tokenizer, sha256 = open_tokenizer(arguments.tokenizer_model)
    inputs = {
        "train": expand_inputs(arguments.input),
        "valid": expand_inputs(arguments.valid_input, "--valid-input"),
    }
    if both := set(inputs["train"]) & set(inputs["valid"]):
        raise UserError(f"{min(both)} is in --input and in --valid-input: take it out of one")
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
    output = Output(os.path.abspath(arguments.output_prefix))
    if output.is_complete(settings, arguments.overwrite):
        shutil.rmtree(output.parts, ignore_errors=True)
        print(f"{output.prefix}: all done already, with the same settings")
        return
    shards = {s: plan_shards(paths, layout, arguments.shard_bytes) for s, paths in inputs.items()}
    vocab_size = tokenizer.get_piece_size()
    blank = Work(
        shard=shards["train"][0],
        file_stamp=0,
        layout=layout,
        tokenizer_model=os.path.abspath(arguments.tokenizer_model),
        tokenizer_sha256=sha256,
        eod=tokenizer.eos_id(),
        dtype=np.dtype(import_megatron().DType.optimal_dtype(vocab_size)).name,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
    )
    works = [
        replace(
            blank,
            shard=shard,
            file_stamp=status[shard.path].st_mtime_ns,
            valid_fraction=1.0 if split == "valid" else arguments.valid_fraction,
        )
        for split in SPLITS
        for shard in shards[split]
    ]
    with locked(output):
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = {signum: signal.signal(signum, stop_on_signal) for signum in signals}
        try:
            run(arguments, settings, works, output, vocab_size)
        except SystemExit:
            finished = len(list(output.parts.glob("*.json")))
            print(f"stopped: the same command goes on with {finished:,} finished parts", flush=True)
            raise
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


def run(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    works: list[Work],
    output: Output,
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
