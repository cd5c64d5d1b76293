"""Command `et-align data`; its help is in `data_config`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from alignment.commands.data_config import CountConfig, ImportConfig, SplitConfig, parse
from alignment.data.dataset_schemas import hash_id, read_records
from alignment.data.packages import PACKAGES
from alignment.data.source_rows import MalformedRow, Record, RecordWriter
from alignment.data.splits import Split, Splitter
from alignment.records import Pair, Prompt, Response, Side, Verdict
from megatron_ext.data.shards import expand_inputs
from megatron_ext.errors import UserError
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import Progress

_KINDS = {"prompts": Prompt, "responses": Response, "pairs": Pair}
_MOST_REASONS = 8  # that are shown


class RecordReader:
    """Reader of files of records that shows progress and counts the rows that are left out.

    Attributes:
        malformed: Rows that give no record.
        unread: For each column that records do not keep, the rows with a value there.
    """

    def __init__(self, files: Sequence[str], max_malformed: int, source: str = "") -> None:
        self.files, self.max_malformed, self.source = files, max_malformed, source
        self._reset()

    def _reset(self) -> None:
        self.malformed = 0
        self.unread: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # first row of each reason

    def read(self, label: str) -> Iterator[Record]:
        """Yield the usable records of all files, with progress under a label."""
        self._reset()
        before, sizes = 0, [Path(file).stat().st_size for file in self.files]
        with Progress(label, sum(sizes)) as progress:
            for file, size in zip(self.files, sizes):

                def advance(done: int, before: int = before) -> None:
                    progress.update(before + done)

                for record in read_records(file, self.source, advance, self.unread):
                    if isinstance(record, MalformedRow):
                        self._count(file, record)
                    else:
                        yield record
                before += size

    def _count(self, file: str, row: MalformedRow) -> None:
        self.malformed += 1
        self._reasons[row.reason] += 1
        self._examples.setdefault(row.reason, f"{file}, {row}")
        if self.malformed > self.max_malformed:
            raise UserError(
                f"{self.malformed} rows cannot be used, the first being "
                f"{next(iter(self._examples.values()))}. Fix them, or raise --max-malformed."
            )

    @property
    def reasons(self) -> list[str]:
        """Reasons for which rows were left out, most frequent first, each with its first row."""
        shown = self._reasons.most_common(_MOST_REASONS)
        lines = [f"{count:,} as in {self._examples[reason]}" for reason, count in shown]
        if others := self.malformed - sum(count for _, count in shown):
            lines.append(f"{others:,} for other reasons")
        return lines

    def report(self) -> None:
        """Print the numbers of rows and columns that were left out."""
        if self.malformed:
            print(f"Left out {self.malformed:,} malformed rows: {'; '.join(self.reasons)}.")
        if self.unread:
            columns = (f"{name} ({count:,} rows)" for name, count in self.unread.items())
            print(f"Left out columns that records do not have: {', '.join(columns)}.")


class Repeats:
    """Detector of repeated records, which stores two numbers of each record and no text.

    Attributes:
        count: Records that repeat an earlier one.
        clashes: Other records that have the id of an earlier one.
        last_clash: The last id of these.
    """

    def __init__(self) -> None:
        self.count = self.clashes = 0
        self.last_clash = ""
        self._contents: dict[int, int] = {}  # by id

    def is_new(self, record: Record) -> bool:
        """Remember a record and return whether its id is a new one."""
        if isinstance(record, Verdict):
            return True  # a judge may give the same verdict on an item twice
        id, content = number_of(record.id), number_of(_content(record))
        if id not in self._contents:
            self._contents[id] = content
            return True
        if self._contents[id] == content:
            self.count += 1
        else:
            self.clashes += 1
            self.last_clash = record.id
        return False


def _content(record: Prompt | Response | Pair) -> dict[str, object]:
    """Return a record as a row without its source: a copy in another file is a repeat."""
    row = record.to_row() | {"source": ""}
    if "prompt" in row:
        row["prompt"] = row["prompt"] | {"source": ""}
    return row


def number_of(content: object) -> int:
    """Return a hash of 60 bits."""
    return int(hash_id(content)[:15], 16)


def as_kind(records: Iterator[Record], kind: str | None) -> Iterator[Record]:
    """Yield records as another kind.

    Raises:
        UserError: The records cannot be turned into that kind.
    """
    for record in records:
        if kind is None or isinstance(record, _KINDS[kind]):
            yield record
        elif kind == "prompts" and isinstance(record, Response | Pair):
            yield record.prompt
        elif kind == "responses" and isinstance(record, Pair):
            for side, text in ((Side.FIRST, record.first), (Side.SECOND, record.second)):
                yield Response(hash_id(record.id, side.value), record.prompt, text, record.source)
        else:
            raise UserError(
                f"--as {kind} is not possible: a {type(record).__name__} contains no "
                f"{kind}. Choose another kind."
            )


def import_rows(config: ImportConfig) -> None:
    """Convert rows to records and write them to one file.

    Raises:
        UserError: The input has no usable rows, or too many that are unusable.
    """
    output = Path(config.output)
    reader = RecordReader(
        expand_inputs(list(config.input)) if config.input else [],
        config.max_malformed, config.source,
    )  # fmt: skip
    equal, repeats = 0, Repeats()
    with RecordWriter(output, config.overwrite) as writer:
        records: Iterator[Record]
        if config.package:
            records = PACKAGES[config.package].read(config.archive)
        else:
            records = reader.read("reading")
        for record in as_kind(records, config.kind):
            if isinstance(record, Pair) and record.first == record.second:
                equal += 1
            elif repeats.is_new(record):
                writer.write(record)
            elif repeats.clashes > config.max_malformed:
                raise UserError(
                    f"{repeats.clashes:,} rows have the id of another row, the last being "
                    f"{repeats.last_clash!r}. Make the ids unique, leave them out, or raise "
                    "--max-malformed."
                )
        if not writer.count:
            reasons = [
                *reader.reasons,
                *[f"{equal:,} pairs of a response with itself"] * (equal > 0),
            ]
            if reasons:
                raise UserError(f"There are no rows in the input: left out {'; '.join(reasons)}.")
            raise UserError("There are no rows in the input.")
    reader.report()
    for count, kind in (
        (equal, "pairs of a response with itself"),
        (repeats.count, "rows that repeat an earlier one"),
        (repeats.clashes, "rows with the id of another row"),
    ):
        if count:
            print(f"Left out {count:,} {kind}.")
    print(f"Wrote {writer.count:,} rows to {output}.")


def split_rows(config: SplitConfig) -> None:
    """Assign records to splits by their prompts and write one file for each split.

    Raises:
        UserError: The input has verdicts, or too many rows that are unusable.
    """
    splits = [Split.parse(text) for text in config.split]
    splitter = Splitter(splits, config.seed, config.near)
    save = Path(config.save)
    if not config.overwrite:
        check_new(save)
    reader = RecordReader(expand_inputs(list(config.input)), config.max_malformed)
    for record in reader.read("finding prompts"):
        splitter.add(_prompt(record))
    splitter.assign()
    rows: Counter[str] = Counter()
    repeated, seen_ids = 0, set[int]()
    with new_folder(save, config.overwrite) as folder, ExitStack() as stack:
        writers = {
            split.name: stack.enter_context(RecordWriter(folder / f"{split.name}.{config.format}"))
            for split in splits
        }
        for record in reader.read("writing splits"):
            assert not isinstance(record, Verdict)
            if (name := splitter.split_of(_prompt(record))) is None:
                continue
            if (mark := number_of(record.id)) in seen_ids:
                repeated += 1
                continue
            seen_ids.add(mark)
            writers[name].write(record)
            rows[name] += 1
        about = {
            name: {"prompts": splitter.sizes[name], "rows": rows[name], "near": splitter.near[name]}
            for name in writers
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
    reader = RecordReader(expand_inputs(list(config.input)), config.max_malformed)
    for record in reader.read("counting"):
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


def run(config: ImportConfig | SplitConfig | CountConfig) -> None:
    """Run the subcommand of the configuration."""
    match config:
        case ImportConfig():
            import_rows(config)
        case SplitConfig():
            split_rows(config)
        case CountConfig():
            count_rows(config)
