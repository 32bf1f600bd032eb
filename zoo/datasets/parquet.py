"""Local parquet files, as the hub stores them, read a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from zoo.errors import ZooError

Value = TypeVar("Value")


def checked(value: object, kind: type[Value], where: str) -> Value:
    """Return what a cell of a table holds, if it is of the kind that is needed.

    Args:
        value: The cell.
        kind: Type that it must have.
        where: What the error calls it: row, file and column.

    Raises:
        ZooError: It is null or of another type.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "null" if value is None else repr(value)[:40]
        raise ZooError(f"{where} holds {found}; needed: {kind.__name__}")
    return value


def parquet_batches(
    file: Path, columns: list[str], rows: int = 4096
) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of a file, some rows at a time.

    Args:
        file: Parquet file.
        columns: Names of the columns.
        rows: Most rows in one piece.

    Raises:
        ZooError: No parquet file, a broken one, or a column is missing.
    """
    from pyarrow import ArrowException, ArrowInvalid, parquet

    try:
        reader = parquet.ParquetFile(file)
    except (OSError, ArrowInvalid) as error:
        raise ZooError(f"root: {file.name!r} is not a parquet file ({_line(error)})") from error
    with reader:
        names = reader.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ZooError(f"root: {file.name!r} has the columns {names}; needed: {columns}")
        batches, done = reader.iter_batches(rows, columns=columns), 0
        while True:
            try:
                batch = next(batches, None)
                found = None if batch is None else batch.to_pydict()
            except (OSError, ValueError, ArrowException) as error:
                raise ZooError(
                    f"root: {file.name!r} is broken after its first {done} rows: {_line(error)}"
                ) from error
            if batch is None or found is None:
                return
            yield found
            done += len(batch)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
