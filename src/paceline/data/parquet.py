"""Parquet: a record a row, read batch by batch. Needs the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.core.errors import DataError, MissingExtraError
from paceline.data.documents import (
    NOT_BUILT,
    Advance,
    Document,
    Origin,
    parse_record,
    shape_of,
)

_BATCH_ROWS = 512
_BROKEN = "the file is damaged or cut short: write it again"


def read_parquet(file: Path, advance: Advance) -> Iterator[tuple[Document, Origin]]:
    """The documents of a file, each row's; of its columns those that make a document.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: a file that is not whole, columns that make no document, a value of a wrong type.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    try:
        table = ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is not a whole Parquet file: {error}", hint=_BROKEN) from error
    with table:
        names: list[str] = table.schema_arrow.names
        shape = shape_of(names, f"{file}, its columns")
        columns = [*shape, *(name for name in names if name in NOT_BUILT)]
        number = 0
        for group in range(table.num_row_groups):
            batches = table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
            try:
                for batch in batches:
                    for record in batch.to_pylist():
                        number += 1
                        origin = Origin(str(file), "row", number)
                        yield parse_record(record, str(origin)), origin
            except (ArrowException, OSError, UnicodeDecodeError) as error:
                where = f"{file}, row group {group + 1} of {table.num_row_groups}"
                raise DataError(f"{where} cannot be read: {error}", hint=_BROKEN) from error
            advance(_share_bytes(file, table.metadata, group))


def _share_bytes(file: Path, metadata: Any, group: int) -> int:
    """A row group's share of the file's size, by its rows."""
    return file.stat().st_size * metadata.row_group(group).num_rows // max(1, metadata.num_rows)
