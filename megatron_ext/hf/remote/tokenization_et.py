"""SentencePiece tokenizer of a training run for transformers, with the same ids and texts."""

from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class ExpertThresholdTokenizer(SentencePieceBackend):
    """SentencePiece tokenizer that adds no tokens before or after a text.

    Names of control tokens in a text, such as `</s>`, are encoded as text, as in training. Control
    tokens that a chat template writes are tokens.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        kwargs.pop("legacy", None)
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(vocab_file=vocab_file, legacy=True, **kwargs)

    def apply_chat_template(
        self, *args: Any, tokenizer_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Render a conversation; see `apply_chat_template` of transformers."""
        options = {"split_special_tokens": False} | (tokenizer_kwargs or {})
        return super().apply_chat_template(*args, tokenizer_kwargs=options, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens, including the names of control tokens."""
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
