"""Evaluation of policies, by their responses and by the records of their training."""
