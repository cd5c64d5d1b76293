"""Prompts and preferences: input and output, splits, near-duplicates and chat templates."""
