"""Tokenizer that follows tokenizer.json where transformers would replace its rules."""

from transformers import PreTrainedTokenizerFast


class ExactTokenizer(PreTrainedTokenizerFast):
    """Tokenizer with exactly the rules of its tokenizer.json."""
