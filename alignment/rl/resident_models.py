"""Which models the ranks of a policy hold beside it."""

from argparse import Namespace

from alignment.commands.training_dry_run import Held
from alignment.judges.judge_spec import JudgeSpec


def held_beside(options: Namespace) -> list[Held]:
    """The start policy, if it is needed, and local judges: of `--judge`, `--gold`, `--second-gold`.

    Raises:
        UserError: see `JudgeSpec.read`.
    """
    found = [Held("start policy", options.model)] if options.reference or options.kl else []
    for file in [*options.judge, *options.gold, *options.second_gold]:
        spec = JudgeSpec.read(file)
        if spec.kind != "local":
            continue
        writes = spec.thinking != "none"
        found.append(
            Held(f"judge {spec.name}", spec.model, spec.rows * writes, spec.length * writes)
        )
    return found
