r"""Show how a trained model routes texts, and in which domains its experts specialize.

    python -m tools.inspect_routing --load RUN_DIR --output DIR \
        --text-file story.txt --domain news=news.jsonl --domain code=code.jsonl

The command works for every router and writes to DIR: routing.html, a page with the texts colored by
fan-out and all pictures; routing.json, all statistics; and the pictures as PNG files. A model that
needs several ranks runs under torchrun, with the flags of its layout.
"""

import argparse
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.data.document_tokens import DocumentTokens
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.inspection.routed_text import RoutedText, route
from megatron_ext.inspection.windows import Domain
from megatron_ext.model_location import announce_model
from megatron_ext.progress import Progress
from megatron_ext.quiet import quiet_megatron

if TYPE_CHECKING:
    from megatron_ext.inference.loading import TrainedModel
    from megatron_ext.inspection.routing_sums import RoutingSums

_DEFAULT_DOMAIN = "text"  # domain of --text and --text-file, without --domain


class InspectFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    output: str
    text: list[str]
    text_file: list[str]
    domain: list[str]
    text_key: str
    max_tokens: int | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(argv, InspectFlags())
    texts, domains = _texts(options), _domains(options)
    if not texts and not domains:
        raise UserError("There is nothing to route. Give --text, --text-file or --domain.")
    checkpoint = announce_model(options.load)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file. Choose a folder.")
    with quiet_megatron():
        activate()  # before anything of Megatron is imported, which takes seconds
        from megatron_ext.inference.loading import load_model

        layout, others = options.load_model_options()
        trained = load_model(checkpoint, layout, **others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and Megatron's
        inspect(trained, texts, domains, output, options.max_tokens)


def inspect(
    trained: "TrainedModel",
    texts: dict[str, str],
    domains: list[Domain],
    output: Path,
    max_tokens: int | None = None,
) -> None:
    """Route texts and domains, and write the page, the statistics and the pictures.

    This is a collective of all ranks.

    Args:
        trained: Model to inspect.
        texts: Texts for the page, by name. Without texts, the page shows the first window of each
            domain.
        domains: Texts for the statistics. Without domains, the statistics are those of `texts`.
        output: Folder to write.
        max_tokens: Largest number of tokens of each domain. Default: all.

    Raises:
        UserError: The model or a text cannot be inspected.
    """
    from megatron_ext.inference.text_routing import check_margins, route_text
    from megatron_ext.inspection.routing_sums import RoutingSums
    from megatron_ext.moe.router import routers_of
    from megatron_ext.moe.threshold_router import threshold_routers

    check_margins(trained.model.config)
    for router in threshold_routers(routers_of([trained.module])):
        if router.thresholds.update_count == 0:
            raise UserError(
                f"{trained.checkpoint} has no thresholds yet. Train it for a step, or set them "
                "with tools.calibrate_thresholds."
            )
    routed = {name: _routed(trained, name, text) for name, text in texts.items()}
    names = [domain.name for domain in domains] or [_DEFAULT_DOMAIN]
    sums: RoutingSums | None = None
    for index, tokens in _counted(trained, texts, domains, max_tokens):
        routing = route_text(trained, tokens)
        if sums is None:
            layers, (_, _, experts) = routing.layers, routing.maps.shape
            sums = RoutingSums(len(names), len(layers), experts)
        if not texts and sums.tokens[index] == 0:
            routed[f"{names[index]} (its first {len(tokens):,} tokens)"] = route(trained, tokens)
        sums.add(index, routing)
    for index, name in enumerate(names):
        if sums is None or sums.tokens[index] == 0:
            raise UserError(f"--domain {name} contains no text. Add text, or leave it out.")
    assert sums is not None
    if is_first_rank():
        _write(trained, routed, sums, layers, names, output)


def _counted(
    trained: "TrainedModel",
    texts: dict[str, str],
    domains: list[Domain],
    max_tokens: int | None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield domain number and tokens of each window, and display the progress."""
    length = trained.max_length
    if not domains:
        encoder = DocumentTokens(trained.tokenizer)
        for text in texts.values():
            tokens = encoder.beginning(text)
            for start in range(0, len(tokens), length):
                yield 0, tokens[start : start + length]
        return
    first = is_first_rank()
    total, before = sum(domain.size for domain in domains), 0
    with Progress("routing", total) if first else nullcontext() as progress:
        for domain_index, domain in enumerate(domains):
            counted = 0
            for window in domain.windows(trained.tokenizer, length):
                tokens = window.tokens[: max_tokens and max_tokens - counted]
                yield domain_index, tokens
                counted += len(tokens)
                done = window.bytes_read
                if max_tokens is not None:
                    done = max(done, domain.size * counted // max_tokens)
                if progress is not None:
                    progress.update(before + done, f"{counted:,} tokens of {domain.name}")
                if counted == max_tokens:
                    break
            before += domain.size


def _write(
    trained: "TrainedModel",
    routed: dict[str, RoutedText],
    sums: "RoutingSums",
    layers: list[int],
    names: list[str],
    output: Path,
) -> None:
    """Write all files to a temporary folder, then move them to the output folder."""
    from megatron_ext.inspection.reading_page import reading_page
    from megatron_ext.inspection.routing_pictures import draw_pictures
    from megatron_ext.inspection.routing_statistics import routing_statistics

    router = trained.args.router_type
    statistics: dict[str, Any] = {
        "checkpoint": str(trained.checkpoint),
        "iteration": trained.iteration,
        "router": router,
        **routing_statistics(sums, layers, names),
    }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".routing-", dir=output) as temporary:
        folder = Path(temporary)
        captions = draw_pictures(statistics, folder)
        pictures = {
            name: ((folder / f"{name}.png").read_bytes(), caption)
            for name, caption in captions.items()
        }
        run = trained.checkpoint.parent.parent.name
        about = (
            f"{router}, step {trained.iteration:,}; {statistics['experts']} experts in "
            f"{len(layers)} layers; {statistics['tokens']:,} tokens counted"
        )
        title = f"Where {run or trained.checkpoint.name} sends tokens"
        html = reading_page(title, about, routed, statistics, pictures)
        (folder / "routing.html").write_text(html, encoding="utf-8")
        encoded = json.dumps(statistics, ensure_ascii=False, allow_nan=False)
        (folder / "routing.json").write_text(encoded + "\n", encoding="utf-8")
        for file in folder.iterdir():
            shutil.move(file, output / file.name)
    print(f"wrote {output / 'routing.html'}, routing.json and {len(pictures)} pictures")


def _routed(trained: "TrainedModel", name: str, text: str) -> RoutedText:
    try:
        tokens = DocumentTokens(trained.tokenizer).beginning(text)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"The model's {trained.args.tokenizer_type} cannot encode {name}: {error}"
        ) from error
    if not tokens:
        raise UserError(f"{name} is empty. Choose a text with at least one token.")
    return route(trained, tokens)


def _texts(options: InspectFlags) -> dict[str, str]:
    texts = {f"text {number}": text for number, text in enumerate(options.text, 1)}
    for file in options.text_file:
        try:
            texts[file] = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text-file {file} cannot be read: {error}") from error
    return texts


def _domains(options: InspectFlags) -> list[Domain]:
    check_at_least_one(max_tokens=options.max_tokens)
    files: dict[str, list[str]] = {}
    for argument in options.domain:
        name, equals, file = argument.partition("=")
        if not (name and equals and file):
            raise UserError(f"--domain {argument} is not of the form NAME=FILE.")
        files.setdefault(name, []).append(file)
    return [Domain(name, paths, options.text_key) for name, paths in files.items()]


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.inspect_routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--load", required=True, metavar="DIR", help="Run directory, or folder of checkpoints.")
    add("--output", required=True, metavar="DIR",
        help="Folder for the page, the statistics and the pictures.")
    add("--text", action="append", default=[],
        help="Text to show on the page. Can be repeated.")
    add("--text-file", action="append", default=[], metavar="FILE",
        help="File with a text to show on the page. Can be repeated.")
    add("--domain", action="append", default=[], metavar="NAME=FILE",
        help="Domain for the statistics and a file of it: JSONL, Parquet or plain text. Can be "
             "repeated, also for further files of a domain. Default: the texts of the page.")
    add("--text-key", default="text", metavar="KEY",
        help="Field or column with the text. Default: %(default)s.")
    add("--max-tokens", type=int, metavar="N",
        help="Largest number of tokens of each domain. Default: all.")
    # fmt: on
    add_loading_flags(parser)
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
