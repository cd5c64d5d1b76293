"""Resuming of Megatron's distributed optimizer in fp32 and with torch's Adam.

Megatron can save both but load neither. In fp32 the shards to fill are views of the parameters
themselves, which autograd protects from changes. Torch's Adam is used where neither Transformer
Engine nor Apex is installed. Megatron reads its step count before it has any state. Loading looks
for that count next to each parameter, where reshardable checkpoints have none, and leaves it at
zero, or in one tensor that all parameters share and that torch increases once for each of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _initialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of every parameter as Adam does before its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@functools.wraps(_state_dict)
def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    """Return Megatron's state dictionary, after creating the missing state of torch's Adam."""
    if isinstance(self.optimizer, torch.optim.Adam):
        _initialize_state(self.optimizer)
    return _state_dict(self)


@functools.wraps(_load_state_dict)
def load_state_dict(self: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Load a state dictionary, with a separate step count for each parameter of torch's Adam."""
    with torch.no_grad():
        _load_state_dict(self, state)
    if isinstance(self.optimizer, torch.optim.Adam):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))


@functools.wraps(_set_states)
def set_states(self: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
    """Set the state of a parameter, except the parts that a checkpoint does not contain."""
    _set_states(self, parameter, {"step": None, "param": None, **tensors})  # None: unchanged


def replacements() -> dict[str, Callable[..., Any]]:
    """Return the replacements of methods of Megatron's distributed optimizer."""
    owner = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    return {
        f"{owner}.state_dict": state_dict,
        f"{owner}.load_state_dict": load_state_dict,
        f"{owner}._set_main_param_and_optimizer_states": set_states,
    }
