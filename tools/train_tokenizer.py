"""Train a lossless SentencePiece BPE tokenizer: decode(encode(text)) == text.

Text is not normalized and gets no dummy prefix, and characters outside the vocabulary are encoded
as byte tokens, so that no text is unknown. The one exception is U+2581, SentencePiece's mark for a
space, which decodes to a space. The ids 0 to 3 are unk, bos, eos and pad. Megatron reads the file
with `--tokenizer-type SentencePieceTokenizer --tokenizer-model FILE` and ends documents with eos.

If the corpus is larger than the sample, a uniform sample of lines is drawn in one pass.
"""

import argparse
import heapq
import io
import os
import random
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.shards import FORMATS, TextFormat, expand_inputs, plan_shards
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.inference.loading_flags import check_at_least_one
from megatron_ext.progress import Progress

_SHARD_BYTES = 1 << 30


class LineSample:
    """Uniform sample of a stream's lines, in their order, within `max_lines` and `max_bytes`.

    Every line draws a random key, and the lines with the smallest keys stay. Once a key has been
    rejected, every larger key is rejected too, which keeps the sample uniform when lines differ in
    length.
    """

    def __init__(self, max_lines: int, max_bytes: int, seed: int):
        self.max_lines, self.max_bytes = max_lines, max_bytes
        self.seen_lines = self.seen_bytes = self.bytes = 0
        self._random = random.Random(seed)
        self._limit = 1.0
        self._heap: list[tuple[float, int, str]] = []  # (-key, position, line)

    def add(self, line: str) -> None:
        """Add the next line of the stream, or reject it."""
        key, size = self._random.random(), len(line.encode())
        self.seen_lines += 1
        self.seen_bytes += size
        if key >= self._limit:
            return
        heapq.heappush(self._heap, (-key, self.seen_lines, line))
        self.bytes += size
        while self.bytes > self.max_bytes or len(self._heap) > self.max_lines:
            largest, _, dropped = heapq.heappop(self._heap)
            self._limit = -largest
            self.bytes -= len(dropped.encode())

    def lines(self) -> list[str]:
        """Return the sample, in the order of the stream."""
        return [line for _, _, line in sorted(self._heap, key=lambda entry: entry[1])]


def documents(paths: list[str], layout: TextFormat) -> Iterator[str]:
    """Yield the documents of all files in order, and show progress.

    Malformed lines are counted and skipped, because `preprocess_data` reports each of them.

    Args:
        paths: The files.
        layout: Format of the files.

    Raises:
        UserError: A file cannot be read, or no file contains a document.
    """
    shards = plan_shards(paths, layout, _SHARD_BYTES)
    done = count = 0
    malformed: list[str] = []
    with Progress("reading", sum(shard.size for shard in shards)) as progress:
        for shard in shards:
            reader = ShardReader(shard, layout)
            for document in reader:
                if isinstance(document, MalformedRecord):
                    where = f"{shard.path}: line {document.line}"
                    if shard.start:
                        where += f" after byte {shard.start}"
                    malformed.append(f"{where}: {document.reason}")
                    continue
                count += 1
                if count % 256 == 0:
                    progress.update(done + reader.consumed, f"{count:,} documents")
                yield document
            done += shard.size
        if malformed:
            progress.log(f"skipped {len(malformed):,} malformed lines; the first is {malformed[0]}")
    if not count:
        reason = f" The first malformed line is {malformed[0]}." if malformed else ""
        raise UserError(f"--input contains no document.{reason} Give files with text.")


def sample_lines(texts: Iterable[str], max_lines: int, max_bytes: int, seed: int) -> LineSample:
    """Return a sample of the texts' lines.

    Each line includes its newline, which the tokenizer learns like any other character.

    Args:
        texts: The documents.
        max_lines: Maximum number of lines in the sample.
        max_bytes: Maximum size of the sample, in bytes.
        seed: Seed of the sample.
    """
    sample = LineSample(max_lines, max_bytes, seed)
    for text in texts:
        for line in text.split("\n"):
            if line.strip():
                sample.add(line + "\n")
    return sample


def train(lines: list[str], vocab_size: int, character_coverage: float) -> bytes:
    """Train a BPE model with exactly `vocab_size` entries; the same lines give the same bytes.

    Args:
        lines: The text.
        vocab_size: Number of entries.
        character_coverage: Share of all characters that get their own entry.

    Returns:
        The content of the model file.

    Raises:
        UserError: The vocabulary is too large or too small for the lines, or there are none.
    """
    if not lines:
        raise UserError("--input contains no text to train on. Give files with text.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=1,  # BPE gains nothing from more, and the number is stored in the file
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    return model.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> UserError:
    message = str(error)
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too large for this text. Set it to at most {match[1]} "
            "or give more text."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too small for the characters of this text. Set it to at "
            f"least {match[1]} or lower --character-coverage."
        )
    return UserError(f"SentencePiece cannot train on the text of --input: {message}")


class TrainTokenizerFlags:
    """Values of the command line."""

    input: list[str]
    output: str
    vocab_size: int
    format: str
    text_key: str
    max_sample_bytes: int
    max_sample_lines: int
    character_coverage: float
    seed: int
    overwrite: bool


def parse_arguments(argv: list[str] | None) -> TrainTokenizerFlags:
    """Parse and check the command line.

    Raises:
        UserError: A flag is missing, unknown or has a wrong value.
    """
    parser = ToolParser(prog="python -m tools.train_tokenizer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # fmt: off
    add("--input", nargs="+", required=True, metavar="FILE",
        help="Files, folders or globs to train on (** matches any folders): .txt, .md, .jsonl, "
             ".csv, .tsv or .parquet, plain or compressed as .gz, .zst, .bz2 or .xz. A folder "
             "stands for all such files in it and its subfolders.")
    add("--output", required=True, metavar="FILE",
        help="File for the tokenizer. The suffix .model is appended if it is missing.")
    add("--vocab-size", type=int, required=True, metavar="N",
        help="Number of entries in the vocabulary, including 256 bytes and 4 special tokens.")
    add("--format", choices=("auto", *FORMATS), default="auto",
        help="Format of the input; auto determines it from the suffix of each file. "
             "Default: %(default)s.")
    add("--text-key", default="text", metavar="KEY",
        help="Field (JSONL) or column (CSV, Parquet) that contains the text. "
             "Default: %(default)s.")
    add("--max-sample-bytes", type=int, default=256 << 20, metavar="N",
        help="Maximum size of the sample of lines, in bytes. Training takes about ten times as "
             "much memory. Default: 268435456 (256 MiB).")
    add("--max-sample-lines", type=int, default=20_000_000, metavar="N",
        help="Maximum number of lines in the sample. Default: %(default)s.")
    add("--character-coverage", type=float, default=0.9995, metavar="SHARE",
        help="Share of all characters that get their own entry; the others are encoded as bytes. "
             "Default: %(default)s.")
    add("--seed", type=int, default=0, metavar="N",
        help="Seed of the sample. Default: %(default)s.")
    add("--overwrite", action="store_true", help="Replace --output if it exists.")
    # fmt: on
    flags = parser.parse_args(argv, TrainTokenizerFlags())
    check_at_least_one(
        vocab_size=flags.vocab_size,
        max_sample_bytes=flags.max_sample_bytes,
        max_sample_lines=flags.max_sample_lines,
    )
    if not 0 < flags.character_coverage <= 1:
        raise UserError(
            f"--character-coverage {flags.character_coverage} is out of range. Set it above 0 and "
            "to at most 1."
        )
    return flags


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    flags = parse_arguments(argv)
    output = Path(flags.output)
    if output.suffix != ".model":
        output = output.with_name(output.name + ".model")
    if output.exists() and not flags.overwrite:
        raise UserError(f"--output {output} exists. Give --overwrite to replace it.")
    # The tokenizer trains on lines, wherever a document of plain text ends.
    layout = TextFormat(flags.format, flags.text_key, separator="\n")
    paths = expand_inputs(flags.input)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder of --output {output} cannot be created: {error.strerror}. Choose another "
            "path."
        ) from error
    sample = sample_lines(
        documents(paths, layout),
        flags.max_sample_lines, flags.max_sample_bytes, flags.seed,
    )  # fmt: skip
    lines = sample.lines()
    print(
        f"training on {len(lines):,} of {sample.seen_lines:,} lines, "
        f"{sample.bytes / 1e6:,.1f} of {sample.seen_bytes / 1e6:,.1f} MB",
        flush=True,
    )
    # SentencePiece trains outside Python, where Python's signal handler would not run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    model = train(lines, flags.vocab_size, flags.character_coverage)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    temporary.write_bytes(model)
    temporary.replace(output)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output))
    text = "".join(lines[:1000])
    print(
        f"wrote {output}: {tokenizer.get_piece_size():,} entries, "
        f"{len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token"
    )


if __name__ == "__main__":
    run_tool(main)
