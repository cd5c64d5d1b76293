"""Model card of a published folder: README.md with the front matter that model hubs read."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import to_settings
from megatron_ext.hf.recalibrate import CALIBRATION
from megatron_ext.hf.sources import UPDATES, Source
from megatron_ext.model_location import read_json_object

CARD = "README.md"

# Settings of training on the card, in addition to those that build the model.
_TRAINING = (
    "train_iters", "train_samples", "seq_length", "micro_batch_size", "global_batch_size",
    "optimizer", "lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters",
    "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "seed", "bf16", "fp16",
    "et_warmup_iters", "et_cutoff_pool", "et_capacity_factor",
)  # fmt: skip


@dataclass(frozen=True)
class FanOut:
    """Fan-out of a model's tokens on a text.

    Attributes:
        counts: Number of tokens by fan-out, `[layers, experts + 1]`.
        layers: Numbers of the layers with experts, counted from 0.
        loss: Mean loss on the same text in nats per token.
        text: Names of the files of the text.
    """

    counts: NDArray[np.int64]
    layers: list[int]
    loss: float
    text: list[str]

    @property
    def tokens(self) -> int:
        """Number of tokens of the text."""
        return int(self.counts[0].sum())

    @property
    def largest(self) -> int:
        """Largest fan-out of any token in any layer."""
        return int(np.flatnonzero(self.counts.sum(axis=0))[-1])

    def means(self) -> NDArray[np.float64]:
        """Return the mean fan-out of each layer, `[layers]`."""
        means: NDArray[np.float64] = self.counts @ np.arange(self.counts.shape[1]) / self.tokens
        return means


@dataclass(frozen=True)
class CardFacts:
    """Everything that a model card states.

    Attributes:
        name: Name of the model.
        source: The model as it was opened.
        step: Step of its training, if known.
        metrics: Losses that the run measured at this step, by name.
        fan_out: Fan-out on a text; None for a model without thresholds.
        max_fan_out: Cap on fan-out in config.json.
        core: Results of tools.eval_core; None if it did not run.
        license: License identifier for the hub.
        datasets: Identifiers of datasets on the hub.
    """

    name: str
    source: Source
    step: int | None
    metrics: tuple[tuple[str, float], ...] = ()
    fan_out: FanOut | None = None
    max_fan_out: int | None = None
    core: dict[str, Any] | None = None
    license: str | None = None
    datasets: list[str] = field(default_factory=list)


def model_card(facts: CardFacts) -> str:
    """Return the text of a model card."""
    sections = [
        _front_matter(facts),
        _introduction(facts),
        _use(facts),
        _training(facts.source, facts.step),
        _results(facts),
    ]
    if facts.fan_out is not None:
        sections.append(_routing(facts, facts.fan_out))
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    entries: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.license:
        entries["license"] = facts.license
    if facts.datasets:
        entries["datasets"] = facts.datasets
    tags = ["megatron-et"]
    if facts.source.model.router is not None:
        tags.append("mixture-of-experts")
    if facts.source.model.thresholds:
        tags.append("expert-threshold")
    return f"---\n{yaml.safe_dump(entries | {'tags': tags}, sort_keys=False)}---"


def _introduction(facts: CardFacts) -> str:
    model = facts.source.model
    total, active = parameters(facts.source, facts.fan_out)
    size = f"{total:,} parameters"
    if active != total:
        size += f", {active:,.0f} of which are used for a token on average"
    lines = [f"# {facts.name}", ""]
    if model.thresholds:
        lines.append(
            f"A language model with {model.experts} routed experts in "
            f"{sum(model.moe_layers)} of {model.layers} layers, routed by thresholds (Expert "
            "Threshold, [arXiv 2603.11535](https://arxiv.org/abs/2603.11535)): an expert takes a "
            "token if the token's router logit exceeds the expert's threshold, independently of "
            "all other tokens. So the number of experts differs from token to token."
        )
    else:
        lines.append(f"A language model of the architecture {facts.source.family.name}.")
    lines.append(f"It has {size} ({_plain(facts.source.dtype)}), and a context of "
                 f"{model.max_length:,} tokens.")  # fmt: skip
    return "\n".join(lines)


def _use(facts: CardFacts) -> str:
    trust = ", trust_remote_code=True" if facts.source.model.thresholds else ""
    lines = [
        "## Use", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
        'prompt = tokenizer("The city of", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))",
        "```", "",
    ]  # fmt: skip
    if facts.source.model.hybrid:
        lines.append("vLLM does not serve it, because it has Gated DeltaNet layers.")
    elif facts.source.model.thresholds:
        lines.append(
            "`vllm serve FOLDER` serves it with the plug-in of megatron-et, or without the plug-in "
            "through vLLM's Transformers back end (`--trust-remote-code --enforce-eager`)."
        )
    else:
        lines.append("`vllm serve FOLDER` serves it.")
    return "\n".join(lines)


def _training(source: Source, step: int | None) -> str:
    settings = to_settings(source.model)
    lines = ["## Training", ""]
    if source.args is None:
        lines.append("The folder that was published does not state how the model was trained. Its "
                     "architecture, as settings of `pretrain_et.py`:")  # fmt: skip
    else:
        args = source.args
        settings |= {
            name: value for name in _TRAINING if (value := getattr(args, name, None)) is not None
        }
        data = ", ".join(training_data(args)) or "not recorded"
        samples = getattr(args, "consumed_train_samples", 0) or 0
        tokens = samples * (getattr(args, "seq_length", 0) or 0)
        length = f"{step:,} steps" if step else "an unknown number of steps"
        if tokens:
            length += f", {tokens:,} tokens"
        lines.append(f"Data: {data}. The model was trained for {length}, with these settings of "
                     "`pretrain_et.py`:")  # fmt: skip
    plain = {name: _plain(value) for name, value in settings.items()}
    return "\n".join([*lines, "", "```yaml", yaml.safe_dump(plain, sort_keys=False) + "```"])


def _results(facts: CardFacts) -> str:
    unit = ", nats per token"
    rows = [
        (f"{name}{unit if name.endswith('loss') else ''}", f"{value:.4f}")
        for name, value in facts.metrics
    ]
    if facts.fan_out is not None:
        rows.append((f"loss on {', '.join(facts.fan_out.text)}{unit}",
                     f"{facts.fan_out.loss:.4f}"))  # fmt: skip
    lines = ["## Results", ""]
    lines += _table(("measure", "value"), rows) if rows else ["No loss was measured."]
    if facts.core is not None:
        from megatron_ext.evaluation.core.core_results import markdown

        table = markdown(facts.core).strip()
        lines += ["", "CORE benchmark (DCLM), by tools.eval_core:", "", table]
    return "\n".join(lines)


def _routing(facts: CardFacts, fan_out: FanOut) -> str:
    text = ", ".join(fan_out.text)
    shares = fan_out.counts.sum(axis=0) / fan_out.counts.sum()
    histogram = [
        (str(number), f"{share:.4%}") for number, share in enumerate(shares[: fan_out.largest + 1])
    ]
    layers = [
        (
            str(layer),
            f"{mean:.3f}",
            f"{counts[0] / fan_out.tokens:.2%}",
            str(int(np.flatnonzero(counts)[-1])),
        )
        for layer, mean, counts in zip(fan_out.layers, fan_out.means(), fan_out.counts, strict=True)
    ]
    return "\n".join(
        [
            "## Routing",
            "",
            f"Thresholds: {calibration_of(facts.source)}",
            "",
            f"Fan-out on {fan_out.tokens:,} tokens of {text}, all layers together:",
            "",
            *_table(("routed experts", "share of tokens"), histogram),
            "",
            *_table(
                ("layer, from 0", "mean fan-out", "tokens without an expert", "largest"), layers
            ),
            "",
            f"`max_fan_out` in config.json is {facts.max_fan_out}. On a GPU, a vLLM server with "
            "the plug-in is written to reserve memory for this mean fan-out of a batch and to end "
            "with an error on a batch above it, which has not been run. On a CPU such a batch is "
            "a warning. Without the entry, memory for every expert is reserved, which is enough.",
        ]
    )


def calibration_of(source: Source) -> str:
    """Return a sentence on how the thresholds of a model were set."""
    file = source.place.parent / CALIBRATION
    report = read_json_object(file) if source.args is not None else {}
    if after := report.get("after"):
        tokens, names = report.get("calibrated_tokens"), report.get("data")
        text = "a text" if not names else ", ".join(names)
        amount = "" if tokens is None else f" on {tokens:,} tokens of {text}"
        return (
            f"exact cutoffs by tools.calibrate_thresholds{amount}. On {after['tokens']:,} held-out "
            f"tokens the loss was {after['loss']:.4f} nats per token."
        )
    updates = max(
        int(source.tensors.read(name)) for name in source.tensors.shapes if name.endswith(UPDATES)
    )
    return (
        "moving average of the exact cutoffs of each expert over the tokens of a training step, "
        f"after {updates:,} updates with decay {source.model.ema_decay}."
    )


def check_calibrated(source: Source) -> None:
    """Check that the thresholds of every layer have values.

    Raises:
        UserError: Those of a layer were never updated.
    """
    for name in source.tensors.shapes:
        if name.endswith(UPDATES) and not int(source.tensors.read(name)):
            raise UserError(
                f"The thresholds of {source.place} have no value yet ({name} is 0). Train the "
                "model for at least one step, or set them with tools.calibrate_thresholds."
            )


def read_core(file: Path, source: Source) -> dict[str, Any]:
    """Return the results of CORE for a model.

    Args:
        file: core.json of tools.eval_core.
        source: The model.

    Raises:
        UserError: The file is missing or damaged, or has the results of another model.
    """
    core = read_json_object(file)
    if not core.get("tasks"):
        raise UserError(
            f"--core {file} has no results. Give the core.json that tools.eval_core wrote."
        )
    if core.get("model") != str(source.place.resolve()):
        raise UserError(
            f"--core {file} has the results of {core.get('model')}, not of {source.place}. "
            "Evaluate this checkpoint with tools.eval_core."
        )
    return core


def training_data(args: Namespace) -> list[str]:
    """Return the names of the datasets of a run, without their folders."""
    if getattr(args, "mock_data", False):
        return ["mock data of Megatron"]
    words = getattr(args, "train_data_path", None) or getattr(args, "data_path", None) or []
    return list(dict.fromkeys(Path(word).name for word in words if not _is_number(word)))


def parameters(source: Source, fan_out: FanOut | None) -> tuple[int, float]:
    """Return the number of parameters, and the mean number that a token uses."""
    total = routed = 0
    for name, shape in source.tensors.shapes.items():
        if ".gate.threshold" in name:
            continue
        size = int(np.prod(shape, dtype=np.int64))
        total += size
        routed += size if ".experts." in name else 0
    if source.model.router is None:
        return total, total
    used = float(fan_out.means().mean()) if fan_out is not None else source.model.topk
    return total, total - routed * (1 - used / source.model.experts)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _plain(value: Any) -> Any:
    """Return a setting as a value of YAML."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value).removeprefix("torch.")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
