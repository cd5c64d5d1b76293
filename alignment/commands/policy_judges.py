"""Checks of the prompts and judges of `et-align train-policy`, and what it records of judges."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.commands.train_policy_config import TrainPolicyConfig
from alignment.judges.kinds.combined import CombinedConfig
from alignment.judges.kinds.endpoint import EndpointJudgeConfig
from alignment.judges.kinds.judge_kind import Judge, JudgeConfig
from alignment.judges.kinds.registry import read_judge
from alignment.records import Prompt
from alignment.rl.resident_models import judges_in
from megatron_ext.errors import UserError


def warn_without_gold(config: TrainPolicyConfig) -> str | None:
    """Return a warning if nothing can show that the policy games its judge."""
    if config.gold:
        return None
    missing = "--gold is" if config.held_out else "--gold and --held-out are"
    return (
        f"{missing} left out, so that this run cannot show whether the policy games its judge: "
        "a rising reward may be no gain, and no alarm can be raised. Use this for a smoke test."
    )


def shared_with_gold(specs: Mapping[str, Sequence[JudgeConfig]]) -> str | None:
    """Return a warning if a judge of the rewards is also a gold judge."""
    rewarding = {f for spec in specs["proxy"] for f in _fingerprints(spec)}
    for name in ("gold", "second_gold"):
        if rewarding & {spec.fingerprint for spec in specs[name]}:
            return (
                f"--{name.replace('_', '-')} names a judge that --judge names too: the gold judge "
                "must not be trained on, or no gap can show that the policy is gaming its judge"
            )
    return None


def _fingerprints(spec: JudgeConfig) -> set[str]:
    """Return the fingerprints of a judge and of those that it combines."""
    parts = spec.parts.values() if isinstance(spec, CombinedConfig) else ()
    return {spec.fingerprint, *(f for part in parts for f in _fingerprints(part))}


def endpoint_calls(config: TrainPolicyConfig) -> list[str]:
    """Return a sentence on the calls of each judge at an endpoint, for --dry-run.

    The number is the largest possible: a gate or a route leaves calls out.

    Raises:
        UserError: A judge file cannot be used.
    """
    size, group_size = config.batch.batch_size, config.reinforcement.group_size
    sentences = []
    for flag, files in (
        ("--judge", config.judge), ("--gold", config.gold), ("--second-gold", config.second_gold)
    ):  # fmt: skip
        for spec in map(read_judge, files):
            calls = size
            if config.reward == "pairwise":  # both orders of each pair
                calls *= group_size - 1
                calls *= 2 if isinstance(spec, CombinedConfig) else 1  # scores both responses
            often = "one call for each --held-out prompt at each evaluation"
            if flag == "--judge":
                often = f"{calls:,} calls a step, and further ones at each evaluation"
            sentences += [
                f"{flag} {spec.name} asks {judge.model} at {judge.url}, which takes no memory of "
                f"the ranks: at most {often}."
                for judge in judges_in(spec)
                if isinstance(judge, EndpointJudgeConfig)
            ]
    return sentences


def describe_judges(specs: Sequence[JudgeConfig], judges: Sequence[Judge]) -> dict[str, Any] | None:
    """Return the description of the judges of one role for run.json."""
    if not specs:
        return None
    each = [spec.summary() | {"identity": j.identity} for spec, j in zip(specs, judges)]
    if len(each) == 1:
        return {**each[0], "agreement": specs[0].read_agreement()}
    # The agreement of one judge is not that of the mean, which was not measured.
    return {"name": " + ".join(e["name"] for e in each), "agreement": None, "ensemble": each}


def check_prompts(
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    specs: Mapping[str, Sequence[JudgeConfig]],
) -> None:
    """Check that prompts have different ids, and what the judges read from their metadata.

    Args:
        prompts: Prompts to train on, which the judges of the role "proxy" judge.
        held_out: Prompts for grading, which all judges judge.
        specs: Descriptions of the judges by role.

    Raises:
        UserError: An id occurs twice, or a judge cannot judge responses to a prompt.
    """
    for flag, rows in (("--prompts", prompts), ("--held-out", held_out)):
        ids: set[str] = set()
        for prompt in rows:
            if prompt.id in ids:
                raise UserError(f"{flag} has the id {prompt.id!r} twice. Remove one of its rows.")
            ids.add(prompt.id)
    if shared := {prompt.id for prompt in prompts} & ids:
        raise UserError(
            f"--held-out has the prompt {min(shared)!r}, which is in --prompts too. Split "
            "them with et-align data split."
        )
    for name, each in specs.items():
        for spec in each:
            if name == "proxy":
                spec.check_prompts(prompts, "--prompts")
            spec.check_prompts(held_out, "--held-out")
