"""Commands around training, each run as `et NAME` or `python -m tools.NAME`."""
