"""Judges of a policy in training, each described by a small YAML file.

    kind: local          # a model on the ranks of the policy, with its layout
    model: runs/judge/best
    template: pointwise
    thinking: asked

A judge is one of four kinds: `local`, `endpoint` (an OpenAI-compatible address), `rule`, or
`function` of a Python file. Ranks make the same calls, each with questions of its own.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from alignment.commands.annotate import rule_judge
from alignment.data.model_tokenizer import load_tokenizer
from alignment.engines.protocol import AlignmentEngine
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.judge_spec import JudgeSpec
from alignment.judges.kinds.endpoint_judge import EndpointJudge
from alignment.judges.kinds.function_judge import FunctionJudge
from alignment.judges.kinds.local_judge import (
    LocalJudge,
    TokenizedJudgeFormat,
    local_judge_identity,
)
from alignment.judges.kinds.rule_judge import RuleJudge
from alignment.judges.questions import Question
from alignment.polling import run_async_while_polling
from alignment.ranks import all_gather_by_data_rank, is_share_leader
from alignment.records import Prompt, Verdict
from alignment.rounding import EXACT, SINGLE
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

Check = Callable[[], None]


class Judge(Protocol):
    """Gives verdicts; a collective of all ranks, each with questions of its own.

    Attributes:
        identity: a hash of all that a verdict depends on.
        rounding_error: relative error of its scores, see `alignment.rounding`; a judge without
            this attribute is taken for a model in fp32.
    """

    identity: str

    def judge(self, questions: Sequence[Question], check: Check = ...) -> list[Verdict]:
        """Verdicts on the questions, in their order; `check` may raise on all ranks."""
        ...


def rounding_error(judges: Sequence[Judge]) -> float:
    """Return the relative error of scores, or of their mean, that judges give."""
    return max((getattr(judge, "rounding_error", SINGLE) for judge in judges), default=SINGLE)


def open_judge(
    spec: JudgeSpec,
    pairwise: bool,
    policy: AlignmentEngine,
    load: Callable[[str], AlignmentEngine],
    store: Path,
) -> Judge:
    """A judge that is ready to be asked.

    Args:
        policy: whose ranks ask it.
        load: makes an engine, not to be trained, of a model's folder.
        store: a folder for answers that were paid for.

    Raises:
        UserError: it cannot be made.
    """
    if spec.kind == "rule":
        return _ProgramJudge(rule_judge(f"rule:{spec.rule}", spec.rule_text))
    if spec.kind == "function":
        if pairwise:
            raise UserError(
                f"the judge {spec.name} is a function, which scores: no pairwise reward"
            )
        return _ProgramJudge(FunctionJudge(spec.function, spec.scale, spec.timeout), policy)
    if spec.kind == "endpoint":
        return EndpointJudge(spec, pairwise, policy, store / f"{spec.name}.answers")
    source = f"the judge {spec.name}: template"
    judge_format = TokenizedJudgeFormat.from_format(
        JudgeFormat.create(pairwise, spec.template, spec.thinking, source),
        load_tokenizer(Path(spec.model), Path(spec.chat_template) if spec.chat_template else None),
        spec.chat_template_kwargs,
    )
    assert spec.top_k is not None and spec.top_p is not None  # of an endpoint alone
    sampling = Sampling(
        spec.max_new_tokens,
        spec.temperature or 1.0,
        spec.top_k,
        spec.top_p,
        greedy=spec.temperature == 0,
    )
    identity = local_judge_identity(spec.model, judge_format, sampling)
    return LocalJudge(load(spec.model), judge_format, spec.length, sampling, spec.rows, identity)


class _ProgramJudge:
    """A rule or a function, whose scores are exact.

    A function is called with one response at a time: no batch can move its score. The same response
    has the same score, and small differences between responses are the function's own.

    A function need not say the same twice: one rank of each share of the data asks it, so that
    ranks that share a model train on the same rewards.
    """

    def __init__(
        self, judge: RuleJudge | FunctionJudge, policy: AlignmentEngine | None = None
    ) -> None:
        """See the class; without a policy every rank asks for itself."""
        self._judge, self._policy, self.identity = judge, policy, judge.identity
        self.rounding_error = EXACT
        self._asks = policy is None or is_share_leader(policy)

    def judge(self, questions: Sequence[Question], check: Check = lambda: None) -> list[Verdict]:
        if self._policy is None:
            return [self._verdict(question) for question in questions]
        found: list[Verdict] | None = None
        problem = None
        try:
            # A function may be slow, and the others hear signals while they wait for it.
            work = partial(self._verdicts, questions) if self._asks else None
            found = run_async_while_polling(work, check)
        except UserError as error:
            problem = str(error)
        rows = [verdict.to_row() for verdict in found or ()]
        shares = all_gather_by_data_rank(self._policy, (rows, problem))
        if message := next((problem for _, problem in shares if problem), None):
            raise UserError(message)
        return [Verdict.from_row(row) for row in shares[self._policy.data_rank][0]]

    async def _verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        return [await asyncio.to_thread(self._verdict, question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        assert not isinstance(question.item, Prompt)
        return self._judge.verdict(question.item, question.swapped, question.sample)
