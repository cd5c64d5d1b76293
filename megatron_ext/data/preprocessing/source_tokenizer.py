"""Tokenizers that `tools.preprocess_data` reads: a SentencePiece model or a Hugging Face folder."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from megatron_ext.data.document_tokens import DocumentTokens
from megatron_ext.data.preprocessing.encoding import DocumentEncoder
from megatron_ext.data.preprocessing.fast_encoding import FastEncoder
from megatron_ext.data.tokenizer_identity import tokenizer_digest, tokenizer_of_path
from megatron_ext.errors import UserError

Kind = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
_COMMON_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


@dataclass(frozen=True)
class SourceTokenizer:
    """A tokenizer, in the form in which it is sent to the workers.

    Attributes:
        kind: Value of Megatron's --tokenizer-type.
        path: File (SentencePiece) or folder (Hugging Face).
        sha256: Digest as in `tokenizer_digest`.
        vocab_size: Number of entries.
        eod: End-of-document id.
        parse_special: Whether names of special tokens in a text are these tokens.
        pipeline: JSON of the Rust tokenizer that `AutoTokenizer` makes of a Hugging Face folder.
    """

    kind: Kind
    path: str
    sha256: str
    vocab_size: int
    eod: int
    parse_special: bool = False
    pipeline: str = field(default="", repr=False)

    def encoder(self, dtype: str, threads: int = 1) -> DocumentEncoder | FastEncoder:
        """Return an encoder of documents.

        Args:
            dtype: Data type of the tokens.
            threads: Number of threads of a Rust tokenizer.
        """
        if self.kind == "SentencePieceTokenizer":
            return DocumentEncoder(self.path, dtype)
        return FastEncoder(self.pipeline, self.eod, dtype, self.parse_special, threads)

    def reference(self) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
        """Return functions of Megatron's own class that encode and decode a document.

        The ids that the first one returns end with the end-of-document id.
        """
        from megatron.core.tokenizers import MegatronTokenizer

        library = "sentencepiece" if self.kind == "SentencePieceTokenizer" else "huggingface"
        tokenizer: Any = MegatronTokenizer.from_pretrained(
            tokenizer_path=self.path, metadata_path={"library": library}
        )
        encode = DocumentTokens(tokenizer, self.parse_special).document
        if library == "sentencepiece":
            return encode, tokenizer.detokenize
        inner = tokenizer._tokenizer.tokenizer

        def decode(ids: list[int]) -> str:
            return inner.decode(
                ids, skip_special_tokens=not self.parse_special, clean_up_tokenization_spaces=False
            )

        return encode, decode


def open_tokenizer(model: str, parse_special: bool = False) -> SourceTokenizer:
    """Open the tokenizer of --tokenizer-model.

    Args:
        model: SentencePiece file, tokenizer.json, or Hugging Face folder.
        parse_special: Whether names of special tokens in a text are these tokens.

    Raises:
        UserError: It cannot be read, or it has no end-of-document id.
    """
    kind, path = tokenizer_of_path(model)
    if kind == "HuggingFaceTokenizer":
        return _open_hugging_face(Path(path), parse_special)
    if parse_special:
        raise UserError(
            f"--parse-special-tokens needs a Hugging Face tokenizer, but --tokenizer-model {model} "
            "is a SentencePiece model, which encodes the names of its control tokens as text. "
            "Leave the flag out."
        )
    return _open_sentencepiece(path)


def _open_sentencepiece(model: str) -> SourceTokenizer:
    try:
        content = Path(model).read_bytes()
    except OSError as error:
        raise UserError(
            f"--tokenizer-model {model} cannot be read: {error.strerror}. Give the path of a "
            "SentencePiece model, of a tokenizer.json or of a folder with one."
        ) from error
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(content)
    except RuntimeError as error:
        raise UserError(
            f"--tokenizer-model {model} is neither a SentencePiece model nor a tokenizer.json. "
            "Train one with python -m tools.train_tokenizer."
        ) from error
    if tokenizer.eos_id() < 0:
        raise UserError(
            f"--tokenizer-model {model} has no eos id, which ends documents. Train a tokenizer "
            "with python -m tools.train_tokenizer."
        )
    return SourceTokenizer(
        kind="SentencePieceTokenizer",
        path=model,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=tokenizer.get_piece_size(),
        eod=tokenizer.eos_id(),
    )


def _open_hugging_face(folder: Path, parse_special: bool) -> SourceTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and Rust raise any kind for damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--tokenizer-model {folder} cannot be loaded by transformers: {reason}. Give a folder "
            "with an intact tokenizer.json."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"--tokenizer-model {folder} is a {type(tokenizer).__name__} without tokenizer.json. "
            "Give a tokenizer with a tokenizer.json, or a SentencePiece model."
        )
    # Megatron ends documents with the separator if there is no end token.
    eod = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if eod is None:
        raise _no_end(folder, tokenizer)
    vocab_size, largest = len(tokenizer), max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"--tokenizer-model {folder} has {vocab_size:,} entries with ids up to {largest:,}: "
            "some ids below it have no entry, and a model would have no embedding for the largest "
            "ones. Give a tokenizer whose ids are consecutive."
        )
    digest = tokenizer_digest(
        Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    )
    if digest is None:
        raise UserError(
            f"--tokenizer-model {folder} has no tokenizer.json. Give a folder with one."
        )
    return SourceTokenizer(
        kind="HuggingFaceTokenizer",
        path=str(folder),
        sha256=digest,
        vocab_size=vocab_size,
        eod=eod,
        parse_special=parse_special,
        pipeline=_pipeline(tokenizer),
    )


def _pipeline(tokenizer: Any) -> str:
    """Return the JSON of a tokenizer's Rust part, without the state of its last call."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(pipeline | {"truncation": None, "padding": None})


def _no_end(folder: Path, tokenizer: Any) -> UserError:
    """Return the error for a tokenizer without an end token, with the tokens that could be it."""
    vocabulary = tokenizer.get_vocab()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = dict.fromkeys([*(name for name in _COMMON_ENDS if name in vocabulary), *special])
    choices = " or ".join(map(repr, list(names)[:4]))
    advice = f"here probably {choices}" if choices else "which its vocabulary has"
    return UserError(
        f"--tokenizer-model {folder} has no end token, and every document must end with one. Name "
        f'it in {folder}/tokenizer_config.json as "eos_token": "TOKEN", where TOKEN is a token '
        f"that ends a document, {advice}."
    )
