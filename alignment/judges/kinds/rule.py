"""Judge kind "rule": a deterministic rule that scores features of the text."""

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from alignment.judges.kinds.command_settings import JudgeFlags
from alignment.judges.kinds.judge_kind import JudgeConfig, JudgeContext
from alignment.judges.kinds.program_judge import ProgramJudge
from alignment.judges.kinds.rule_judge import RULES, Fluency, RuleJudge
from megatron_ext.errors import UserError


class RuleJudgeConfig(JudgeConfig):
    """Description of a judge that is a rule.

    Attributes:
        rule: Name of the rule.
        rule_text: File or pattern of the text that counts as fluent: JSONL, Parquet or plain text.
    """

    kind: Literal["rule"] = "rule"
    rule: str = "gold"
    rule_text: Annotated[str, Field(min_length=1)]

    @classmethod
    def from_flag(cls, argument: str, flags: JudgeFlags) -> Self:
        """Return the rule that `--judge rule:NAME` names."""
        if flags.rule_text is None:
            raise UserError(
                "--judge rule measures fluency and needs a text to compare with. Add --rule-text "
                "FILE."
            )
        rule = argument or "gold"
        return cls(name=f"rule:{rule}", rule=rule, rule_text=flags.rule_text)

    def open(self, context: JudgeContext) -> ProgramJudge:
        """Return the judge; every rank computes its own verdicts."""
        return ProgramJudge(load_rule_judge(self.rule, self.rule_text))

    def provenance(self) -> dict[str, Any]:
        """Return the name and the weights of the rule."""
        rule = RULES[self.rule]
        return {"rule": rule.name, "weights": dict(rule.weights)}

    def content_hashes(self) -> dict[str, Any]:
        """Return a hash of the text that counts as fluent."""
        return {"rule_text": load_rule_judge(self.rule, self.rule_text).fluency.digest}


def load_rule_judge(rule: str, rule_text: str) -> RuleJudge:
    """Return the judge of a rule, fitted to a reference text.

    Args:
        rule: Name of the rule.
        rule_text: File or pattern of the texts that count as fluent.

    Raises:
        UserError: If there is no such rule or text.
    """
    if rule not in RULES:
        raise UserError(f"The rule {rule} does not exist. Choose one of {', '.join(RULES)}.")
    from megatron_ext.data.shards import expand_inputs

    paths = expand_inputs([rule_text], "--rule-text")
    states = [(path, os.stat(path)) for path in paths]
    files = tuple((path, state.st_size, state.st_mtime_ns) for path, state in states)
    return RuleJudge(RULES[rule], _fluency(files))


@lru_cache(maxsize=4)  # Cached, because a fit takes seconds and several rules use the same text.
def _fluency(files: tuple[tuple[str, int, int], ...]) -> Fluency:
    """Return the fluency measure of texts, by their paths, sizes and modification times."""
    return Fluency.fit(_texts([path for path, *_ in files]))


def _texts(files: list[str]) -> Iterable[str]:
    """Yield the documents of files, or the lines of plain text."""
    from megatron_ext.data.documents import MalformedRecord, ShardReader
    from megatron_ext.data.shards import TextFormat, plan_shards

    text_format = TextFormat(separator="\n")
    for shard in plan_shards(files, text_format, 1 << 40):
        for text in ShardReader(shard, text_format):
            if not isinstance(text, MalformedRecord):
                yield text
