"""Resuming Megatron's distributed optimizer in fp32 and with torch's Adam.

Megatron saves both and could load neither. In fp32 the shards to fill are views of the parameters
themselves, which autograd guards. Torch's Adam runs wherever neither Transformer Engine nor Apex
is installed. It is asked for its step count before it has any state. Loading looks for that count
beside each parameter, where reshardable checkpoints have none, and leaves it at zero, or in one
tensor that all parameters share and torch advances once for each of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state Adam would give it before its first step."""
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
    if isinstance(self.optimizer, torch.optim.Adam):
        _begin(self.optimizer)
    return _state_dict(self)


@functools.wraps(_load_state_dict)
def load_state_dict(self: DistributedOptimizer, state: dict[str, Any]) -> None:
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
