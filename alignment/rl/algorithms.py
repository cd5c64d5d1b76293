"""Algorithms by name: which advantages go with which loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from alignment.rl.advantages import centered, leave_one_out, standardized
from alignment.rl.policy_loss import LOSSES, PolicyLoss
from alignment.rounding import Floats


@dataclass(frozen=True)
class Algorithm:
    """What is done with the rewards of a group of responses to one prompt.

    Attributes:
        advantages: of a group's rewards; none where a critic makes them.
        loss: of the policy.
        dynamic: draw more prompts in the place of groups whose rewards are all equal.
        overlong: soften the limit of length by a penalty before it.
    """

    advantages: Callable[[Floats], Floats] | None
    loss: PolicyLoss
    dynamic: bool = False
    overlong: bool = False


ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "grpo": Algorithm(standardized, LOSSES["grpo"]),
        "dr-grpo": Algorithm(centered, LOSSES["dr-grpo"]),
        "dapo": Algorithm(standardized, LOSSES["dapo"], dynamic=True, overlong=True),
        "gspo": Algorithm(standardized, LOSSES["gspo"]),
        "rloo": Algorithm(leave_one_out, LOSSES["rloo"]),
        "ppo": Algorithm(None, LOSSES["ppo"]),
    }
)


def algorithm_by_name(name: str, **settings: object) -> Algorithm:
    """An algorithm by name, its loss with other settings."""
    algorithm = ALGORITHMS[name]
    return replace(algorithm, loss=replace(algorithm.loss, **settings))  # type: ignore[arg-type]
