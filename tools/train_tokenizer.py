"""Train a lossless BPE tokenizer: decode(encode(text)) == text.

With --kind sentencepiece the tokenizer is a SentencePiece model. Text is not normalized and gets no
dummy prefix, and characters outside the vocabulary are encoded as byte tokens, so that no text is
unknown. The one exception is U+2581, SentencePiece's mark for a space, which decodes to a space.
The ids 0 to 3 are unk, bos, eos and pad; eos ends documents.

With --kind huggingface it is a folder with tokenizer.json and tokenizer_config.json, which
transformers.AutoTokenizer loads: byte-level BPE, whose first ids are the special tokens. It can
have a chat template, which alignment needs.

If the corpus is larger than the sample, a uniform sample of lines is drawn in one pass.
"""

import argparse
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_ext.data.byte_level_bpe import (
    CHATML,
    CHATML_TOKENS,
    FILES,
    SpecialTokens,
    save_tokenizer,
    train_byte_level_bpe,
)
from megatron_ext.data.documents import MalformedRecord, ShardReader
from megatron_ext.data.line_sample import sample_lines
from megatron_ext.data.sentencepiece_bpe import train_sentencepiece
from megatron_ext.data.shards import FORMATS, TextFormat, expand_inputs, plan_shards
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.inference.loading_flags import check_at_least_one
from megatron_ext.new_folder import new_folder
from megatron_ext.progress import Progress

_SHARD_BYTES = 1 << 30
_JOINED = 1 << 20  # characters of plain text that are yielded at a time


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
            for document in _joined_lines(reader) if shard.format == "text" else reader:
                if isinstance(document, MalformedRecord):
                    where = f"{shard.path}: line {document.line}"
                    if shard.start:
                        where += f" after byte {shard.start}"
                    malformed.append(f"{where}: {document.reason}")
                    continue
                count += 1
                if count % 256 == 0 or shard.format == "text":
                    progress.update(done + reader.consumed, f"{count:,} documents")
                yield document
            done += shard.size
        if malformed:
            progress.log(f"skipped {len(malformed):,} malformed lines; the first is {malformed[0]}")
    if not count:
        reason = f" The first malformed line is {malformed[0]}." if malformed else ""
        raise UserError(f"--input contains no document.{reason} Give files with text.")


def _joined_lines(reader: ShardReader) -> Iterator[str | MalformedRecord]:
    """Join the lines of plain text, so that blank lines are known; malformed ones remain."""
    lines: list[str] = []
    size = 0
    for line in reader:
        if isinstance(line, MalformedRecord):
            yield line
            continue
        lines.append(f"{line}\n")
        size += len(line)
        if size > _JOINED:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


class TrainTokenizerFlags:
    """Values of the command line."""

    input: list[str]
    output: str
    kind: str
    end_token: str | None
    special_tokens: list[str]
    chat_template: str | None
    vocab_size: int
    format: str
    text_key: str
    max_sample_bytes: int
    max_sample_lines: int
    character_coverage: float | None
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
    add("--output", required=True, metavar="PATH",
        help="File for a SentencePiece model, to which the suffix .model is appended if it is "
             "missing, or folder for a Hugging Face tokenizer.")
    add("--kind", choices=("sentencepiece", "huggingface"), default="sentencepiece",
        help="Format of the tokenizer. Default: %(default)s.")
    add("--vocab-size", type=int, required=True, metavar="N",
        help="Number of entries in the vocabulary, including 256 bytes and the special tokens: 4 "
             "in a SentencePiece model, 2 in a Hugging Face tokenizer without --special-tokens.")
    add("--end-token", metavar="TOKEN",
        help="Token that ends a document, of a Hugging Face tokenizer. Default: <|endoftext|>.")
    add("--special-tokens", nargs="+", default=[], metavar="TOKEN",
        help="Further special tokens of a Hugging Face tokenizer, such as those of a chat "
             "template. Default: none.")
    add("--chat-template", metavar="FILE",
        help="File with the Jinja chat template of a Hugging Face tokenizer, or chatml for the "
             "template with <|im_start|> and <|im_end|>, which become special tokens. "
             "Default: none.")
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
    add("--character-coverage", type=float, metavar="SHARE",
        help="Share of all characters that get their own entry in a SentencePiece model; the "
             "others are encoded as bytes. Default: 0.9995.")
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
    if flags.character_coverage is not None and not 0 < flags.character_coverage <= 1:
        raise UserError(
            f"--character-coverage {flags.character_coverage} is out of range. Set it above 0 and "
            "to at most 1."
        )
    names = ["character_coverage"]
    if flags.kind == "sentencepiece":
        names = ["end_token", "special_tokens", "chat_template"]
    for name in names:
        if getattr(flags, name):
            other = {"sentencepiece": "huggingface", "huggingface": "sentencepiece"}[flags.kind]
            raise UserError(
                f"--{name.replace('_', '-')} has no effect with --kind {flags.kind}. Leave it out, "
                f"or use --kind {other}."
            )
    return flags


