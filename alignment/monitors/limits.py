"""Limits above which a monitor raises an alarm, read from YAML and checked by pydantic."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from alignment.monitors.detectors import DETECTORS, load_detector
from megatron_ext.errors import UserError

CORRELATION = "reward_length_correlation"
JUDGE = "judge"
# Default limits of the measurements that no detector makes: the share of the responses that a judge
# of gaming flags, and the rank correlation of rewards with lengths.
_BATCH_LIMITS: Mapping[str, float | None] = {JUDGE: 0.05, CORRELATION: 0.6}
_DEFAULT = "default"  # replaced by the default limit of the detector

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
_LIMIT: TypeAdapter[float | None] = TypeAdapter(_Share | None)


@dataclass(frozen=True)
class MonitorLimits:
    """Shares of a batch above which there is an alarm.

    Every registered detector has a limit: its default, unless `changed` has another.

    Attributes:
        changed: Limits that replace the defaults, by name of a detector, `judge` or
            `reward_length_correlation`; None for no alarm.
    """

    changed: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*DETECTORS, *_BATCH_LIMITS]
        for name, limit in self.changed.items():
            if name not in names:
                raise UserError(f"There is no limit {name!r}. Choose from {', '.join(names)}.")
            try:
                _LIMIT.validate_python(limit)
            except ValidationError:
                raise UserError(
                    f"The limit of {name} must be from 0 to 1 or null, not {limit!r}."
                ) from None

    def __getitem__(self, name: str) -> float | None:
        """Return the limit of a detector or another measurement, None for no alarm."""
        if name in self.changed:
            return self.changed[name]
        return _BATCH_LIMITS[name] if name in _BATCH_LIMITS else DETECTORS[name].limit

    @classmethod
    def create(cls, limits: Mapping[Any, Any]) -> Self:
        """Return the default limits with some changes.

        Args:
            limits: Limit by name of a detector, or by `FILE.py:NAME` of a detector of the user,
                which is loaded. The limit "default" is that of the detector.

        Raises:
            UserError: A name is unknown, a file cannot be loaded, or a limit is not a share.
        """
        changed = {}
        for key, limit in limits.items():
            name = "null" if key is None else str(key)  # YAML reads the detector `null` as None
            if ":" in name:
                name = load_detector(name).name
            if limit != _DEFAULT:
                changed[name] = limit
        return cls(changed)

    @classmethod
    def read(cls, file: str) -> Self:
        """Read a YAML mapping of detectors to shares.

        Args:
            file: Path of the file.

        Raises:
            UserError: The file cannot be read, or `create` refuses its content.
        """
        try:
            limits = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise UserError(
                f"The file of limits {file} cannot be read: {error.strerror}."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"The file of limits {file} is not YAML: {error}") from error
        if not isinstance(limits, Mapping):
            raise UserError(f"The file of limits {file} must be a mapping of detectors to shares.")
        try:
            return cls.create(limits)
        except UserError as error:
            raise UserError(f"The file of limits {file}: {error}") from None
