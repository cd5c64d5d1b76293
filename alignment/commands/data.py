"""Command `et-align data`; its help is in `data_config`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from alignment.commands.data_config import CountConfig, ImportConfig, SplitConfig, parse
from alignment.commands.data_show import show_rows
from alignment.commands.data_show_config import ShowConfig
from alignment.data.packages import PACKAGES
from alignment.data.people_labels import verdicts_of
from alignment.data.record_reader import RecordReader, Repeats, as_kind, number_of
from alignment.data.record_writer import RecordWriter
from alignment.data.source_row import LabeledRecord, Record
from alignment.data.splits import Split, Splitter
from alignment.judges.formats.scale import scaled_label
from alignment.records import Pair, Prompt, Response, Side, Verdict
from megatron_ext.data.row_files import expand_row_files
from megatron_ext.errors import UserError
from megatron_ext.new_folder import check_new, new_folder


def import_rows(config: ImportConfig) -> None:
    """Convert rows to records and write them to one file, and labels of people to another one.

    Raises:
        UserError: The input has no usable rows, or too many that are unusable.
    """
    output = Path(config.output)
    reader = RecordReader(
        expand_row_files(list(config.input)) if config.input else [],
        config.max_malformed, config.source, config.rows.options,
    )  # fmt: skip
    equal, repeats, judged = 0, Repeats(), Counter[str]()
    with ExitStack() as stack:
        writer = stack.enter_context(RecordWriter(output, config.overwrite))
        verdicts = None
        if config.verdicts:
            verdicts = stack.enter_context(RecordWriter(Path(config.verdicts), config.overwrite))
        for item in _items(config, reader):
            record = item.record
            if isinstance(record, Pair) and record.first == record.second:
                equal += 1
                continue
            clashes = repeats.clashes
            if repeats.is_new(record):
                writer.write(record)
            elif repeats.clashes > config.max_malformed:
                raise UserError(
                    f"{repeats.clashes:,} rows have the id of another row, the last being "
                    f"{repeats.last_clash!r}. Make the ids unique, leave them out, or raise "
                    "--max-malformed."
                )
            if verdicts is not None and repeats.clashes == clashes:
                for verdict in _verdicts(item, reader.path, config.scale, judged):
                    verdicts.write(verdict)
        if not writer.count:
            reasons = [
                *reader.reasons,
                *reader.missing,
                *[f"{equal:,} pairs of a response with itself"] * (equal > 0),
            ]
            if reasons:
                raise UserError(
                    f"The input has no rows that can be used: {'; '.join(reasons)}. Correct them, "
                    "or name their columns with --columns."
                )
            raise UserError("The input has no rows. Give a file with rows as --input.")
        if verdicts is not None and not verdicts.count:
            raise UserError(
                "The input has no labels of people for --verdicts. Name their column with "
                "--columns label=COLUMN (pairs) or score=COLUMN (responses)."
            )
    reader.report()
    for count, kind in (
        (equal, "pairs of a response with itself"),
        (repeats.count, "rows that repeat an earlier one"),
        (repeats.clashes, "rows with the id of another row"),
    ):
        if count:
            print(f"Left out {count:,} {kind}.")
    print(f"Wrote {writer.count:,} rows to {output}.")
    if verdicts is None and reader.annotators > 1 and config.kind in (None, "pairs"):
        print("The labels of several people are left out. Write them with --verdicts FILE.")
    if verdicts is not None:
        print(f"Wrote {verdicts.count:,} labels of people to {config.verdicts}.")


def _items(config: ImportConfig, reader: RecordReader) -> Iterator[LabeledRecord]:
    """Yield the records of the package or of the files, as the kind to write."""
    if not config.package:
        yield from reader.read("reading", config.kind)
        return
    records = PACKAGES[config.package].read(config.archive)
    for record in islice(records, config.rows.limit):
        yield from as_kind(LabeledRecord(record), config.kind, None)


def _verdicts(
    item: LabeledRecord, path: str, scale: Sequence[float] | None, judged: Counter[str]
) -> list[Verdict]:
    """Return the labels of an item as verdicts.

    Args:
        item: The item.
        path: File that it is from.
        scale: Lowest and highest rating.
        judged: Verdicts so far by item, to which these are added.
    """
    if isinstance(item.record, Verdict) or not item.labels:
        return []
    try:
        labels = [scaled_label(label, scale) for label in item.labels]
    except ValueError as error:
        raise UserError(
            f"{path}, row {item.number:,}: {error}. State the lowest and the highest rating "
            "that people could give with --scale LOW HIGH."
        ) from None
    return verdicts_of([(item.record.id, labels)], judged)


def split_rows(config: SplitConfig) -> None:
    """Assign records to splits by their prompts and write a file for each split and kind.

    Raises:
        UserError: The input has verdicts, or too many rows that are unusable.
    """
    splits = [Split.parse(text) for text in config.split]
    splitter = Splitter(splits, config.seed, config.near)
    save = Path(config.save)
    if not config.overwrite:
        check_new(save)
    reader = RecordReader(
        expand_row_files(list(config.input)), config.max_malformed, options=config.rows.options
    )
    kinds: dict[type[Record], None] = {}
    for item in reader.read("finding prompts"):
        splitter.add(_prompt(item.record))
        kinds[type(item.record)] = None
    splitter.assign()
    rows: Counter[str] = Counter()
    repeated, seen_ids = 0, set[int]()
    with new_folder(save, config.overwrite) as folder, ExitStack() as stack:
        writers = {
            (split.name, kind): stack.enter_context(
                RecordWriter(folder / f"{split.name}{ending}.{config.format}")
            )
            for split in splits
            for kind in kinds
            for ending in [f"-{kind.__name__.lower()}s" if len(kinds) > 1 else ""]
        }
        for item in reader.read("writing splits"):
            record = item.record
            assert not isinstance(record, Verdict)
            if (name := splitter.split_of(_prompt(record))) is None:
                continue
            kind = type(record)
            if (mark := number_of([kind.__name__, record.id])) in seen_ids:
                repeated += 1
                continue
            seen_ids.add(mark)
            writers[name, kind].write(record)
            rows[name] += 1
        about = {
            split.name: {
                "prompts": splitter.sizes[split.name],
                "rows": rows[split.name],
                "near": splitter.near[split.name],
            }
            for split in splits
        }
        settings = {"input": config.input, "split": config.split, "seed": config.seed,
                    "near": config.near}  # fmt: skip
        text = json.dumps({"settings": settings, "splits": about}, indent=1)
        stack.close()  # files get their names
        (folder / "split.json").write_text(text + "\n")
    reader.report()
    for name, counts in about.items():
        print(
            f"{name}: {counts['rows']:,} rows of {counts['prompts']:,} prompts; left out "
            f"{counts['near']:,} prompts that nearly equal those of earlier splits."
        )
    if repeated:
        print(f"Left out {repeated:,} rows with the id of an earlier row.")
    print(f"Wrote {save}.")


def _prompt(record: Record) -> Prompt:
    if isinstance(record, Verdict):
        raise UserError(
            "--input has verdicts, which have no prompt. Split the records that they judge."
        )
    return record if isinstance(record, Prompt) else record.prompt


def count_rows(config: CountConfig) -> None:
    """Print a table of the records by source."""
    counts: dict[str, Counter[str]] = {}
    reader = RecordReader(
        expand_row_files(list(config.input)), config.max_malformed, options=config.rows.options
    )
    for item in reader.read("counting"):
        record = item.record
        source = record.judge if isinstance(record, Verdict) else record.source
        counts.setdefault(source, Counter()).update(_count_record(record))
    reader.report()
    total = sum(counts.values(), Counter[str]())
    columns = list(total)
    table = [["source", *columns]]
    table += [[s, *(f"{counts[s][c]:,}" for c in columns)] for s in sorted(counts)]
    table.append(["total", *(f"{total[c]:,}" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for source, *cells in table:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:]))
        print(f"{source:{widths[0]}}{numbers}")


def _count_record(record: Record) -> dict[str, int]:
    """Return the counts that a record adds to the table."""
    match record:
        case Prompt():
            return {"prompts": 1, "with rubric": int(record.rubric is not None)}
        case Response():
            return {"responses": 1, "characters": len(record.text)}
        case Pair():
            return {"pairs": 1, **{str(side): int(record.preferred is side) for side in Side}}
        case Verdict():
            return {"verdicts": 1, str(record.outcome): 1}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the command."""
    run(parse(argv))


def run(config: ImportConfig | SplitConfig | CountConfig | ShowConfig) -> None:
    """Run the subcommand of the configuration."""
    match config:
        case ShowConfig():
            show_rows(config)
        case ImportConfig():
            import_rows(config)
        case SplitConfig():
            split_rows(config)
        case CountConfig():
            count_rows(config)
