"""Judges of a policy in training, each described by a small YAML file.

    kind: local          # a model on the ranks of the policy, with its layout
    model: runs/judge/best
    template: pointwise
    thinking: asked

A judge is one of four kinds: `local`, `endpoint` (an OpenAI-compatible address), `rule`, or
`function` of a Python file. Ranks make the same calls, each with questions of its own.
"""

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import yaml

from alignment.data.tokenizers import load_tokenizer
from alignment.engines.protocol import Engine
from alignment.judges.annotate import rule_judge
from alignment.judges.asking import key_of
from alignment.judges.client import Answer, CallFailed, Client, Request, connect
from alignment.judges.client import Sampling as EndpointSampling
from alignment.judges.endpoint import api_key
from alignment.judges.flags import KEY
from alignment.judges.form import form_for
from alignment.judges.form_flags import held_identity
from alignment.judges.function_judge import FunctionJudge
from alignment.judges.local import JudgeForm, LocalJudge
from alignment.judges.pacing import Pace
from alignment.judges.parsing import Parser
from alignment.judges.prompting import judge_prompt
from alignment.judges.questions import Judging, Question
from alignment.judges.rule_judge import RuleJudge
from alignment.judges.store import AnswerStore
from alignment.ranks import shares_of, speaks_for_share
from alignment.records import Prompt, Verdict
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling

Check = Callable[[], None]


class Judge(Protocol):
    """Gives verdicts; a collective of all ranks, each with questions of its own.

    Attributes:
        identity: a hash of all that a verdict depends on.
    """

    identity: str

    def judge(self, questions: Sequence[Question], check: Check = ...) -> list[Verdict]:
        """Verdicts on the questions, in their order; `check` may raise on all ranks."""
        ...


