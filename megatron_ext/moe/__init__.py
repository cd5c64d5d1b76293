"""Routers of mixture-of-experts layers, their thresholds, and exact order statistics."""
