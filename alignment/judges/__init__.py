"""Judges: asking them, what they answer, and how far they agree."""
