"""Which models the ranks of a policy hold beside it."""

from argparse import Namespace

from alignment.commands.training_dry_run import ResidentModel
from alignment.judges.judge_spec import JudgeSpec


def resident_models(options: Namespace) -> list[ResidentModel]:
    """The start policy, if it is needed, and local judges: of `--judge`, `--gold`, `--second-gold`.

    Raises:
        UserError: see `JudgeSpec.read`.
    """
    found = (
        [ResidentModel("start policy", options.model)] if options.reference or options.kl else []
    )
    for file in [*options.judge, *options.gold, *options.second_gold]:
        spec = JudgeSpec.read(file)
        if spec.kind != "local":
            continue
        writes = spec.thinking != "none"
        found.append(
            ResidentModel(
                f"judge {spec.name}", spec.model, spec.rows * writes, spec.length * writes
            )
        )
    return found
