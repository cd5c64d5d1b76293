"""An annotation by a judge at an address, from questions to rows."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from alignment.commands.judge_flags import Options
from alignment.endpoints.answer_store import AnswerStore
from alignment.endpoints.client import Client, Request, Sampling, Stopped, connect
from alignment.endpoints.rate_limits import Pace
from alignment.endpoints.usage import Prices, Used
from alignment.judges.annotation import Asking, Ending, Tally, key_of
from alignment.judges.formats.answers import Answer
from alignment.judges.formats.judge_format import JudgeFormat
from alignment.judges.formats.prompts import judge_prompt
from alignment.judges.questions import Generating, Judging, Question, Task, WritingRubrics
from alignment.judges.results import reasons_of, require_results
from alignment.output_file import Output, counted, outcomes
from alignment.records import Pair, Verdict
from megatron_ext.errors import TooFewResults, UserError
from megatron_ext.progress import Progress


def ask_endpoint(options: Options, asked: Sequence[Question], output: Output) -> int:
    """Ask what has not been answered, and write the rows of all answers; returns the exit code.

    Raises:
        UserError: the run ended early, for a reason that the user can fix; its answers are kept.
        TooFewResults: more questions have no result than --max-failed allows. Where all have been
            asked, the rows are written nevertheless.
    """
    judge, task = _judge(options, pairwise=isinstance(asked[0].item, Pair))
    output.claim(_hash(judge))
    sampling, prices = _sampling(options), Prices(options.price_in, options.price_out)

    def request(question: Question) -> Request:
        return Request(
            options.model, task.messages(question), sampling, options.revision, question.sample,
            options.expected_score,
        )  # fmt: skip

    keys = [key_of(request(question)) for question in asked]
    by_key = dict(zip(keys, asked))
    cache = Path(options.cache or f"{options.output}.answers.jsonl")
    begin = time.monotonic()
    with AnswerStore(cache) as store:
        if store.mended:
            print(f"{cache}: took away the last line, which a killed run had not finished")
        before = {key: Answer.from_row(store[key]) for key in by_key if key in store}
        if isinstance(task, Judging):
            # Without log-probabilities it is the server that is to be fixed, and asked again.
            before = {key: a for key, a in before.items() if not task.lacks_log_probs(a)}
        todo = [key for key in by_key if key not in before]
        lacking = {key: why for key, a in before.items() if (why := task.lack(by_key[key], a))}
        print(f"{len(by_key):,} questions, {len(before):,} answered before", flush=True)
        try:
            tally = asyncio.run(
                _ask(
                    options, todo, len(before), lacking, store, prices,
                    lambda key: request(by_key[key]),
                    lambda key, answer: task.note(by_key[key], answer),
                    lambda key, answer: task.lack(by_key[key], answer),
                )
            )  # fmt: skip
        except Stopped as stopped:
            kept = sum(key in store for key in by_key)
            print(f"stopped: repeat the command to resume, with {kept:,} answers kept", flush=True)
            return 128 + int(stopped.args[0])
        answers = {key: Answer.from_row(store[key]) for key in by_key if key in store}
    failed = tally.failed
    made = [
        task.record(question, answers.get(key), failed.get(key, ""))
        for key, question in zip(keys, asked)
    ]
    records = [record for record in made if record is not None]
    used = sum(map(Used.of, answers.values()), Used())
    models = Counter(answer.model for answer in answers.values() if answer.model)
    told: dict[str, Any] = {"judge": judge, "used": used.to_json(prices), "models": dict(models)}
    said = f"{len(records):,} {'prompts with rubrics' if options.rubrics else 'responses'}"
    if not (options.generate or options.rubrics):
        told["outcomes"], said = counted(records), outcomes(records)
    output.write(records, told)
    print(
        f"{said}; {used.told(prices)}; now asked {tally.used.answers:,}: "
        f"{tally.used.told(prices)}, {time.monotonic() - begin:.1f} s; wrote {output.path}"
    )
    if failed:
        print(f"{len(failed):,} calls failed: the same command asks these again")
    lack = {"verdict": reasons_of(r for r in records if isinstance(r, Verdict))}
    if options.generate or options.rubrics:
        of_key = {key: task.lack(by_key[key], answer) for key, answer in answers.items()} | failed
        lack = {"rubric" if options.rubrics else "response": [r for k in keys if (r := of_key[k])]}
    for name, reasons in lack.items():
        require_results(reasons, len(asked), options.max_failed, lack=name)
    return 0


def _judge(options: Options, pairwise: bool) -> tuple[dict[str, Any], Task]:
    """All that the answers and their reading depend on, and what is done."""
    judge: dict[str, Any] = {
        "model": options.model,
        "revision": options.revision,
        "sampling": asdict(_sampling(options)),
    }
    if options.rubrics:
        template = judge_prompt("rubric")
        judge |= {"form": template.identity}
        return judge, WritingRubrics(template.messages)
    if options.generate:
        return judge, Generating(options.model, _hash(judge))
    judge_format = JudgeFormat.create(pairwise, options.template, options.thinking)
    judge |= {"form": judge_format.identity, "expected_score": options.expected_score}
    return judge, Judging(judge_format, _hash(judge), options.expected_score)


def _sampling(options: Options) -> Sampling:
    return Sampling(
        options.temperature, options.max_tokens, options.top_p, options.top_k,
        options.reasoning_effort, options.seed,
    )  # fmt: skip


def _hash(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


async def _ask(
    options: Options,
    todo: Sequence[str],
    before: int,
    lacking: Mapping[str, str],
    store: AnswerStore,
    prices: Prices,
    request: Callable[[str], Request],
    seen: Callable[[str, Answer], str],
    lack: Callable[[str, Answer], str],
) -> Tally:
    ending = Ending()
    pace = Pace(options.requests_per_minute, options.tokens_per_minute, sleep=ending.sleep)
    async with connect(api_key(options.api_key_variable), options.concurrency) as http:
        with Progress("asking", len(todo), "answers") as progress:
            client = Client(
                options.judge, http, pace, ending.sleep, options.timeout, options.tries,
                options.first_wait, options.max_wait, progress.log,
            )  # fmt: skip
            asking = Asking(
                todo, request, store, client, ending, seen, lack, before, options.concurrency,
                options.max_failed, lambda tally: tally.used.told(prices),
            )  # fmt: skip
            asking.tally.lacking.update(lacking)
            try:
                return await asking.run(progress)
            except TooFewResults:
                if asking.tally.ended < len(todo):
                    raise
                return asking.tally  # every question has an outcome, which is worth a file


def api_key(variable: str) -> str | None:
    """The endpoint's key; a command line can be read by other users."""
    key = os.environ.get(variable)
    if key is not None and (not key.strip() or not key.isascii()):
        raise UserError(f"the key in {variable} is empty or not ASCII")
    return key and key.strip()
