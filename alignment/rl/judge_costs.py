"""Token usage and cost of the judges at endpoints during training."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from alignment.judges.kinds.combined_judge import CombinedJudge
from alignment.judges.kinds.judge_kind import Judge

if TYPE_CHECKING:
    from alignment.judges.kinds.endpoint_judge import EndpointJudge

_COUNTS = ("answers", "prompt_tokens", "completion_tokens")


class JudgeCosts:
    """Usage of all judges at endpoints, proxy and gold together; every rank calls it.

    Attributes:
        judges: The judges at endpoints, those that other judges combine included.
    """

    def __init__(self, judges: Iterable[Judge]) -> None:
        """Find the judges at endpoints, and count their earlier answers; a collective."""
        self.judges = [one for judge in judges for one in _at_endpoints(judge)]
        self._before = self._sums()

    def metrics(self) -> dict[str, float]:
        """Return the usage since the last call; a collective, empty without such judges.

        Returns:
            `usage/answers`, `usage/prompt_tokens` and `usage/completion_tokens` and, if all prices
            are known, `usage/dollars` and the dollars of the whole run, `usage/dollars_total`.
        """
        if not self.judges:
            return {}
        before, now = self._before, self._sums()
        self._before = now
        metrics = {f"usage/{name}": now[name] - before[name] for name in _COUNTS}
        if self._priced:
            metrics["usage/dollars"] = now["dollars_total"] - before["dollars_total"]
            metrics["usage/dollars_total"] = now["dollars_total"]
        return metrics

    def sentences(self) -> list[str]:
        """Return a sentence on the usage and cost of each judge; a collective."""
        lines = []
        for judge in self.judges:
            usage = judge.usage()
            cost = f"; ${usage['dollars_total']:,.4f} in the whole run" if judge.priced else ""
            lines.append(
                f"The judge {judge.name} gave {usage['answers']:,.0f} answers: "
                f"{usage['prompt_tokens']:,.0f} tokens in, {usage['completion_tokens']:,.0f} "
                f"out{cost}."
            )
        return lines

    def _sums(self) -> dict[str, float]:
        usages = [judge.usage() for judge in self.judges]
        return {n: sum(usage[n] for usage in usages) for n in (*_COUNTS, "dollars_total")}

    @property
    def _priced(self) -> bool:
        return all(judge.priced for judge in self.judges)


def _at_endpoints(judge: Judge) -> "Iterator[EndpointJudge]":
    """Yield a judge if it is at an endpoint, and those that it combines."""
    if isinstance(judge, CombinedJudge):
        for part in judge.judges.values():
            yield from _at_endpoints(part)
    elif hasattr(judge, "usage"):
        yield judge  # type: ignore[misc]  # EndpointJudge, whose module needs httpx
