"""Models that are resident on the training ranks next to the policy."""

from collections.abc import Sequence
from dataclasses import dataclass

from alignment.judges.kinds.local import LocalJudgeConfig
from alignment.judges.kinds.registry import read_judge


@dataclass(frozen=True)
class ResidentModel:
    """A model on the ranks next to the one that is trained, in the same layout.

    Attributes:
        name: Its role, for messages.
        model: Its folder; models of one folder are one copy.
        generation_batch_size: Answers that a rank generates at a time; 0 if it generates none.
        length: Longest question with its answer, in tokens; 0 if it generates none.
    """

    name: str
    model: str
    generation_batch_size: int = 0
    length: int = 0


def resident_models(reference: str | None, judges: Sequence[str]) -> list[ResidentModel]:
    """Return the start policy, if it is needed, and the local judges.

    Args:
        reference: Folder of the start policy; none if no divergence is measured.
        judges: Files of judges.

    Raises:
        UserError: A file of a judge cannot be used.
    """
    models = [ResidentModel("start policy", reference)] if reference else []
    for file in judges:
        judge = read_judge(file)
        if not isinstance(judge, LocalJudgeConfig):
            continue
        generates = judge.thinking != "none"
        models.append(
            ResidentModel(
                f"judge {judge.name}",
                judge.model,
                judge.generation_batch_size * generates,
                judge.length * generates,
            )
        )
    return models
