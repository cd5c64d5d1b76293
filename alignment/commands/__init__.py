"""Commands of et-align: the flags of command NAME are in NAME_config, its `run` in NAME."""
