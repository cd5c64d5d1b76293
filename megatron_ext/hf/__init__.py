"""Conversion of models between checkpoints and the Hugging Face format."""
