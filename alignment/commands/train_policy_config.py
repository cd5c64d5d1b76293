r"""Train a policy on the rewards of judges, and grade it by a gold judge that is not trained on.

    torchrun --nproc-per-node 8 -m alignment train-policy --model DIR --run-dir DIR --steps 200 \
        --prompts PROMPTS.jsonl --judge JUDGE.yaml --held-out PROMPTS.jsonl --gold GOLD.yaml

A YAML file describes each judge. A judge of kind sum or route combines other judges, verifiers and
functions. If --judge is repeated, the reward is the mean over the judges. Every --eval-interval
steps the policy answers held-out prompts, and the proxy judges and the gold judge grade the
answers. An alarm is raised when the proxy score rises and the gold score does not. --gold and
--held-out can be omitted in a smoke test, which then cannot show that a policy games its judge.
Repeat the command to resume a run that was stopped or killed; no finished response or verdict is
lost or used twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.commands.config_groups import (
    BatchConfig,
    OptimizationConfig,
    ReinforcementTrainingConfig,
    SamplingConfig,
)
from alignment.commands.rows_config import RowsConfig
from megatron_ext.errors import UserError
from megatron_ext.typed_flags import group, may_change, must_match, parse_config


@dataclass(frozen=True, kw_only=True)
class TrainPolicyConfig(ReinforcementTrainingConfig):
    """Flags of `et-align train-policy`."""

    prompts: tuple[str, ...] = must_match((), metavar="FILE")
    """Prompts to train on; required for training."""
    data_transform: str | None = must_match(None, metavar="PATH")
    """Function path, FILE.py:NAME or MODULE:NAME, of a function that changes each prompt of
    --prompts, or returns None to leave it out. Default: none."""
    judge: tuple[str, ...] = must_match((), metavar="FILE.yaml", repeat=True)
    """Proxy judge, whose scores are the rewards; required for training. Can be repeated."""
    reward: Literal["pointwise", "pairwise"] = must_match("pointwise")
    """Kind of reward. pointwise: the judge's score. pairwise: the win rate against the other
    responses to the prompt, where each pair is judged in both orders."""
    held_out: tuple[str, ...] = must_match((), metavar="FILE")
    """Prompts for grading, none of them in --prompts. Default: none, so that nothing is graded."""
    gold: tuple[str, ...] = must_match((), metavar="FILE.yaml", repeat=True)
    """Gold judge, which grades and is not trained on. Can be repeated. Default: none, so that
    nothing shows whether the policy games its judge."""
    second_gold: tuple[str, ...] = must_match((), metavar="FILE.yaml", repeat=True)
    """Gold judge of another kind, which shows whether the first one is gamed. Can be repeated.
    Default: none."""
    alarm_gap: float | None = must_match(None, metavar="SCORE", at_least=0)
    """Raise an alarm when the proxy score minus the gold score exceeds its initial value by more
    than this. Default: 0.5 for scores, 0.1 for win rates."""
    alarm_window: int = must_match(3, metavar="N", at_least=1)
    """Number of gradings over which the gold score does not rise while the proxy score does, before
    an alarm is raised."""
    stop_on_alarm: bool = must_match(False)
    """Stop the run when an alarm is raised."""
    steps: int = must_match(metavar="N", at_least=1)
    """Number of training steps."""
    kl: float = must_match(0.0, metavar="WEIGHT", at_least=0)
    """Weight of the KL divergence from the start policy in the loss."""
    kl_estimator: Literal["k2", "k3"] = must_match("k3")
    """Estimator of the KL divergence."""
    overlong_margin: int = must_match(1, metavar="TOKENS")
    """Number of tokens before --max-new-tokens at which DAPO starts to penalize the length of a
    response."""
    max_unrewarded: float = must_match(0.2, metavar="SHARE", at_least=0, at_most=1)
    """Share of the responses of a step that may have no verdict, from 0 to 1. The run ends if more
    have none."""
    keep_responses: int = may_change(0, metavar="N", at_least=0)
    """Number of responses of each step to store in RUN/responses, on which the judge can be
    retrained."""
    monitor_limits: str | None = may_change(None, metavar="FILE.yaml")
    """YAML file of the shares, from 0 to 1, of the responses of a step above which detectors raise
    an alarm. Default: the limits of the detectors."""
    routing_interval: int = may_change(50, metavar="STEPS", at_least=0)
    """Number of steps between two comparisons of how rollouts and training route tokens to experts;
    0 for none."""
    routing_samples: int = may_change(8, metavar="N", at_least=1)
    """Number of responses whose routing is compared, over all ranks."""
    reference: bool = must_match(True)
    """Do not load the start policy, from which the KL divergence is measured."""
    rows: RowsConfig = group()
    sampling: SamplingConfig = group()
    batch: BatchConfig = group(batch_size=1024)
    optimization: OptimizationConfig = group(lr=1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run.dry_run is None:
            for name in ("prompts", "judge"):
                if not getattr(self, name):
                    raise UserError(f"train-policy requires --{name}. See --help.")
            self._check_grading()
        if self.sampling.temperature <= 0:
            raise UserError(
                f"--temperature {self.sampling.temperature} must be above 0: equal responses "
                "cannot be compared."
            )
        if self.reward == "pairwise" and self.reinforcement.group_size < 2:
            raise UserError("--reward pairwise compares responses. Set --group-size to at least 2.")

    def _check_grading(self) -> None:
        """Check that gold judges have prompts to grade, and that an alarm has a gold judge."""
        if self.gold and not self.held_out:
            raise UserError(
                "--gold grades the responses to --held-out prompts. Give both, or leave both out."
            )
        for name, value in (
            ("--second-gold", self.second_gold), ("--stop-on-alarm", self.stop_on_alarm)
        ):  # fmt: skip
            if value and not self.gold:
                raise UserError(f"{name} requires --gold, which it is compared with. Add --gold.")

    @property
    def alarm_threshold(self) -> float:
        """Rise of the gap between proxy and gold score above which an alarm is raised."""
        if self.alarm_gap is not None:
            return self.alarm_gap
        return 0.1 if self.reward == "pairwise" else 0.5


def parse(argv: Sequence[str]) -> TrainPolicyConfig:
    """Return the configuration that a command line describes."""
    return parse_config(TrainPolicyConfig, argv, "et-align train-policy", __doc__)
