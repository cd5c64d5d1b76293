"""Preflight: checks of a run, its ranks and its storage before training."""
