"""`zoo doctor`: what is there, what works, and what to do about the rest."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo.cli.output import console, notes, plain, print_json

if TYPE_CHECKING:
    from zoo.doctor import Line, Section

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
WIDTH = max(map(len, STYLES))


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    records: Annotated[
        Path | None, typer.Option(help="Folder of records; default data/runs, as published.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Leaderboard of the records; default leaderboard.md of data/runs."),
    ] = None,
) -> None:
    """Report versions, devices, data and records, and what is wrong with them."""
    with notes().status("importing"):
        from zoo.doctor import examine

    out, counted, found = console(), Counter[str](), []
    for section in examine(records, page):
        counted.update(line.level for line in section.lines)
        if json:
            found.append({"section": section.title, "lines": [_plain(li) for li in section.lines]})
        else:
            _show(out, section)
    if json:
        totals = {level: counted[level] for level in STYLES}
        print_json({"healthy": not counted["problem"], "counts": totals, "sections": found})
    else:
        text = f"{_number(counted['problem'], 'problem')}, {_number(counted['note'], 'note')}"
        out.print(text, style="bold", markup=False)
    if counted["problem"]:
        raise typer.Exit(1)


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _plain(line: Line) -> dict[str, object]:
    found = asdict(line)
    return {**found, "facts": plain(found["facts"])}


def _show(out: Console, section: Section) -> None:
    """Print a topic: in columns on a terminal, one finding a line elsewhere."""
    if not sys.stdout.isatty():
        for line in section.lines:
            todo = f" -> {line.todo}" if line.todo else ""
            text = f"{line.level:<{WIDTH}}  {section.title}: {line.text}{todo}"
            typer.echo(" ".join(text.split("\n")))
        return
    out.print(section.title, style="bold", markup=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=WIDTH)
    grid.add_column(overflow="fold")
    for line in section.lines:
        grid.add_row(Text(line.level, style=STYLES[line.level]), Text(line.text))
        if line.todo:
            grid.add_row("", Text(f"-> {line.todo}", style="dim"))
    out.print(grid)
    out.print()
