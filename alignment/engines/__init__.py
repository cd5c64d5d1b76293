"""Engines that train, score and sample policies and judges, behind one protocol."""
