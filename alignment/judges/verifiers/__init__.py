"""Verifiers: programs that check a response against data of its prompt."""
