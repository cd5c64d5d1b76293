"""Policies: trained on the rewards of judges, and graded by a judge that has no part in it."""
