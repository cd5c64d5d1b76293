"""Reader of many files of records that counts and leaves out unusable rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.data.dataset_schemas import RecordFile
from alignment.data.read_options import ReadOptions
from alignment.data.source_row import LabeledRecord, Record, hash_id
from alignment.record_files import describe
from alignment.records import Pair, Prompt, Response, Side, Verdict
from megatron_ext.data.row_files import MalformedRow
from megatron_ext.errors import UserError
from megatron_ext.progress import Progress

_MOST_REASONS = 8  # reasons that are shown


KINDS = ("prompts", "responses", "chosen", "pairs")


def as_kind(item: LabeledRecord, kind: str | None, file: RecordFile | None) -> list[LabeledRecord]:
    """Return a record as another kind.

    Args:
        item: The record.
        kind: "prompts", "responses", "chosen" (the preferred response of a pair), "pairs", or None
            for the kind of the record.
        file: File of the record, or None.

    Raises:
        LookupError: The row of a file with records of several kinds contains none of this kind.
        UserError: Records of this kind of file contain none.
    """
    record = item.record
    match kind, record:
        case (None, _) | ("prompts", Prompt()) | ("responses" | "chosen", Response()) | (
            "pairs", Pair(),
        ):  # fmt: skip
            return [item]
        case "prompts", Response() | Pair():
            prompt = file.as_prompt(record) if file else record.prompt
            return [LabeledRecord(prompt, (), item.number)]
        case "responses", Pair():
            return [LabeledRecord(_response(record, side), (), item.number) for side in Side]
        case "chosen", Pair():
            preferred = record.preferred or _majority(item)
            if preferred is None:
                raise LookupError("no side of the pair is preferred")
            return [LabeledRecord(_response(record, preferred), (), item.number)]
        case "responses" | "chosen", Prompt() if file and file.schema is not None:
            raise LookupError(file.missing_answer(record)[0])
    contained = "responses" if kind == "chosen" else kind
    raise UserError(
        f"--as {kind} is not possible: a {type(record).__name__} contains no {contained}. Choose "
        "another kind."
    )


def _majority(item: LabeledRecord) -> Side | None:
    """Return the side of a pair that most people of a row prefer, or None."""
    votes = Counter(label.preferred for label in item.labels)
    first, second = votes[Side.FIRST], votes[Side.SECOND]
    return None if first == second else Side.FIRST if first > second else Side.SECOND


def _response(pair: Pair, side: Side) -> Response:
    text = pair.first if side is Side.FIRST else pair.second
    return Response(hash_id(pair.id, side.value), pair.prompt, text, pair.source)


class RecordReader:
    """Reader of files of records that shows progress and counts the rows that are left out.

    Attributes:
        malformed: Rows that give no record.
        path: File that is being read.
    """

    path = ""

    def __init__(
        self,
        files: Sequence[str],
        max_malformed: int,
        source: str = "",
        options: ReadOptions | None = None,
    ) -> None:
        """Prepare the reading.

        Args:
            files: The files.
            max_malformed: Rows that may give no record.
            source: Source of rows that name none. Default: the file's name.
            options: How files of other projects are read, and how many records.
        """
        self.files, self.max_malformed, self.source = files, max_malformed, source
        self.options = options or ReadOptions()
        self._reset()

    def _reset(self) -> None:
        self.malformed = 0
        self._files: dict[str, tuple[RecordFile, int]] = {}  # with the number of records
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # first row of each reason
        self._without: Counter[str] = Counter()  # intact rows without a record of the kind

    def read(self, label: str, kind: str | None = None) -> Iterator[LabeledRecord]:
        """Yield the usable records of all files, with progress under a label.

        Args:
            label: Label of the progress.
            kind: Kind of the records, a key of `as_kind`. Default: that of the files.
        """
        self._reset()
        before, sizes = 0, [Path(file).stat().st_size for file in self.files]
        total = 0
        with Progress(label, sum(sizes)) as progress:
            for path, size in zip(self.files, sizes):

                def advance(done: int, before: int = before) -> None:
                    progress.update(before + done)

                self.path = path
                file, count = RecordFile(path, self.source, self.options), 0
                for item in file.read(advance):
                    if total == self.options.limit:
                        return
                    if isinstance(item, MalformedRow):
                        self._count(path, item)
                        continue
                    try:
                        records = as_kind(item, kind, file)
                    except LookupError as error:
                        row = MalformedRow(item.number, str(error))
                        self._without[row.reason] += 1
                        self._examples.setdefault(row.reason, f"{path}, {row}")
                        continue
                    total, count = total + 1, count + 1
                    self._files[path] = file, count
                    yield from records
                before += size

    def _count(self, file: str, row: MalformedRow) -> None:
        self.malformed += 1
        self._reasons[row.reason] += 1
        self._examples.setdefault(row.reason, f"{file}, {row}")
        if self.malformed > self.max_malformed:
            raise UserError(
                f"{self.malformed} rows cannot be used, the first being "
                f"{self._examples[next(iter(self._reasons))]}. Fix them, or raise --max-malformed."
            )

    @property
    def reasons(self) -> list[str]:
        """Reasons for which rows were left out, most frequent first, each with its first row."""
        commonest = self._reasons.most_common(_MOST_REASONS)
        lines = [f"{count:,} as in {self._examples[reason]}" for reason, count in commonest]
        if remainder := self.malformed - sum(count for _, count in commonest):
            lines.append(f"{remainder:,} for other reasons")
        return lines

    @property
    def missing(self) -> list[str]:
        """Reasons for which intact rows gave no record, each with its first row."""
        return [f"{n:,} as in {self._examples[reason]}" for reason, n in self._without.items()]

    @property
    def annotators(self) -> int:
        """Number of people whose labels the files have."""
        return len({name for file, _ in self._files.values() for name in file.labels})

    def report(self) -> None:
        """Print how files of other projects were read, and what was left out."""
        for file, count in self._files.values():
            if file.schema is not None:
                print(describe(file, count))
        if self.malformed:
            print(f"Left out {self.malformed:,} malformed rows: {'; '.join(self.reasons)}.")
        if self._without:
            print(f"Left out {self._without.total():,} rows: {'; '.join(self.missing)}.")


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
    """Return the content by which a repeated row is recognized.

    A copy in another file is a repeat, and so is a row with another label or other metadata.
    """
    row = record.to_row()
    for part in (row, row.get("prompt", row)):
        for name in ("source", "metadata", "preferred", "tied"):
            part.pop(name, None)
    return row


def number_of(content: object) -> int:
    """Return a hash of 60 bits."""
    return int(hash_id(content)[:15], 16)
