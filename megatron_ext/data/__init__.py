"""Documents, tokenizers and datasets."""
