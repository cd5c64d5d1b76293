"""Registry of the algorithms of reinforcement learning: advantages and a loss under one name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from alignment.engines.protocol import Loss
from alignment.function_paths import load_function
from alignment.rl.advantages import centered, leave_one_out, standardized
from alignment.rl.policy_loss import PolicyLoss
from alignment.rounding import Floats
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Algorithm:
    """Advantages and loss of an algorithm.

    Attributes:
        advantages: Function that turns the rewards of a group of responses to one prompt into
            advantages. None if a critic computes them.
        loss: Loss of the policy. A function other than a `PolicyLoss` may have the attributes
            `uses_reference`, `uses_entropy` and `derives_old_log_probs`, which are False if they
            are missing.
        dynamic: Whether to draw more prompts to replace groups whose rewards are all equal.
        overlong: Whether to penalize responses close to the length limit.
    """

    advantages: Callable[[Floats], Floats] | None
    loss: Loss
    dynamic: bool = False
    overlong: bool = False

    @property
    def uses_reference(self) -> bool:
        """Return whether the loss reads `reference_log_probs`."""
        return bool(getattr(self.loss, "uses_reference", False))

    @property
    def uses_entropy(self) -> bool:
        """Return whether the loss reads the entropy of each token."""
        return bool(getattr(self.loss, "uses_entropy", False))

    @property
    def derives_old_log_probs(self) -> bool:
        """Return whether the loss takes missing `old_log_probs` from the training pass."""
        return bool(getattr(self.loss, "derives_old_log_probs", False))


ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        # arXiv 2603.12246 clips GRPO at 0.2 and 0.3, without a divergence.
        "grpo": Algorithm(standardized, PolicyLoss(clip=(0.2, 0.3))),
        # A constant divisor and no standard deviation: length and difficulty have no weight.
        "dr-grpo": Algorithm(centered, PolicyLoss(aggregation="sample-sum")),
        "dapo": Algorithm(
            standardized,
            PolicyLoss(clip=(0.2, 0.28), aggregation="token-mean"),
            dynamic=True,
            overlong=True,
        ),
        # A mean over many tokens changes little, hence these narrow bounds (arXiv 2507.18071).
        "gspo": Algorithm(standardized, PolicyLoss(clip=(3e-4, 4e-4), ratio_of="sample")),
        "rloo": Algorithm(leave_one_out, PolicyLoss(clip=None, aggregation="sample-sum")),
        "ppo": Algorithm(None, PolicyLoss(aggregation="token-mean")),
    }
)


def algorithm_by_name(name: str, loss_path: str | None = None, **settings: object) -> Algorithm:
    """Return an algorithm of the registry, optionally with another loss or other settings.

    Args:
        name: Name in the registry.
        loss_path: Function path of a loss that replaces the algorithm's; the settings are then not
            used. Default: the algorithm's own loss.
        settings: Fields of `PolicyLoss`.

    Raises:
        UserError: There is no such algorithm, or no function at the path.
    """
    if name not in ALGORITHMS:
        raise UserError(f"There is no algorithm {name!r}. Choose one of {', '.join(ALGORITHMS)}.")
    algorithm = ALGORITHMS[name]
    if loss_path is not None:
        return replace(algorithm, loss=load_function(loss_path, "--loss"))
    assert isinstance(algorithm.loss, PolicyLoss)
    return replace(algorithm, loss=replace(algorithm.loss, **settings))  # type: ignore[arg-type]
