"""Prompts and preferences: reading and writing them, splits, near-duplicates, chat templates."""
