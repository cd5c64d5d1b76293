"""The files of a prefix: what is there already, who may write, and how they get their names."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.preprocessing.parts import SPLITS, publish
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class DatasetOutput:
    """The files of a prefix, and their way from the parts folder to their names."""

    prefix: str

    @property
    def manifest(self) -> Path:
        return Path(f"{self.prefix}.json")

    @property
    def parts(self) -> Path:
        return Path(f"{self.prefix}.parts")

    def dataset(self, split: str, suffix: str) -> Path:
        return Path(f"{self.prefix}_{split}_text_document.{suffix}")

    def is_complete(self, settings: dict[str, Any], overwrite: bool) -> bool:
        """Whether everything made with `settings` is there.

        Raises:
            UserError: something else is there, and may not be overwritten.
        """
        there = [self.manifest] + [self.dataset(s, e) for s in SPLITS for e in ("bin", "idx")]
        there = [path for path in there if path.exists()]
        try:
            manifest = json.loads(self.manifest.read_text())
            made_with, files = manifest["settings"], manifest["files"]
        except (OSError, ValueError, KeyError):
            made_with, files = {}, {}
        if made_with == settings:
            paths = {self.manifest.with_name(name): size for name, size in files.items()}
            return all(path.exists() and path.stat().st_size == n for path, n in paths.items())
        if there and not overwrite:
            changed = [key for key in settings if settings[key] != made_with.get(key)]
            what = f"was made with another {' and '.join(changed)}" if made_with else "exists"
            raise UserError(
                f"{there[0]} {what}: give --overwrite to replace it, or another --output-prefix"
            )
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the parts folder; a second run on the same prefix is refused. Without a finished
        part in it the folder goes away again."""
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            lock = open(self.parts / "lock", "w")  # noqa: SIM115 - held until the end
        except OSError as error:
            reason = f"cannot write {self.parts}: {error.strerror}"
            raise UserError(f"--output-prefix {self.prefix}: {reason}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another run writes {self.prefix}: wait for its end") from error
            try:
                for leftover in self.parts.glob("*.tmp"):
                    leftover.unlink()
                yield
            finally:
                if not any(self.parts.glob("*.json")):
                    shutil.rmtree(self.parts, ignore_errors=True)

    def commit(self, manifest: dict[str, Any], splits: list[str]) -> None:
        """Put the finished datasets in place. An index comes last and never beside other data; the
        manifest comes first, so that a run cut off here is known as ours and goes on."""
        for split in SPLITS:
            self.dataset(split, "idx").unlink(missing_ok=True)
        files = {
            self.dataset(split, suffix): self.parts / f"{split}.dataset.{suffix}"
            for suffix in ("bin", "idx")
            for split in splits
        }
        manifest["files"] = {to.name: path.stat().st_size for to, path in files.items()}
        temporary = self.parts / "manifest.tmp"
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        publish(temporary, self.manifest)
        for split in set(SPLITS) - set(splits):
            self.dataset(split, "bin").unlink(missing_ok=True)
        for to, path in files.items():
            publish(path, to)
