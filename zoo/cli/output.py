"""How commands print: consoles, tables and JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A pipe has no width; lines cut off there would be lost to grep.
PIPE_WIDTH = 400


def console() -> Console:
    """Console of standard output, wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def notes() -> Console:
    """Console of standard error, for progress and remarks."""
    return Console(stderr=True, highlight=False)


def table(*columns: str, rows: list[list[str]], keep: int = 1) -> Table:
    """Build a table of plain text.

    Args:
        columns: Headings.
        rows: Cells.
        keep: Number of columns from the left that are never wrapped.
    """
    piped = not sys.stdout.isatty()
    made = Table(box=None if piped else Table().box, pad_edge=not piped, header_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, no_wrap=i < keep, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def print_json(value: Any) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:
    """Value of an option as JSON can hold it; anything unusual as Python writes it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return repr(value)
