"""Output files of preprocessing: detection of existing output, locking, and atomic publication."""

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
    """Output files of one prefix."""

    prefix: str

    @property
    def manifest(self) -> Path:
        """File that describes how the datasets were made."""
        return Path(f"{self.prefix}.json")

    @property
    def parts(self) -> Path:
        """Folder of the finished parts, which exists until the output is complete."""
        return Path(f"{self.prefix}.parts")

    def dataset(self, split: str, suffix: str) -> Path:
        """Return a file of a dataset; the suffix is "bin" or "idx"."""
        return Path(f"{self.prefix}_{split}_text_document.{suffix}")

    def is_complete(self, settings: dict[str, Any], overwrite: bool) -> bool:
        """Return whether complete output made with `settings` exists.

        Args:
            settings: Everything that determines the output.
            overwrite: Whether output made with other settings may be replaced.

        Raises:
            UserError: Other output exists and may not be overwritten.
        """
        paths = [self.manifest] + [self.dataset(s, e) for s in SPLITS for e in ("bin", "idx")]
        existing = [path for path in paths if path.exists()]
        try:
            manifest = json.loads(self.manifest.read_text())
            made_with, files = manifest["settings"], manifest["files"]
        except (OSError, ValueError, KeyError):
            made_with, files = {}, {}
        if made_with == settings:
            sizes = {self.manifest.with_name(name): size for name, size in files.items()}
            return all(path.exists() and path.stat().st_size == n for path, n in sizes.items())
        if existing and not overwrite:
            changed = [key for key in settings if settings[key] != made_with.get(key)]
            problem = f"was made with another {' and '.join(changed)}" if made_with else "exists"
            raise UserError(
                f"{existing[0]} {problem}. Give --overwrite to replace it, or choose another "
                "--output-prefix."
            )
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the parts folder, so that a second run with the same prefix is refused.

        A folder without a finished part is removed at the end.

        Raises:
            UserError: The folder cannot be written, or another run has locked it.
        """
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            lock = open(self.parts / "lock", "w")  # noqa: SIM115 - locked until the end
        except OSError as error:
            raise UserError(
                f"--output-prefix {self.prefix} cannot be used, because {self.parts} is not "
                f"writable: {error.strerror}. Choose another prefix."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"Another run is writing {self.prefix}. Wait until it has finished."
                ) from error
            try:
                for leftover in self.parts.glob("*.tmp"):
                    leftover.unlink()
                yield
            finally:
                if not any(self.parts.glob("*.json")):
                    shutil.rmtree(self.parts, ignore_errors=True)

    def commit(self, manifest: dict[str, Any], splits: list[str]) -> None:
        """Rename the finished datasets to their final names.

        The manifest is written first, so that a run that is interrupted here can resume. An index
        is written last and never stands next to the data of another dataset.

        Args:
            manifest: Content of the manifest, to which the sizes of the files are added.
            splits: Splits that have documents.
        """
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
