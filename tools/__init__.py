"""Commands around training, each run as `python -m tools.NAME`."""
