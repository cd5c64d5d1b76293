"""Code of Expert Threshold models that is copied into their Hugging Face folders."""
