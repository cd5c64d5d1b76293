"""Alignment with trained judges, on the parallelism of pretraining."""
