"""Models that are resident on the training ranks next to the policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from alignment.judges.kinds.combined import CombinedConfig
from alignment.judges.kinds.judge_kind import JudgeConfig
from alignment.judges.kinds.local import LocalJudgeConfig
from alignment.judges.kinds.registry import read_judge


@dataclass(frozen=True)
class ResidentModel:
    """Model on the ranks next to the trained one, in the same layout.

    Attributes:
        name: Role of the model, for messages.
        model: Folder of the model. Models with the same folder share one copy.
        generation_batch_size: Answers that a rank generates in one batch. 0 if it generates none.
        length: Largest length of a question with its answer, in tokens. 0 if it generates none.
    """

    name: str
    model: str
    generation_batch_size: int = 0
    length: int = 0


def resident_models(reference: str | None, judges: Sequence[str]) -> list[ResidentModel]:
    """Return the start policy, if it is needed, and the local judges.

    Args:
        reference: Folder of the start policy. None if no divergence is measured.
        judges: Judge files.

    Raises:
        UserError: A judge file cannot be used.
    """
    models = [ResidentModel("start policy", reference)] if reference else []
    for judge in chain.from_iterable(judges_in(read_judge(file)) for file in judges):
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


def judges_in(judge: JudgeConfig) -> Iterator[JudgeConfig]:
    """Yield a judge, or the judges that it combines."""
    if isinstance(judge, CombinedConfig):
        for part in judge.parts.values():
            yield from judges_in(part)
    else:
        yield judge
