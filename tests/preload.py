"""Imported once, by the server that ranks are forked from: what costs each of them seconds.

Only on machines without CUDA. Asking for CUDA would initialise it, and it does not survive a fork.
"""

import os
import warnings

from megatron_ext.devices import activate

_before = dict(os.environ)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    activate()
    import megatron.core.tokenizers.text  # brings transformers
    import megatron.training  # noqa: F401

# What activation set; ranks take the rest of their environment from the test.
ENVIRONMENT = {key: value for key, value in os.environ.items() if _before.get(key) != value}
