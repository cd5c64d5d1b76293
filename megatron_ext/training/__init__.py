"""Pretraining: checks, data, trainer hooks, metrics and checkpoints."""
