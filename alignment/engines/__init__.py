"""Engines: what trains, scores and samples a policy or a judge, behind one protocol."""
