"""Shards of text into parts of tokens, and parts into Megatron's indexed datasets."""
