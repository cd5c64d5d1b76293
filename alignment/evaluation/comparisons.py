"""Input of a comparison of policies: their responses, and pairs with those of the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data.read_options import ReadOptions
from alignment.data.source_row import hash_id
from alignment.record_files import read_all
from alignment.records import Pair, Prompt, Response
from megatron_ext.errors import UserError

Answers = dict[str, list[Response]]  # by the prompt's id


@dataclass(frozen=True)
class PolicyComparison:
    """Policies that answered the same prompts.

    Attributes:
        policies: Names of the policies, the baseline first.
        prompts: Ids of the prompts.
        responses: Responses of all policies to all prompts.
        pairs: Pairs of a policy's response (first) and the baseline's (second). Their source is the
            policy.
    """

    policies: Sequence[str]
    prompts: Sequence[str]
    responses: Sequence[Response]
    pairs: Sequence[Pair]

    @property
    def baseline(self) -> str:
        """Name of the baseline."""
        return self.policies[0]


def read_comparison(
    files: Sequence[str], baseline: str, common: bool, options: ReadOptions | None = None
) -> PolicyComparison:
    """Read the responses of policies, and pair them with those of the baseline.

    Args:
        files: Files of responses, one per policy.
        baseline: File of the baseline, which is one of them.
        common: Whether prompts that only some policies answered may be omitted.
        options: How files of other projects are read.

    Raises:
        UserError: A file contains responses of several policies, policies answered different
            prompts, or two responses have the same id.
    """
    if baseline not in files:
        raise UserError(f"--baseline {baseline} must be one of the files of --responses.")
    if len(set(files)) < len(files):
        raise UserError("--responses names a file twice. Name the file of each policy once.")
    answers: dict[str, Answers] = {}
    for file in [baseline, *(file for file in files if file != baseline)]:
        name, by_prompt = _read_responses(Path(file), options)
        if name in answers:
            raise UserError(
                f"{file} is from {name!r}, like another file of --responses. Correct a source."
            )
        answers[name] = by_prompt
    prompts = _shared(answers, common)
    responses = [
        response
        for by_prompt in answers.values()
        for prompt in prompts
        for response in by_prompt[prompt]
    ]
    _check(responses)
    first, *others = answers
    pairs = [
        _pair(name, response, answers[first][prompt][place % len(answers[first][prompt])])
        for name in others
        for prompt in prompts
        for place, response in enumerate(answers[name][prompt])
    ]
    return PolicyComparison([first, *others], prompts, responses, pairs)


def _read_responses(file: Path, options: ReadOptions | None) -> tuple[str, Answers]:
    """Return the name of a policy and its responses by prompt."""
    rows = read_all(file, Response, options=options)
    sources = sorted({row.source for row in rows})
    if len(sources) > 1:
        raise UserError(
            f"{file} has responses of {sources[0]!r} and of {sources[1]!r}. Write the responses of "
            "each policy to a file."
        )
    name = sources[0] or file.name.partition(".")[0]
    by_prompt: Answers = {}
    for row in rows:
        by_prompt.setdefault(row.prompt.id, []).append(replace(row, source=name))
    return name, by_prompt


def _shared(answers: Mapping[str, Answers], common: bool) -> list[str]:
    """Return the prompts that all policies answered, in the order of the baseline."""
    first, *others = answers
    shared = [prompt for prompt in answers[first] if all(prompt in answers[o] for o in others)]
    if not shared:
        raise UserError(
            "The files of --responses have no prompt in common. Use answers to the same prompts."
        )
    for name, by_prompt in answers.items():
        if len(by_prompt) > len(shared) and not common:
            raise UserError(
                f"{name} answered {len(by_prompt) - len(shared)} prompts that another policy did "
                f"not. Answer the same prompts, or use --common to compare on the {len(shared)} "
                "that all answered."
            )
    return shared


def _check(responses: Sequence[Response]) -> None:
    """Check that ids are unique and that a prompt is the same in all files.

    Raises:
        UserError: An id occurs twice, or a prompt differs between files.
    """
    ids: set[str] = set()
    prompts: dict[str, Prompt] = {}
    for response in responses:
        if response.id in ids:
            raise UserError(
                f"two responses of --responses have the id {response.id!r}, so that verdicts could "
                "not distinguish them. Give them different ids."
            )
        ids.add(response.id)
        prompt = prompts.setdefault(response.prompt.id, response.prompt)
        other = response.prompt
        if (prompt.messages, prompt.rubric) != (other.messages, other.rubric):
            raise UserError(
                f"prompt {prompt.id!r} differs between files of --responses. Its messages and its "
                "rubric must be the same in all of them."
            )


def _pair(policy: str, response: Response, baseline: Response) -> Pair:
    name = hash_id("pair", response.id, baseline.id)
    return Pair(name, response.prompt, response.text, baseline.text, source=policy)
