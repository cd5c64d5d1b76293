"""Measure the loss of a checkpoint on an indexed dataset, with one or several ways of routing.

    python -m tools.validation_loss --load RUN_DIR --data PREFIX --routing et ec tc

The ways of routing are: et, by thresholds, as in evaluation and generation; ec, by expert choice
over pools of --pool-tokens, as in warm-up; et-capacity, by thresholds within the capacity of
training, over the same pools; tc, by token choice with the same number of experts per token. The
gap is the loss minus the loss of the first way of routing. The tool runs with any layout under
torchrun; data-parallel replicas share the data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.data.tokenizer_identity import check_dataset_tokenizer
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.json_numbers import dump_json
from megatron_ext.model_location import announce_model
from megatron_ext.progress import Progress
from megatron_ext.quiet import quiet_megatron, quiet_warnings

if TYPE_CHECKING:
    from megatron_ext.evaluation.losses import Windows
    from megatron_ext.evaluation.models import MegatronModel

_ROUTINGS = ("et", "ec", "tc", "et-capacity")
_COLUMNS = {
    "loss": ("loss", ".4f"),
    "±": ("standard_error", ".4f"),
    "gap": ("gap", "+.4f"),
    "gap ±": ("gap_standard_error", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "nats/byte": ("nats_per_byte", ".4f"),
    "fan-out": ("fan_out", ".3f"),
    "max load": ("max_load", ".3f"),
}


class ValidationLossFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    data: str
    routing: list[str] | None
    pool_tokens: int | None
    seq_length: int | None
    max_sequences: int | None
    out: str | None
    batch_tokens: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _parser().parse_args(argv, ValidationLossFlags())
    check_at_least_one(
        pool_tokens=flags.pool_tokens,
        seq_length=flags.seq_length,
        max_sequences=flags.max_sequences,
        batch_tokens=flags.batch_tokens,
    )
    checkpoint = announce_model(flags.load)
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.evaluation.losses import Windows, summary, window_losses
        from megatron_ext.evaluation.models import MegatronModel
        from megatron_ext.evaluation.routing_modes import RoutingMode, default_routing
        from megatron_ext.inference.loading import load_model

        layout, others = flags.load_model_options()
        model = MegatronModel(load_model(checkpoint, layout, **others))
        names = flags.routing or [default_routing(model.trained.model.config)]
        routings = [RoutingMode(model.trained, name) for name in dict.fromkeys(names)]
        length = _sequence_length(flags.seq_length, model)
        windows = Windows(flags.data, length, flags.max_sequences)
        check_dataset_tokenizer(flags.data, model.trained.args)
        pool = _pool_rows(flags.pool_tokens, length, model)
        text_bytes = None
        if is_first_rank() and model.trained.args.tokenizer_type != "NullTokenizer":
            text_bytes = windows.text_bytes(model.codec)
    rows = {True: pool, False: max(1, flags.batch_tokens // length)}
    metrics, base = [], None
    for routing in routings:
        with quiet_warnings(), _Progress(routing.name, windows) as done:
            losses = window_losses(model, windows, routing, rows[routing.pooled], done)
        base = base or losses
        metrics.append(summary(losses, base, routing, text_bytes))
    result = {
        **model.description,
        "data": flags.data,
        "tokens": windows.targets,
        "sequences": windows.number,
        "seq_length": length,
        "bytes": text_bytes,
        "pool_tokens": pool * length if any(r.pooled for r in routings) else None,
        "routings": metrics,
    }
    if is_first_rank():
        print(_table(metrics), end="", flush=True)
        text = dump_json(result)
        if flags.out is None:
            print(text, flush=True)
        else:
            _write(Path(flags.out), text + "\n")


def _sequence_length(seq_length: int | None, model: "MegatronModel") -> int:
    length = seq_length or model.trained.args.seq_length
    if length > model.max_length:
        raise UserError(
            f"--seq-length {length} is above the model's context length of {model.max_length} "
            "tokens. Set it to at most that."
        )
    return length


def _pool_rows(pool_tokens: int | None, length: int, model: "MegatronModel") -> int:
    tokens = pool_tokens or 8 * length
    if tokens % length:
        raise UserError(
            f"--pool-tokens {tokens} is not divisible by --seq-length {length}. Choose a multiple "
            f"of {length}."
        )
    config = model.trained.model.config
    if config.uses_thresholds and not config.routing_rate.k(tokens):
        raise UserError(
            f"--pool-tokens {tokens} is so small that an expert's share is below one token. Choose "
            "a larger multiple of --seq-length."
        )
    return tokens // length


class _Progress:
    """Progress over sequences, on the first rank."""

    def __init__(self, label: str, windows: "Windows") -> None:
        self._progress = Progress(label, windows.number, "sequences") if is_first_rank() else None
        self._done = 0

    def __enter__(self) -> "_Progress":
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)

    def __call__(self, number: int) -> None:
        self._done += number
        if self._progress is not None:
            self._progress.update(self._done)


def _table(metrics: list[dict[str, Any]]) -> str:
    lines = [f"| routing | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
    for row in metrics:
        cells = [
            "" if row[name] is None else format(row[name], form) for name, form in _COLUMNS.values()
        ]
        lines.append(f"| {row['routing']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.validation_loss", description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--load", required=True, metavar="DIR", help="Run directory or folder of checkpoints.")
    add("--data", required=True, metavar="PREFIX",
        help="Prefix of an indexed dataset: its path without .bin.")
    add("--routing", nargs="+", choices=_ROUTINGS,
        help="One or several ways of routing. Default: the model's own.")
    add("--pool-tokens", type=int, metavar="N",
        help="Number of tokens in a routing pool of ec and et-capacity. Default: that of 8 "
             "sequences.")
    add("--seq-length", type=int, metavar="N",
        help="Length of a sequence, in tokens. Default: as in training.")
    add("--max-sequences", type=int, metavar="N",
        help="Number of sequences, from the beginning of the dataset. Default: all.")
    add("--out", metavar="FILE",
        help="File for the JSON object. Default: it is printed below the table.")
    add("--batch-tokens", type=int, default=4096, metavar="N",
        help="Number of tokens in a batch of et and tc. Default: %(default)s.")
    # fmt: on
    add_loading_flags(parser)
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
