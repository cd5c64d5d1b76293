r"""Replace a judge by a retrained one that has passed a regression test.

    et-align promote --candidate RUN/best --current DIR \
        --old-gold GOLD.jsonl --old-current V.jsonl --old-candidate V.jsonl \
        [--new-gold GOLD.jsonl --new-current V.jsonl --new-candidate V.jsonl] \
        [--old-items ITEMS.jsonl] [--new-items ITEMS.jsonl]

A policy in training moves away from the texts that its judge was trained on. A judge that is
retrained on samples of the policy, labeled by the gold judge, must still judge the old test set
well: the candidate is refused if its agreement there may have dropped by more than --margin. On new
items, such as samples of the policy, it must agree better than the current judge, by more than
rounding. Both differences are taken over the items that both judges judged, and the end of the 95 %
interval decides. Several responses to a prompt are not independent: with --old-items and
--new-items the intervals are over prompts. A candidate is also refused if its share of malformed or
failed verdicts exceeds the current judge's by more than --margin.

A candidate that passes is copied to --current as a whole, and the exit status is 0. Otherwise
--current is left as it is, and the exit status is 3. If the command is killed between its two
renames, the former judge is in .NAME.old next to --current, and the next promotion restores it
first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.typed_flags import flag, parse_config


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Flags of `et-align promote`."""

    candidate: str = flag(metavar="DIR")
    """Folder of the retrained judge."""
    current: str = flag(metavar="DIR")
    """Folder of the judge in use, which the candidate replaces."""
    old_gold: str = flag(metavar="FILE")
    """Verdicts of the gold judge on the old test set."""
    old_current: str = flag(metavar="FILE")
    """Verdicts of the current judge on the old test set."""
    old_candidate: str = flag(metavar="FILE")
    """Verdicts of the candidate on the old test set."""
    old_items: str | None = flag(None, metavar="FILE")
    """Responses or pairs of the old test set, for intervals over prompts. Default: none; intervals
    over items."""
    new_gold: str | None = flag(None, metavar="FILE")
    """Verdicts of the gold judge on new items. Default: none; no new items."""
    new_current: str | None = flag(None, metavar="FILE")
    """Verdicts of the current judge on new items. Default: none."""
    new_candidate: str | None = flag(None, metavar="FILE")
    """Verdicts of the candidate on new items. Default: none."""
    new_items: str | None = flag(None, metavar="FILE")
    """Responses or pairs of the new items, for intervals over prompts. Default: none; intervals
    over items."""
    margin: float = flag(0.02, metavar="X", at_least=0)
    """Agreement (alpha, or accuracy on pairs) that the candidate may lose, and share of verdicts
    that it may additionally leave unjudged."""
    max_failed: float = flag(0.05, metavar="SHARE", at_least=0, at_most=1)
    """Share of the gold judge's verdicts that may have failed, from 0 to 1. If more have failed,
    the command ends with status 3."""
    resamples: int = flag(2000, metavar="N", at_least=100)
    """Number of resamples of the bootstrap."""

    def __post_init__(self) -> None:
        new = [self.new_gold, self.new_current, self.new_candidate]
        if any(new) and not all(new):
            raise UserError(
                "--new-gold, --new-current and --new-candidate go together. Give all or none."
            )
        if self.new_items and not self.new_gold:
            raise UserError("--new-items requires --new-gold.")
        if not (Path(self.candidate) / "config.json").is_file():
            raise UserError(
                f"--candidate {self.candidate} has no config.json. Give the Hugging Face folder of "
                "a judge."
            )
        if Path(self.current).resolve() == Path(self.candidate).resolve():
            raise UserError(
                "--candidate and --current are the same folder. Give two different ones."
            )


def parse(argv: Sequence[str] | None) -> PromoteConfig:
    """Return the configuration that a command line describes."""
    return parse_config(PromoteConfig, argv, "et-align promote", __doc__)
