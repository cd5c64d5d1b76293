"""Comparison of several runs by their metrics."""
