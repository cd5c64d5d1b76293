"""The loss of a checkpoint on an indexed dataset, under one routing or several.

    python -m tools.validation_loss --load RUN_DIR --data PREFIX --routing et ec tc

Routings: et by thresholds, as evaluation and generation go; ec by expert choice over pools of
--pool-tokens, as in warm-up; et-capacity by thresholds within the capacity of training, over the
same pools; tc by token choice with as many experts a token. The gap is the loss minus that of the
first routing named. Runs in any layout under torchrun; data-parallel copies share the data.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.data.tokenizer_identity import check_dataset_tokenizer
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    add_model_flags,
    check_at_least_one,
    is_first_rank,
    loading_options,
)
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


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    check_at_least_one(options, "pool_tokens", "seq_length", "max_sequences", "batch_tokens")
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.evaluation.losses import Windows, summary, window_losses
        from megatron_ext.evaluation.models import MegatronModel
        from megatron_ext.evaluation.routings import Routing, default_routing
        from megatron_ext.inference.loading import load_model

        layout, others = loading_options(options)
        model = MegatronModel(load_model(options.load, layout, **others))
        names = options.routing or [default_routing(model.trained.model.config)]
        routings = [Routing(model.trained, name) for name in dict.fromkeys(names)]
        length = _length(options, model)
        windows = Windows(options.data, length, options.max_sequences)
        check_dataset_tokenizer(options.data, model.trained.args, "the model's")
        pool = _pool_rows(options, length, model)
        text_bytes = None
        if is_first_rank() and model.trained.args.tokenizer_type != "NullTokenizer":
            text_bytes = windows.text_bytes(model.codec)
    rows = {True: pool, False: max(1, options.batch_tokens // length)}
    figures, base = [], None
    for routing in routings:
        with quiet_warnings(), _Progress(routing.name, windows) as done:
            losses = window_losses(model, windows, routing, rows[routing.pooled], done)
        base = base or losses
        figures.append(summary(losses, base, routing, text_bytes))
    result = {
        **model.description,
        "data": options.data,
        "tokens": windows.targets,
        "sequences": windows.number,
        "seq_length": length,
        "bytes": text_bytes,
        "pool_tokens": pool * length if any(r.pooled for r in routings) else None,
        "routings": figures,
    }
    if is_first_rank():
        print(_table(figures), end="", flush=True)
        text = json.dumps(result)
        if options.out is None:
            print(text, flush=True)
        else:
            _write(Path(options.out), text + "\n")


def _length(options: argparse.Namespace, model: "MegatronModel") -> int:
    length = options.seq_length or model.trained.args.seq_length
    if length > model.max_length:
        raise UserError(f"--seq-length {length}: the model takes {model.max_length} tokens")
    return length


def _pool_rows(options: argparse.Namespace, length: int, model: "MegatronModel") -> int:
    tokens = options.pool_tokens or 8 * length
    if tokens % length:
        raise UserError(f"--pool-tokens {tokens} must be a multiple of --seq-length {length}")
    config = model.trained.model.config
    if config.uses_thresholds and not config.routing_rate.k(tokens):
        raise UserError(f"--pool-tokens {tokens} are too few for an expert to take one")
    return tokens // length


class _Progress:
    """Progress over windows, on the first rank."""

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


def _table(figures: list[dict[str, Any]]) -> str:
    lines = [f"| routing | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
    for row in figures:
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
    add("--load", required=True, metavar="DIR", help="run directory or folder of checkpoints")
    add("--data", required=True, metavar="PREFIX", help="indexed dataset, without .bin")
    add("--routing", nargs="+", choices=_ROUTINGS, help="one or several (the model's own)")
    add(
        "--pool-tokens",
        type=int,
        metavar="N",
        help="of a pool of ec, et-capacity (8 sequences)",
    )
    add("--seq-length", type=int, metavar="N", help="tokens of a sequence (as in training)")
    add("--max-sequences", type=int, metavar="N", help="from the beginning of the data (all)")
    add("--out", metavar="FILE", help="write the JSON there instead of below the table")
    add("--batch-tokens", type=int, default=4096, metavar="N", help="of a batch (%(default)s)")
    add_model_flags(parser)
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
