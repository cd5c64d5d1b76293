"""Sampled responses with their rewards, and the store that writes them to disk on arrival.

The rollouts of a step are in a separate folder, with one file per share of the data. A line counts
once it is synced to the disk. A resumed run reads the lines again, on any number of ranks, so that
no response is sampled twice and no verdict is replaced.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from alignment.endpoints.answer_store import AnswerStore
from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import is_share_leader, raise_on_all_ranks
from alignment.records import Outcome
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from alignment.rl.tasks import PromptTask


@dataclass(frozen=True)
class Rollout:
    """Response to a prompt, in tokens.

    Attributes:
        task: Id of the prompt.
        sample: Number of the response in its group.
        tokens: Token ids of the response, with the one that ended it.
        log_probs: Log-probability of each token when it was sampled, in nats, over the whole
            vocabulary at the temperature of sampling; see `alignment.rl.served_log_probs`.
        ended: Whether the model ended the response, and not the limit of its length.
        version: Number of optimizer steps of the weights from which it was sampled.
    """

    task: str
    sample: int
    tokens: list[int]
    log_probs: list[float]
    ended: bool
    version: int = 0

    @property
    def key(self) -> str:
        """Name of the response, unique in a step."""
        return f"{self.task}:{self.sample}"


@dataclass(frozen=True)
class RewardResult:
    """Result of rewarding a response.

    Attributes:
        reward: Reward of the response. None if there is no verdict; a missing reward is never 0.
        outcome: "score", "preference", "unparseable" or "failed".
        text: Text of the response.
        details: JSON values for readers, such as the scores of each judge and failure `reasons`.
        error: Largest rounding error of the reward, in its unit. None if it is unknown, which
            counts as the error of a score computed in fp32.
    """

    reward: float | None
    outcome: str
    text: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    error: float | None = None


class RolloutGroup(NamedTuple):
    """Responses to one prompt, with their rewards."""

    task: "PromptTask"
    rollouts: list[Rollout]
    rewards: list[RewardResult]


class RolloutStore:
    """Rollouts and rewards of one step. All ranks make the same calls, each for its share."""

    def __init__(self, folder: Path, engine: AlignmentEngine) -> None:
        """Read the rollouts of this rank's share; a collective."""
        folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, Any] = read_share(folder, engine)
        self._file: AnswerStore | None = None
        # The collective also makes sure that all ranks have read before one of them writes.
        if is_share_leader(engine):
            self._file = AnswerStore(share_file(folder, "share", engine))

    def __enter__(self) -> "RolloutStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.__exit__()

    def rollout(self, task: str, sample: int) -> Rollout | None:
        """Return a stored rollout, or None."""
        record = self._records.get(f"rollout:{task}:{sample}")
        return None if record is None else Rollout(**record)

    def reward(self, rollout: Rollout) -> RewardResult | None:
        """Return the stored reward of a rollout, or None."""
        record = self._records.get(f"reward:{rollout.key}")
        return None if record is None else RewardResult(**record)

    def add_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Store rollouts; a collective."""
        self._add([rollout_record(rollout) for rollout in rollouts])

    def add_rewards(self, rewards: Sequence[tuple[Rollout, RewardResult]]) -> None:
        """Store rewards; a collective.

        Failed calls stay in memory only. A resumed run calls the judge again, unless the step was
        trained without these responses; see `settle`.
        """
        records = [_reward_record(*one) for one in rewards]
        self._records |= dict(records)
        self._add([record for record in records if record[1]["outcome"] != Outcome.FAILED])

    def settle(self, groups: Sequence[RolloutGroup]) -> None:
        """Store the failures of a step as final; a collective.

        The step is trained without these responses, and later steps are sampled with the resulting
        weights. A resumed run must therefore not request their rewards again.
        """
        self._add(
            [
                _reward_record(rollout, reward)
                for _, rollouts, rewards in groups
                for rollout, reward in zip(rollouts, rewards)
                if reward.outcome == Outcome.FAILED
            ]
        )

    def _add(self, records: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._records |= dict(records)

        def write() -> None:
            if self._file is None or not records:
                return
            try:
                self._file.add(records)
            except OSError as error:
                raise UserError(
                    f"Rollouts cannot be written to {self._file.path}: {error.strerror}."
                ) from error

        raise_on_all_ranks(write)


def remove_rollouts_before(root: Path, step: int) -> None:
    """Remove the rollouts of the steps before a step, on rank 0."""
    if dist.get_rank() == 0 and root.is_dir():
        for folder in root.iterdir():
            if int(folder.name.removeprefix("step_")) < step:
                shutil.rmtree(folder)
    dist.barrier()


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's rollouts."""
    return root / f"step_{step:06d}"


def rollout_record(rollout: Rollout) -> tuple[str, dict[str, Any]]:
    """Return the key and the content of the record of a rollout."""
    return f"rollout:{rollout.key}", asdict(rollout)


def _reward_record(rollout: Rollout, reward: RewardResult) -> tuple[str, dict[str, Any]]:
    return f"reward:{rollout.key}", {**asdict(reward), "details": dict(reward.details)}


def share_file(folder: Path, kind: str, engine: AlignmentEngine) -> Path:
    """Return the file of this rank's share of the data in the folder of a step.

    The name contains the number of shares. A run that resumes on another number of ranks finds its
    rollouts spread over the files of other shares, and recognizes these files by their names.
    """
    return folder / f"{kind}_{engine.data_rank:05d}_of_{engine.data_size:05d}.jsonl"


def read_share(folder: Path, engine: AlignmentEngine) -> dict[str, Any]:
    """Return the rollouts and rewards of this rank's share in the folder of a step, by key.

    Files of the other shares of the same number of ranks contain other prompts and are not read.
    All lines of files from another number of ranks are read.
    """
    other_shares = {
        f"_{rank:05d}_of_{engine.data_size:05d}.jsonl"
        for rank in range(engine.data_size)
        if rank != engine.data_rank
    }
    records: dict[str, Any] = {}
    for file in sorted(folder.glob("*.jsonl")):
        if file.name[file.name.index("_") :] not in other_shares:
            records |= _complete_records(file)
    return records


def _complete_records(file: Path) -> dict[str, Any]:
    """Return the complete lines of a file whose last line may be cut off by a kill."""
    records = {}
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        records[row["key"]] = row["answer"]
    return records
