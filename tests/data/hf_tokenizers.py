"""Small Hugging Face tokenizers with the properties of those that users have."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from megatron_ext.data.byte_level_bpe import SpecialTokens, save_tokenizer, train_byte_level_bpe
from tests.tools.preprocessed import make_texts


def byte_level(folder: Path, vocab_size: int = 300, **special: Any) -> Path:
    """Write a byte-level BPE tokenizer into a new folder, as `train_tokenizer` makes them."""
    tokens = SpecialTokens(**special)
    folder.mkdir(parents=True)
    trained = train_byte_level_bpe(make_texts(400), vocab_size, tokens)
    save_tokenizer(trained, folder, tokens, None)
    return folder


def with_changes(source: Path, folder: Path, settings: Any = None, **encoder: Any) -> Path:
    """Write a copy of a tokenizer with other settings or parts of tokenizer.json."""
    folder.mkdir(parents=True)
    content = json.loads((source / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | encoder))
    if settings is None:
        settings = json.loads((source / "tokenizer_config.json").read_text())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_begin_and_end(source: Path, folder: Path) -> Path:
    """Write a copy that puts special tokens before and after a text, like Llama's with EOS."""
    template = processors.TemplateProcessing(
        single="<|pad|> $A <|endoftext|>",
        special_tokens=[("<|pad|>", 1), ("<|endoftext|>", 0)],
    )
    return with_changes(source, folder, post_processor=json.loads(template.__getstate__()))


def bert(folder: Path) -> Path:
    """Write a lower-casing WordPiece tokenizer, which has [SEP] in place of an end token."""
    words = sorted({word for text in make_texts(400) for word in text.lower().split()})
    pieces = sorted({f"##{letter}" for word in words for letter in word} | set("".join(words)))
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys([*words, *pieces])]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer: Any = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def words(folder: Path) -> Path:
    """Write a tokenizer whose vocabulary of whole words contains the name of its end token."""
    names = ["<end>", "<unk>", *sorted({w for text in make_texts(400) for w in text.split()})]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>", "<unk>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder
