"""Sampled responses and what was said of them, kept on disk as they come.

A step's rollouts are in files of its own folder, a file for each share of the data, each line
synced to the disk before it counts. A run that was killed reads them again, whatever the number of
ranks that it goes on with, so that none is sampled twice and a judgement is never replaced.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alignment.endpoints.answer_store import AnswerStore
from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import is_share_leader, raise_on_all_ranks
from alignment.records import Outcome
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """A response to a prompt, in tokens.

    Attributes:
        task: the prompt's id.
        sample: which of its group.
        tokens: of the response, with the one that ended it.
        log_probs: of each when it was drawn, nats, over all tokens at the temperature it was drawn
            at, see `alignment.rl.supports`.
        ended: by the model itself, not by the limit.
        version: optimizer steps of the weights that drew it.
    """

    task: str
    sample: int
    tokens: list[int]
    log_probs: list[float]
    ended: bool
    version: int = 0

    @property
    def key(self) -> str:
        return f"{self.task}:{self.sample}"


@dataclass(frozen=True)
class RewardResult:
    """What a response is worth.

    Attributes:
        reward: None where there is no judgement; never a 0 instead.
        outcome: of the judgement: "score", "preference", "unparseable", "failed".
        facts: plain data for people and metrics.
        error: how far rounding may move the reward, in its unit; None where that is not known,
            which counts as the error of a score computed in fp32.
    """

    reward: float | None
    outcome: str
    facts: Mapping[str, Any]
    error: float | None = None


class RolloutStore:
    """The rollouts and rewards of one step. Ranks make the same calls, each about its own share."""

    def __init__(self, folder: Path, engine: AlignmentEngine) -> None:
        """Read what is there; a collective."""
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = {}
        self._known |= read_share(folder, engine)
        self._file: AnswerStore | None = None
        writes = is_share_leader(engine)  # also: all have read before one writes
        if writes:
            self._file = AnswerStore(share_file(folder, "share", engine))

    def __enter__(self) -> "RolloutStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.__exit__()

    def rollout(self, task: str, sample: int) -> Rollout | None:
        """One that is kept."""
        found = self._known.get(f"rollout:{task}:{sample}")
        return None if found is None else Rollout(**found)

    def reward(self, rollout: Rollout) -> RewardResult | None:
        """One that is kept."""
        found = self._known.get(f"reward:{rollout.key}")
        return None if found is None else RewardResult(**found)

    def keep_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        self._keep([rollout_record(rollout) for rollout in rollouts])

    def keep_rewards(self, rewards: Sequence[tuple[Rollout, RewardResult]]) -> None:
        """Those of calls that failed are for now alone: a run that goes on asks again, unless they
        are settled."""
        rows = [_reward_row(*one) for one in rewards]
        self._known |= dict(rows)
        self._keep([row for row in rows if row[1]["outcome"] != Outcome.FAILED])

    def settle(self, rewards: Sequence[tuple[Rollout, RewardResult]]) -> None:
        """Let failures stand: of a step that is trained without them. The steps after it were drawn
        by the weights that came of that."""
        self._keep([_reward_row(r, w) for r, w in rewards if w.outcome == Outcome.FAILED])

    def _keep(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._known |= dict(rows)

        def write() -> None:
            if self._file is None or not rows:
                return
            try:
                self._file.add(rows)
            except OSError as error:
                raise UserError(
                    f"rollouts cannot be kept in {self._file.path}: {error.strerror}"
                ) from error

        raise_on_all_ranks(write)


def remove_rollouts_before(folder: Path, step: int) -> None:
    """Remove the rollouts of steps before this one; rank 0 does."""
    if dist.get_rank() == 0 and folder.is_dir():
        for place in folder.iterdir():
            if int(place.name.removeprefix("step_")) < step:
                shutil.rmtree(place)
    dist.barrier()


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's rollouts."""
    return root / f"step_{step:06d}"


def _reward_row(rollout: Rollout, rewarded: RewardResult) -> tuple[str, dict[str, Any]]:
    return f"reward:{rollout.key}", {**asdict(rewarded), "facts": dict(rewarded.facts)}


def rollout_record(rollout: Rollout) -> tuple[str, dict[str, Any]]:
    """As a store keeps it: key and content."""
    return f"rollout:{rollout.key}", asdict(rollout)


def share_file(folder: Path, kind: str, engine: AlignmentEngine) -> Path:
    """Return the file that this rank's share of the data has in the folder of a step.

    The name says how many shares there are. A run that resumes on another number of ranks finds
    its rollouts spread over the files of other shares, and sees by the names which these are.
    """
    return folder / f"{kind}_{engine.data_rank:05d}_of_{engine.data_size:05d}.jsonl"


def read_share(folder: Path, engine: AlignmentEngine) -> dict[str, Any]:
    """Return the rollouts and rewards of this rank's share in the folder of a step, by key.

    Files of the other shares of this number of ranks are not read: they hold other prompts. Files
    that another number of ranks left are read whole.
    """
    others = {
        f"_{rank:05d}_of_{engine.data_size:05d}.jsonl"
        for rank in range(engine.data_size)
        if rank != engine.data_rank
    }
    known: dict[str, Any] = {}
    for file in sorted(folder.glob("*.jsonl")):
        if file.name[file.name.index("_") :] not in others:
            known |= _read(file)
    return known


def _read(file: Path) -> dict[str, Any]:
    """The whole lines of a store that a killed run may have left torn."""
    found = {}
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        found[row["key"]] = row["answer"]
    return found
