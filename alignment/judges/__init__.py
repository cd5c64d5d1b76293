"""Judges: their formats, their kinds, annotation with them and their training examples."""