@dataclass(frozen=True)
class JudgeSpec:
    """What a file says of a judge.

    Attributes:
        kind: "local", "endpoint", "rule" or "function".
        model: local: a folder; endpoint: the name that it serves.
        url: of an endpoint, up to and with /v1.
        rule, rule_text: see `et-align annotate`.
        function: FILE.py:NAME, which takes a Response and gives a score, or None where it has none.
        template, thinking: what it is asked, and whether it thinks.
        temperature, top_k, top_p, max_new_tokens: of a judge that thinks, or of an endpoint.
        reasoning_effort: of an endpoint that has it: low, medium or high.
        expected_score: of an endpoint: the mean over the labels' probabilities.
        length: the most tokens of a question and its answer, of a local judge.
        rows: questions asked at a time: local, of a rank; endpoint, calls at a time of a rank.
        timeout, tries, first_wait: of a call of an endpoint; waits double up to a minute.
        agreement: agreement.json of the judge with gold, for the report of a study.
    """

    name: str
    kind: str
    model: str = ""
    url: str = ""
    revision: str = ""
    rule: str = "gold"
    rule_text: str | None = None
    function: str = ""
    template: str | None = None
    thinking: str = "none"
    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.95
    max_new_tokens: int = 4096
    reasoning_effort: str | None = None
    expected_score: bool = True
    length: int = 8192
    rows: int = 32
    timeout: float = 600.0
    tries: int = 12
    first_wait: float = 1.0
    agreement: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str) -> "JudgeSpec":
        """A file, or `rule` for the rule of that name with the defaults.

        Raises:
            UserError: it cannot be read, or says something unknown.
        """
        try:
            given = yaml.safe_load(Path(file).read_text())
        except OSError as error:
            raise UserError(f"the judge {file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"the judge {file} is not YAML: {error}") from error
        known = [f.name for f in fields(cls)]
        if not isinstance(given, dict) or "kind" not in given:
            raise UserError(f"the judge {file} must be a mapping with a kind, such as kind: local")
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{file}: {unknown[0]} is not of a judge: known are {', '.join(known)}")
        values: dict[str, Any] = {"name": Path(file).stem, **given}
        spec = cls(**values)
        needs = {
            "local": ["model"],
            "endpoint": ["model", "url"],
            "rule": ["rule_text"],
            "function": ["function"],
        }
        if spec.kind not in needs:
            raise UserError(f"{file}: kind is one of {', '.join(needs)}, not {spec.kind!r}")
        for name in needs[spec.kind]:
            if not getattr(spec, name):
                raise UserError(f"{file}: a judge of kind {spec.kind} needs {name}")
        if spec.thinking not in ("none", "asked", "opened"):
            raise UserError(f"{file}: thinking is none, asked or opened, not {spec.thinking!r}")
        return spec

    def lasting(self) -> dict[str, Any]:
        """What verdicts depend on: not where a server is, nor how it is asked."""
        free = ("name", "url", "rows", "timeout", "tries", "first_wait", "agreement")
        return {name: value for name, value in asdict(self).items() if name not in free}

    def agreed(self) -> dict[str, float | None] | None:
        """Its figures of agreement with gold, by name.

        Raises:
            UserError: the file that they are in cannot be used.
        """
        if self.agreement is None:
            return None
        try:
            figures = json.loads(Path(self.agreement).read_text())["all"]["agreement"]
            return {name: figure["value"] for name, figure in figures.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the judge {self.name} names {self.agreement} as its agreement, which is no "
                f"agreement.json of et-align agreement: {error}"
            ) from error

    def told(self) -> dict[str, Any]:
        """What a reader of a run wants to know."""
        kinds = {"local": "thinking" if self.thinking != "none" else "label", "endpoint": "http"}
        return {"name": self.name, "kind": kinds.get(self.kind, self.kind), **self._provenance()}

    def _provenance(self) -> dict[str, Any]:
        return {"settings": {k: v for k, v in asdict(self).items() if k not in ("name", "kind")}}


def open_judge(
    spec: JudgeSpec,
    pairwise: bool,
    policy: Engine,
    load: Callable[[str], Engine],
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
        return _ProgramJudge(FunctionJudge(spec.function))
    if spec.kind == "endpoint":
        return EndpointJudge(spec, pairwise, policy, store / f"{spec.name}.answers")
    thinks = spec.thinking != "none"
    kind = "pairwise" if pairwise else "pointwise"
    prompt = judge_prompt(spec.template or kind, thinks)
    if prompt.kind != kind:
        raise UserError(
            f"the judge {spec.name} asks by a {prompt.kind} template: give a {kind} one"
        )
    template = Path(spec.chat_template) if spec.chat_template else None
    form = JudgeForm(
        prompt,
        Parser(pairwise, thinks, spec.thinking == "opened"),
        load_tokenizer(Path(spec.model), template),
        spec.chat_template_kwargs,
    )
    sampling = Sampling(
        spec.max_new_tokens,
        spec.temperature or 1.0,
        spec.top_k,
        spec.top_p,
        greedy=spec.temperature == 0,
    )
    about = Namespace(
        model=spec.model,
        max_new_tokens=spec.max_new_tokens,
        judging_temperature=spec.temperature,
        judging_top_k=spec.top_k,
        judging_top_p=spec.top_p,
    )
    identity = held_identity(about, form)
    return LocalJudge(load(spec.model), form, spec.length, sampling, spec.rows, identity)


class _ProgramJudge:
    """A rule or a function."""

    def __init__(self, judge: RuleJudge | FunctionJudge) -> None:
        self._judge, self.identity = judge, judge.identity

    def judge(self, questions: Sequence[Question], check: Check = lambda: None) -> list[Verdict]:
        found = []
        for question in questions:
            assert not isinstance(question.item, Prompt)
            found.append(self._judge.verdict(question.item, question.swapped, question.sample))
        return found


class EndpointJudge:
    """Asks an address. One rank of each share of the data asks, and keeps what was answered."""

    def __init__(self, spec: JudgeSpec, pairwise: bool, policy: Engine, store: Path) -> None:
        """See the class."""
        options = Namespace(template=spec.template, thinking=spec.thinking)
        form = form_for(options, pairwise)
        self._spec, self._policy, self._store = spec, policy, store
        self._sampling = EndpointSampling(
            spec.temperature, spec.max_new_tokens, spec.top_p, spec.top_k, spec.reasoning_effort
        )
        self._expected = spec.expected_score and not pairwise
        depends = [spec.model, spec.revision, asdict(self._sampling), form.identity, self._expected]
        self.identity = sha256(json.dumps(depends).encode()).hexdigest()
        self._task = Judging(form, self.identity, self._expected)
        self._asks = speaks_for_share(policy)

    def judge(self, questions: Sequence[Question], check: Check = lambda: None) -> list[Verdict]:
        """See the protocol. A call that failed in every try is a failed verdict."""
        check()
        rows: list[Any] = []
        problem = None
        if self._asks:
            try:
                rows = [verdict.to_row() for verdict in asyncio.run(self._ask(questions))]
            except UserError as error:  # nothing will ever be answered
                problem = str(error)
        shares = shares_of(self._policy, (rows, problem))
        if told := next((problem for _, problem in shares if problem), None):
            raise UserError(told)
        return [Verdict.from_row(row) for row in shares[self._policy.data_rank][0]]

    async def _ask(self, questions: Sequence[Question]) -> list[Verdict]:
        requests = [
            Request(
                self._spec.model,
                self._task.messages(question),
                self._sampling,
                self._spec.revision,
                question.sample,
                self._expected,
            )
            for question in questions
        ]
        keys = [key_of(request) for request in requests]
        file = self._store / f"share_{self._policy.data_rank:05d}.jsonl"
        failed: dict[str, str] = {}
        with AnswerStore(file) as store:
            todo = {k: r for k, r in zip(keys, requests) if k not in store}
            slots = asyncio.Semaphore(self._spec.rows)
            async with connect(api_key(KEY), self._spec.rows) as http:
                client = Client(
                    self._spec.url.rstrip("/"), http, Pace(None, None),
                    timeout=self._spec.timeout, tries=self._spec.tries,
                    first_wait=self._spec.first_wait,
                )  # fmt: skip

                async def one(key: str, request: Request) -> None:
                    async with slots:
                        try:
                            answer = await client.ask(request)
                        except CallFailed as error:
                            failed[key] = str(error)
                        else:
                            store.add([(key, answer.to_row())])

                async with asyncio.TaskGroup() as tasks:
                    for key, request in todo.items():
                        tasks.create_task(one(key, request))
            return [
                self._task.record(
                    question,
                    Answer.from_row(store[key]) if key in store else None,
                    failed.get(key, ""),
                )
                for question, key in zip(questions, keys)
            ]
