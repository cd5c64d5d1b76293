"""Asynchronous client of HTTP models: retries, rate limits, usage and a durable answer store."""
