"""Local parquet files, as the hub stores them, read a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.errors import ZooError


def parquet_batches(
    file: Path, columns: list[str], rows: int = 4096
) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of a file, some rows at a time.

    Args:
        file: Parquet file.
        columns: Names of the columns.
        rows: Most rows in one piece.

    Raises:
        ZooError: No parquet file, or a column is missing.
    """
    from pyarrow import ArrowInvalid, parquet

    try:
        reader = parquet.ParquetFile(file)
    except (OSError, ArrowInvalid) as error:
        raise ZooError(f"root: {file.name!r} is not a parquet file ({error})") from error
    with reader:
        names = reader.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ZooError(f"root: {file.name!r} has the columns {names}; needed: {columns}")
        for batch in reader.iter_batches(rows, columns=columns):
            yield batch.to_pydict()
