"""Slow imports, made once by the server that ranks are forked from.

Only on machines without CUDA. Asking for CUDA would initialise it, and it does not survive a fork.
"""

import gc
import importlib
import os
import threading
import warnings

from megatron_ext.devices import activate

_before = dict(os.environ)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    activate()
    for name in (
        "megatron.core.tokenizers.text",  # imports transformers
        "megatron.training",
        "torch.distributed.checkpoint",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
        # A rank imports the module of the function that it runs, which imports these.
        "hypothesis",
        "pytest",
    ):
        importlib.import_module(name)

# A fork has the locks of its parent's threads, but not the threads.
assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
gc.collect()
gc.freeze()  # excluded from garbage collection, so that memory stays shared

# What activation set; ranks take the rest of their environment from the test.
ENVIRONMENT = {key: value for key, value in os.environ.items() if _before.get(key) != value}
