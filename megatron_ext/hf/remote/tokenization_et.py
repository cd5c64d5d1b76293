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
        """Text of tokens, with the names of special tokens, which SentencePiece leaves out."""
        named = {*self.all_special_tokens} - {self.unk_token}
        text = ""
        run: list[str] = []
        for token in tokens:
            if token in named:
                text += self.sp_model.decode_pieces(run) + token
                run = []
            else:
                run.append(token)
        return text + self.sp_model.decode_pieces(run)