def special_tokens(flags: TrainTokenizerFlags) -> tuple[SpecialTokens, str | None]:
    """Return the special tokens of a Hugging Face tokenizer and its chat template.

    Raises:
        UserError: A token is empty, or the file of the template cannot be read.
    """
    template, chatml = flags.chat_template, flags.chat_template == "chatml"
    if chatml:
        template = CHATML
    elif template is not None:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template {flags.chat_template} cannot be read: {error}. Give a file with "
                "a Jinja template, or chatml."
            ) from error
    more = (*(CHATML_TOKENS if chatml else ()), *flags.special_tokens)
    special = SpecialTokens(
        flags.end_token or SpecialTokens.end, more, CHATML_TOKENS[1:] if chatml else ()
    )
    if any(not name.strip() for name in special.names):
        raise UserError("--special-tokens contains an empty token. Remove it.")
    return special, template


def output_path(flags: TrainTokenizerFlags) -> Path:
    """Return the file or folder of the tokenizer, whose parent folder exists.

    Raises:
        UserError: It exists and may not be replaced, or its folder cannot be created.
    """
    output = Path(flags.output)
    if flags.kind == "sentencepiece":
        if output.suffix != ".model":
            output = output.with_name(output.name + ".model")
        exists, replaceable = output.exists(), True
    else:
        if output.suffix in (".json", ".model") or output.is_file():
            raise UserError(
                f"--output {output} is not a folder, but a Hugging Face tokenizer consists of "
                "several files. Give the path of a folder."
            )
        names = {file.name for file in output.iterdir()} if output.is_dir() else set()
        exists, replaceable = bool(names), names <= set(FILES)
    if not replaceable:
        raise UserError(
            f"--output {output} contains other files than those of a tokenizer. Choose a new "
            "folder."
        )
    if exists and not flags.overwrite:
        raise UserError(f"--output {output} exists. Give --overwrite to replace it.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder of --output {output} cannot be created: {error.strerror}. Choose another "
            "path."
        ) from error
    return output


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    flags = parse_arguments(argv)
    output = output_path(flags)
    is_sentencepiece = flags.kind == "sentencepiece"
    special, template = special_tokens(flags)
    # The tokenizer trains on lines, wherever a document of plain text ends.
    layout = TextFormat(flags.format, flags.text_key, separator="\n")
    sample = sample_lines(
        documents(expand_inputs(flags.input), layout),
        flags.max_sample_lines, flags.max_sample_bytes, flags.seed,
        keep_blank_lines=not is_sentencepiece,
    )  # fmt: skip
    lines = sample.lines()
    print(
        f"training on {len(lines):,} of {sample.seen_lines:,} lines, "
        f"{sample.bytes / 1e6:,.1f} of {sample.seen_bytes / 1e6:,.1f} MB",
        flush=True,
    )
    # Tokenizers are trained outside Python, where Python's signal handler would not run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    text = "".join(lines[:1000])
    if is_sentencepiece:
        model = train_sentencepiece(lines, flags.vocab_size, flags.character_coverage or 0.9995)
        temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
        temporary.write_bytes(model)
        temporary.replace(output)
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output))
        tokens = len(tokenizer.encode(text))
    else:
        trained = train_byte_level_bpe(lines, flags.vocab_size, special)
        with new_folder(output, overwrite=True) as folder:
            save_tokenizer(trained, folder, special, template)
        tokens = len(trained.encode(text).ids)
    print(
        f"wrote {output}: {flags.vocab_size:,} entries, "
        f"{len(text.encode()) / tokens:.2f} bytes per token"
    )


if __name__ == "__main__":
    run_tool(main)
