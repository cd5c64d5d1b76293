"""Inspection of routing: statistics, pictures, and a page of texts with their experts."""
