"""Layers, attention, norms and initial weights of the models, and what identifies a model."""
