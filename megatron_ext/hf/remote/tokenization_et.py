"""The SentencePiece tokenizer of a training run, for transformers: the same ids, the same text."""

from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class ExpertThresholdTokenizer(SentencePieceBackend):
    """SentencePiece as it is: nothing is put in front of a text, nothing behind it."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        kwargs.pop("legacy", None)
        super().__init__(vocab_file=vocab_file, legacy=True, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode_pieces(tokens)
