"""Train a SentencePiece BPE tokenizer that loses nothing: decode(encode(text)) == text.

Text is taken as it is (no normalisation, no dummy prefix), and bytes outside the vocabulary fall
back to byte tokens, so no text is unknown; only U+2581, SentencePiece's own mark for a space, reads
back as a space. The ids 0 to 3 are unk, bos, eos and pad. Megatron reads the file with
`--tokenizer-type SentencePieceTokenizer --tokenizer-model FILE` and ends documents with eos.

Of a corpus larger than the sample, a uniform sample of lines is drawn in one pass.
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
from megatron_ext.progress import Progress

_SHARD_BYTES = 1 << 30


class LineSample:
    """A uniform sample, in the stream's order, of lines that fit in `max_lines` and `max_bytes`.

    Every line draws a random key and the lines with the smallest keys stay. Once a key has been
    turned away, so is every larger one, which keeps the sample uniform when lines differ in length.
    """

    def __init__(self, max_lines: int, max_bytes: int, seed: int):
        self.max_lines, self.max_bytes = max_lines, max_bytes
        self.seen_lines = self.seen_bytes = self.bytes = 0
        self._random = random.Random(seed)
        self._limit = 1.0
        self._heap: list[tuple[float, int, str]] = []  # (-key, position, line)

    def add(self, line: str) -> None:
        """Offer the stream's next line."""
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
        """The sample, in the order of the stream."""
        return [line for _, _, line in sorted(self._heap, key=lambda entry: entry[1])]


def documents(paths: list[str], layout: TextFormat) -> Iterator[str]:
    """The documents of all files in order, with progress; malformed lines are counted and left
    out, as `preprocess_data` reports each of them.

    Raises:
        UserError: a file that cannot be read, or no document in any.
    """
    shards = plan_shards(paths, layout, _SHARD_BYTES)
    done = found = 0
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
                found += 1
                if found % 256 == 0:
                    progress.update(done + reader.consumed, f"{found:,} documents")
                yield document
            done += shard.size
        if malformed:
            progress.log(f"left out {len(malformed):,} malformed lines; first: {malformed[0]}")
    if not found:
        why = f": {malformed[0]}" if malformed else ""
        raise UserError(f"--input holds no document{why}")


def sample_lines(texts: Iterable[str], max_lines: int, max_bytes: int, seed: int) -> LineSample:
    """Draw a sample of the texts' lines, each with its line end, which is learnt like a letter."""
    sample = LineSample(max_lines, max_bytes, seed)
    for text in texts:
        for line in text.split("\n"):
            if line.strip():
                sample.add(line + "\n")
    return sample


def train(lines: list[str], vocab_size: int, character_coverage: float) -> bytes:
    """Train a BPE model with exactly `vocab_size` entries; the same lines give the same bytes.

    Raises:
        UserError: the vocabulary is too large or too small for the lines, or there are none.
    """
    if not lines:
        raise UserError("--input holds no text to learn from: give files with text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=1,  # BPE gains nothing from more, and their number is kept in the file
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
            f"--vocab-size {vocab_size} is too large for this text: "
            f"set it to at most {match[1]} or give more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too small for the characters of this text: "
            f"set it to at least {match[1]} or lower --character-coverage"
        )
    return UserError(f"SentencePiece cannot train on this text: {message}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(prog="python -m tools.train_tokenizer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # fmt: off
    add("--input", nargs="+", required=True, metavar="FILE",
        help="files or globs (** goes into folders): .jsonl, .parquet, .txt; plain, .gz, .zst, "
             ".bz2 or .xz")
    add("--output", required=True, metavar="FILE",
        help="the tokenizer to write; .model is added when missing")
    add("--vocab-size", type=int, required=True, metavar="N",
        help="entries of the vocabulary, with 256 bytes and 4 special tokens among them")
    add("--format", choices=("auto", *FORMATS), default="auto",
        help="format of the input; auto goes by each file's suffix")
    add("--text-key", default="text", metavar="KEY",
        help="field (JSONL) or column (Parquet) that holds the text; default text")
    add("--max-sample-bytes", type=int, default=256 << 20, metavar="N",
        help="train on a random sample of lines with at most N bytes; default 256 MiB. Training "
             "takes about ten bytes of memory for each")
    add("--max-sample-lines", type=int, default=20_000_000, metavar="N",
        help="train on a random sample of at most N lines; default 20 million")
    add("--character-coverage", type=float, default=0.9995, metavar="SHARE",
        help="share of all characters that get an entry of their own, the rest are spelt in "
             "bytes; default 0.9995")
    add("--seed", type=int, default=0, help="seed of the sample; default 0")
    add("--overwrite", action="store_true", help="replace --output when it exists")
    # fmt: on
    arguments = parser.parse_args(argv)
    for flag in ("vocab_size", "max_sample_bytes", "max_sample_lines"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    if not 0 < arguments.character_coverage <= 1:
        raise UserError("--character-coverage must be above 0 and at most 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    output = Path(arguments.output)
    if output.suffix != ".model":
        output = output.with_name(output.name + ".model")
    if output.exists() and not arguments.overwrite:
        raise UserError(f"--output {output} exists: give --overwrite to replace it")
    # Lines are what is learnt from, wherever a document of plain text ends.
    layout = TextFormat(arguments.format, arguments.text_key, separator="\n")
    paths = expand_inputs(arguments.input)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot make its folder: {error.strerror}") from error
    sample = sample_lines(
        documents(paths, layout),
        arguments.max_sample_lines, arguments.max_sample_bytes, arguments.seed,
    )  # fmt: skip
    lines = sample.lines()
    print(
        f"training on {len(lines):,} of {sample.seen_lines:,} lines, "
        f"{sample.bytes / 1e6:,.1f} of {sample.seen_bytes / 1e6:,.1f} MB",
        flush=True,
    )
    # SentencePiece trains outside Python, where Python's own handler would not be heard.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    model = train(lines, arguments.vocab_size, arguments.character_coverage)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    temporary.write_bytes(model)
    temporary.replace(output)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output))
    text = "".join(lines[:1000])
    print(
        f"wrote {output}: {tokenizer.get_piece_size():,} entries, "
        f"{len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes a token"
    )


if __name__ == "__main__":
    run_tool(main)
