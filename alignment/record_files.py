"""Reader of files whose records must all be valid, before anything is paid for or measured."""

from pathlib import Path

from alignment.data.dataset_schemas import read_records
from alignment.data.source_rows import MalformedRow, Record
from alignment.records import Verdict
from megatron_ext.errors import UserError


def read_all[R: Record](path: Path, *kinds: type[R]) -> list[R]:
    """Return the records of a file, which are all of one kind.

    Args:
        path: The file.
        *kinds: The kinds that the file may hold.

    Raises:
        UserError: If a row is malformed or of another kind, an id occurs twice, or there is no row.
    """
    records: list[R] = []
    ids: set[str] = set()
    for number, record in enumerate(read_records(path), start=1):
        if isinstance(record, MalformedRow):
            raise UserError(f"{path}, {record}")
        if not isinstance(record, kinds) or (records and type(record) is not type(records[0])):
            allowed = " or ".join(f"{kind.__name__.lower()}s" for kind in kinds)
            raise UserError(
                f"{path} must hold {allowed} of one kind, and row {number:,} is a "
                f"{type(record).__name__.lower()}"
            )
        if not isinstance(record, Verdict):
            if record.id in ids:
                raise UserError(f"{path} has the id {record.id!r} twice. Remove one of the rows.")
            ids.add(record.id)
        records.append(record)
    if not records:
        raise UserError(f"{path} has no rows")
    return records
