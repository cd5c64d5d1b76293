"""What policies are compared on: their responses, and each one's against the baseline's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data.dataset_schemas import hash_id
from alignment.record_files import read_all
from alignment.records import Pair, Prompt, Response
from megatron_ext.errors import UserError

Answers = dict[str, list[Response]]  # by the prompt's id


@dataclass(frozen=True)
class PolicyComparison:
    """Policies that answered the same prompts.

    Attributes:
        policies: by name, the baseline first.
        prompts: ids.
        responses: of all policies to all prompts.
        pairs: a policy's response first and the baseline's second; their source is the policy.
    """

    policies: Sequence[str]
    prompts: Sequence[str]
    responses: Sequence[Response]
    pairs: Sequence[Pair]

    @property
    def baseline(self) -> str:
        return self.policies[0]


def read_comparison(files: Sequence[str], baseline: str, common: bool) -> PolicyComparison:
    """The contest of some files of responses.

    Args:
        files: of one policy each.
        baseline: one of them.
        common: whether prompts that only some policies answered may be left out.

    Raises:
        UserError: a file holds responses of several policies, policies answered different prompts,
            or two responses have one id.
    """
    if baseline not in files:
        raise UserError(f"--baseline {baseline} must be one of the files of --responses")
    if len(set(files)) < len(files):
        raise UserError("--responses names a file twice: give each policy's once")
    answers: dict[str, Answers] = {}
    for file in [baseline, *(file for file in files if file != baseline)]:
        name, of = _read_responses(Path(file))
        if name in answers:
            raise UserError(
                f"{file} is from {name!r}, like another file of --responses. Correct a source."
            )
        answers[name] = of
    prompts = _shared(answers, common)
    responses = [r for of in answers.values() for prompt in prompts for r in of[prompt]]
    _check(responses)
    first, *others = answers
    pairs = [
        _pair(name, mine, answers[first][prompt][place % len(answers[first][prompt])])
        for name in others
        for prompt in prompts
        for place, mine in enumerate(answers[name][prompt])
    ]
    return PolicyComparison([first, *others], prompts, responses, pairs)


def _read_responses(file: Path) -> tuple[str, Answers]:
    """A policy's name and responses."""
    rows = read_all(file, Response)
    sources = sorted({row.source for row in rows})
    if len(sources) > 1:
        raise UserError(
            f"{file} has responses of {sources[0]!r} and of {sources[1]!r}: give a file a policy"
        )
    name = sources[0] or file.name.partition(".")[0]
    found: Answers = {}
    for row in rows:
        found.setdefault(row.prompt.id, []).append(replace(row, source=name))
    return name, found


def _shared(answers: Mapping[str, Answers], common: bool) -> list[str]:
    """Prompts that all policies answered, in the baseline's order."""
    first, *others = answers
    shared = [prompt for prompt in answers[first] if all(prompt in answers[o] for o in others)]
    if not shared:
        raise UserError("the files of --responses have no prompt in common")
    for name, of in answers.items():
        if len(of) > len(shared) and not common:
            raise UserError(
                f"{name} answered {len(of) - len(shared)} prompts that another policy did not: "
                f"answer the same ones, or give --common to compare on the {len(shared)} of all"
            )
    return shared


def _check(responses: Sequence[Response]) -> None:
    ids: set[str] = set()
    prompts: dict[str, Prompt] = {}
    for response in responses:
        if response.id in ids:
            raise UserError(
                f"two responses of --responses have the id {response.id!r}, which verdicts could "
                "not tell apart: give them ids of their own"
            )
        ids.add(response.id)
        prompt = prompts.setdefault(response.prompt.id, response.prompt)
        other = response.prompt
        if (prompt.messages, prompt.rubric) != (other.messages, other.rubric):
            raise UserError(
                f"prompt {prompt.id!r} is not the same in all files of --responses: its messages "
                "and its rubric must be"
            )


def _pair(policy: str, mine: Response, theirs: Response) -> Pair:
    name = hash_id("pair", mine.id, theirs.id)
    return Pair(name, mine.prompt, mine.text, theirs.text, source=policy)
