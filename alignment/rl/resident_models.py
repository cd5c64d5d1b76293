"""Which models the ranks of a policy hold beside it."""

from argparse import Namespace

from alignment.commands.training_dry_run import ResidentModel
from alignment.judges.kinds.local import LocalJudgeConfig
from alignment.judges.kinds.registry import read_judge


def resident_models(options: Namespace) -> list[ResidentModel]:
    """The start policy, if it is needed, and local judges: of `--judge`, `--gold`, `--second-gold`.

    Raises:
        UserError: see `read_judge`.
    """
    found = (
        [ResidentModel("start policy", options.model)] if options.reference or options.kl else []
    )
    for file in [*options.judge, *options.gold, *options.second_gold]:
        spec = read_judge(file)
        if not isinstance(spec, LocalJudgeConfig):
            continue
        writes = spec.thinking != "none"
        found.append(
            ResidentModel(
                f"judge {spec.name}",
                spec.model,
                spec.generation_batch_size * writes,
                spec.length * writes,
            )
        )
    return found
