"""Commands of the study, in phases whose steps do not depend on each other."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.alignment.steps import align, step, training
from examples.quickstart.corpus import Corpus
from examples.quickstart.steps import Step, module
from examples.quickstart.training import RECIPES, TrainingProgress
from examples.quickstart.training import training as pretraining
from megatron_ext.errors import UserError

HERE = Path(__file__).parent
TEMPLATE = HERE / "pointwise-brief.txt"
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}<s>{{ m.content }}\n{% endif %}{% endfor %}"
)
JUDGES = {"label": "judge of labels", "reasoning": "judge that thinks", "gold": "gold itself"}
_PARTS = ("train", "validation", "test")
_SECTIONS = {
    "name", "recipe", "base", "splits", "start", "generate", "labels", "judge", "label",
    "reasoning", "rl", "thinking", "policy",
}  # fmt: skip


def read_settings(file: Path) -> Mapping[str, Any]:
    """Return the settings in the file of a study.

    Raises:
        UserError: The file cannot be read, lacks a section or has an unknown one.
    """
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"The study {file} cannot be read: {error}") from error
    if not isinstance(settings, dict) or set(settings) != _SECTIONS:
        sections = set(settings) if isinstance(settings, dict) else set()
        wrong = sorted(sections ^ _SECTIONS)
        raise UserError(
            f"{file} must have the sections {', '.join(sorted(_SECTIONS))}. Correct "
            f"{', '.join(wrong)}."
        )
    for name in sorted(_SECTIONS - {"name", "recipe"}):
        if not isinstance(settings[name], dict):
            raise UserError(f"{file}: {name} must be a mapping, not {settings[name]!r}.")
    if "seq_length" not in settings["judge"]:
        raise UserError(
            f"{file}: judge must have seq_length, which policies use for it too. Add it."
        )
    return settings


class StudyPlan:
    """Steps of a study, in phases.

    Args:
        output: Folder of the study.
        settings: Settings of the study's file.
        ranks: Number of ranks of the trainings that all seeds share.
        on_gpus: Whether the trainings run on GPUs.
        quickstart: Folder of a finished quickstart, whose text and model are used.
        judges_of: Seed whose judges the policies of all seeds share. Default: none; each has
            its own.
        judges: Judges that policies are trained on, of `JUDGES`.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        ranks: int,
        on_gpus: bool,
        quickstart: Path | None = None,
        judges_of: int | None = None,
        judges: Sequence[str] = tuple(JUDGES),
    ) -> None:
        self.output, self.settings, self.ranks, self.on_gpus = output, settings, ranks, on_gpus
        self.quickstart, self.judges_of, self.judges = quickstart, judges_of, judges
        self.trained = [name for name in ("reasoning", "label") if name in judges]
        self.corpus = Corpus((quickstart or output) / "data")
        self.base = quickstart or output / "base"
        self.chat = output / "chat.jinja"
        self.start = output / "start" / "best"
        self.prompts = output / "prompts"

    def phases(self, seeds: Sequence[int]) -> Iterator[list[Step]]:
        """Yield the phases of the seeds.

        Run each before the next one is taken: its steps depend on files of earlier phases.
        """
        own = seeds if self.judges_of is None else [self.judges_of]
        yield [self._sampling(seed) for seed in own]
        yield [self._labels(seed) for seed in own]
        yield [self._gold(seed, part) for seed in own for part in _PARTS]
        yield [self._judge(seed, name) for name in self.trained for seed in own]
        yield [self._reinforcement(seed) for seed in own if "reasoning" in self.trained]
        yield [self._verdicts(seed, name) for seed in own for name in self.trained]
        yield [self._agreement(seed, name) for seed in own for name in self.trained]
        yield [self._policy(seed, name) for seed in seeds for name in self.judges]

    def shared(self) -> list[Step]:
        """Return the steps of the text, the pretrained model, the prompts and the start policy."""
        log, base = self.output / "study.log", self.base
        splits, sizes = self.output / "splits", self.settings["splits"]
        names = [*sizes, "start"]
        return [
            *([] if self.quickstart else [*self.corpus.steps(log), self._pretraining()]),
            self._step(
                "passages", "pairs of adjacent sentences",
                module(
                    "examples.alignment.study.passages", "--text", self.corpus.text,
                    "--output", self.output / "passages.jsonl",
                ),
                log, [self.output / "passages.jsonl"],
                [self.corpus.text, HERE / "passages.py"],
            ),
            self._step(
                "splits", "prompts for grading, policies, judges and the start policy",
                align(
                    "data", "split", "--input", self.output / "passages.jsonl", "--save", splits,
                    "--overwrite", "--split", *(f"{n}={size}" for n, size in sizes.items()),
                    "start=rest",
                ),
                log, [splits / f"{name}.jsonl" for name in names],
                [self.output / "passages.jsonl"],
            ),
            *(
                self._step(
                    f"prompts-{name}", "prompts alone",
                    align(
                        "data", "import", "--input", splits / f"{name}.jsonl", "--as", "prompts",
                        "--output", self.prompts / f"{name}.jsonl", "--overwrite",
                    ),
                    log, [self.prompts / f"{name}.jsonl"], [splits / f"{name}.jsonl"],
                )
                for name in sizes
            ),
            self._training(
                "start", "a model that answers", self.output / "start",
                align(
                    "train-sft", "--model", base, "--input", splits / "start.jsonl",
                    "--validation-input", splits / "held_out.jsonl", *self._flags_of("start"),
                ),
                "best",
                [base / "metrics.jsonl", splits / "start.jsonl", splits / "held_out.jsonl"],
                ranks=self.ranks,
            ),
        ]  # fmt: skip

    def _pretraining(self) -> Step:
        recipe = RECIPES / f"{self.settings['recipe']}.yaml"
        self.base.mkdir(exist_ok=True)
        flags = ["--expert-model-parallel-size", str(self.ranks), *_flags(self.settings["base"])]
        iters = self.settings["base"].get("train_iters")
        steps = iters or yaml.safe_load(recipe.read_text())["train_iters"]
        return pretraining(
            "base", f"{steps:,} steps", self.base, self.corpus, flags, [recipe],
            ranks=self.ranks, on_gpus=self.on_gpus,
            progress=TrainingProgress(self.base / "metrics.jsonl", steps),
        )  # fmt: skip

    def report(self, seeds: Sequence[int]) -> list[Step]:
        """Return the step that writes the report on all seeds."""
        runs = [
            {"folder": f"{name}-seed{seed}", "policy": "start", "judge": facts, "seed": seed}
            for name, facts in JUDGES.items()
            if name in self.judges
            for seed in seeds
        ]
        file = self.output / "study.json"
        file.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
        depends = [self.output / str(run["folder"]) / "metrics.jsonl" for run in runs]
        output = self.output / "report.txt"
        return [
            self._step(
                "report", "drawing", align("report", self.output), self.output / "study.log",
                [output, self.output / "report" / "report.html"], [file, *depends], output=output,
            )
        ]  # fmt: skip

    def _sampling(self, seed: int) -> Step:
        file = self._folder(seed) / "start_responses.jsonl"
        return self._step(
            f"generate-seed{seed}", "responses of the start policy",
            align(
                "generate", "--model", self.start, "--input", self.prompts / "judge.jsonl",
                "--output", file, "--overwrite", "--source", "start", "--seed", seed,
                *self._flags_of("generate"),
            ),
            self._folder(seed) / "study.log", [file],
            [*_weights(self.start), self.prompts / "judge.jsonl"],
        )  # fmt: skip

    def _labels(self, seed: int) -> Step:
        real = self.output / "splits" / "judge.jsonl"
        start = self._folder(seed) / "start_responses.jsonl"
        responses = self._folder(seed) / "responses"
        return self._step(
            f"labels-seed{seed}", "selecting responses for gold",
            module(
                "examples.alignment.study.labels", "--real", real, "--start-responses", start,
                "--save", responses, "--seed", str(seed), *_flags(self.settings["labels"]),
            ),
            self._folder(seed) / "study.log", [responses / f"{part}.jsonl" for part in _PARTS],
            [real, start, HERE / "labels.py"],
        )  # fmt: skip

    def _gold(self, seed: int, part: str) -> Step:
        responses, verdicts = self._items(seed, part)
        return self._step(
            f"gold-{part}-seed{seed}", "gold's verdicts",
            align(
                "annotate", "--judge", "rule", "--rule-text", self.corpus.text,
                "--input", responses, "--output", verdicts, "--overwrite",
            ),
            self._folder(seed) / "study.log", [verdicts], [responses, self.corpus.text],
        )  # fmt: skip

    def _judge(self, seed: int, name: str) -> Step:
        thinks = ["--thinking", "asked"] if name == "reasoning" else []
        return self._judge_training(seed, name, "sft", self.start, [*thinks, *self._flags_of(name)])

    def _reinforcement(self, seed: int) -> Step:
        start = self._folder(seed) / "judges" / "reasoning" / "best"
        flags = ["--thinking", "asked", *self._flags_of("rl")]
        return self._judge_training(seed, "rl", "rl", start, flags)

    def _judge_training(
        self, seed: int, name: str, stage: str, model: Path, flags: Sequence[str]
    ) -> Step:
        train, validation = self._items(seed, "train"), self._items(seed, "validation")
        run = self._folder(seed) / "judges" / name
        return self._training(
            f"{name}-judge-seed{seed}", f"a judge, stage {stage}", run,
            align(
                "train-judge", "--stage", stage, "--model", model, "--template", TEMPLATE,
                "--input", train[0], "--gold", train[1], "--validation-input", validation[0],
                "--validation-gold", validation[1], "--seed", seed,
                *_flags(self.settings["judge"]), *flags,
            ),
            "best", [*train, *validation, *_weights(model), TEMPLATE],
        )  # fmt: skip

    def _verdicts(self, seed: int, name: str) -> Step:
        responses, _ = self._items(seed, "test")
        model, file = self._model(seed, name), self._folder(seed) / f"{name}.verdicts.jsonl"
        length = self.settings["judge"]["seq_length"]
        words: list[object] = ["--seq-length", length]
        if name == "reasoning":
            words += ["--thinking", "asked"]
            for flag, value in self.settings["thinking"].items():
                prefix = "" if flag == "max_new_tokens" else "judging-"
                words += [f"--{prefix}{flag.replace('_', '-')}", value]
        return self._step(
            f"{name}-verdicts-seed{seed}", "the judge on test responses",
            align(
                "judge", "--model", model, "--template", TEMPLATE, "--chat-template", self.chat,
                "--input", responses, "--output", file, "--overwrite", *words,
                "--max-failed", "1",  # the agreement reports the number of failures
            ),
            self._folder(seed) / "study.log", [file], [responses, *_weights(model), TEMPLATE],
        )  # fmt: skip

    def _agreement(self, seed: int, name: str) -> Step:
        responses, gold = self._items(seed, "test")
        file, folder = (
            self._folder(seed) / f"{name}.verdicts.jsonl",
            self._folder(seed) / f"{name}.agreement",
        )
        return self._step(
            f"{name}-agreement-seed{seed}", "agreement of the judge with gold",
            align(
                "agreement", gold, file, "--items", responses, "--resample", "prompt",
                "--slice", "source", "--output", folder,
            ),
            self._folder(seed) / "study.log", [folder / "agreement.json"], [gold, file, responses],
        )  # fmt: skip

    def _policy(self, seed: int, name: str) -> Step:
        run = self.output / f"{name}-seed{seed}"
        gold = {"kind": "rule", "rule_text": str(self.corpus.text)}
        files = self._folder(seed) / "policies"
        _yaml(files / "gold.yaml", gold)
        _yaml(files / "no-copying.yaml", {**gold, "rule": "no-copying"})
        depends = [self.corpus.text, *(self.prompts / f"{n}.jsonl" for n in ("policy", "held_out"))]
        if name in self.trained:
            source = seed if self.judges_of is None else self.judges_of
            model, folder = self._model(source, name), self._folder(source) / f"{name}.agreement"
            judge: dict[str, Any] = {
                "kind": "local", "model": str(model), "template": str(TEMPLATE),
                "chat_template": str(self.chat), "length": self.settings["judge"]["seq_length"],
                "agreement": str(folder / "agreement.json"),
            }  # fmt: skip
            if name == "reasoning":
                judge |= {"thinking": "asked", **self.settings["thinking"]}
            _yaml(files / f"{name}.yaml", judge)
            depends += [*_weights(model), folder / "agreement.json"]
        return self._training(
            f"{name}-seed{seed}", f"a policy against {JUDGES[name]}", run,
            align(
                "train-policy", "--model", self.start, "--judge", files / f"{name}.yaml",
                "--prompts", self.prompts / "policy.jsonl",
                "--held-out", self.prompts / "held_out.jsonl", "--gold", files / "gold.yaml",
                "--second-gold", files / "no-copying.yaml", "--seed", seed,
                *self._flags_of("policy"),
            ),
            "final", [*depends, *_weights(self.start)], metric="reward",
        )  # fmt: skip

    def _folder(self, seed: int) -> Path:
        folder = self.output / f"seed{seed}"
        folder.mkdir(exist_ok=True)
        return folder

    def _items(self, seed: int, part: str) -> tuple[Path, Path]:
        """Return the files of responses and of the gold judge's verdicts on them."""
        of = self._folder(seed)
        return of / "responses" / f"{part}.jsonl", of / "gold" / f"{part}.jsonl"

    def _model(self, seed: int, judge: str) -> Path:
        run = "rl" if judge == "reasoning" else judge
        return self._folder(seed) / "judges" / run / "best"

    def _flags_of(self, section: str) -> list[str]:
        return [*_flags(self.settings[section]), "--chat-template", str(self.chat)]

    def _step(
        self,
        name: str,
        about: str,
        command: Sequence[str],
        log: Path,
        makes: Sequence[Path],
        depends: Sequence[Path],
        output: Path | None = None,
    ) -> Step:
        return step(name, about, command, log, makes, depends, on_gpus=self.on_gpus, output=output)

    def _training(
        self,
        name: str,
        about: str,
        run: Path,
        command: Sequence[str],
        makes: str,
        depends: Sequence[Path],
        ranks: int = 1,
        metric: str = "loss",
    ) -> Step:
        return training(
            name, about, command, run, makes, depends,
            ranks=ranks, on_gpus=self.on_gpus, metric=metric,
        )  # fmt: skip


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line: `{lr: 1}` as `--lr 1`."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _weights(model: Path) -> list[Path]:
    return [model / "model.safetensors.index.json", *sorted(model.glob("*.safetensors"))]


def _yaml(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False))
    temporary.replace(file)
