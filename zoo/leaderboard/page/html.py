"""The leaderboard as HTML pages that need nothing else: tables and claims, and each mechanism.

`zoo leaderboard --html` writes them: the tables on one page, and a page for each mechanism in a
folder beside it. Style, script and pictures are inside the pages, nothing is loaded from anywhere,
and the same records, recipes and registry give the same bytes. The address says how the tables are
looked at, so that a view can be sent on:

    index.html#kind=position&trait=causal,no-decode&q=rope&sort=t-mqar-836e5c46:mean:down&at=m-rope

Without JavaScript they are the same pages, unsorted and unfiltered.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from zoo.claims.trials import FOLDER, Published, published
from zoo.claims.verdicts import OUTCOMES
from zoo.errors import ZooError
from zoo.leaderboard import efficiency
from zoo.leaderboard.board import Board, TableBoard, assemble
from zoo.leaderboard.current import Current, current
from zoo.leaderboard.page import _html_mechanisms as mechanisms
from zoo.leaderboard.page import _html_pictures as drawing
from zoo.leaderboard.page import claim_table, figures, standings
from zoo.leaderboard.page import markdown_page as leaderboard
from zoo.leaderboard.page._html_fill import filled
from zoo.leaderboard.page._html_grid import Ids
from zoo.leaderboard.page._html_mechanisms import Draw
from zoo.leaderboard.page._html_patterns import pattern
from zoo.leaderboard.page._html_pictures import Picture
from zoo.leaderboard.page._html_tables import Tables
from zoo.leaderboard.page._html_text import markdown
from zoo.leaderboard.summary import summaries
from zoo.report.files import replace_texts
from zoo.runs.records import Record, RecordWarning, read_all

INDEX = "index.html"
"""Name of the page of the tables in a folder of its own."""
PAGES = "mechanisms"
"""Name of the folder of the mechanisms' pages beside it."""
_ENDINGS = (".html", ".htm")

_FIXED = (
    *("top", "summary", "protocol", "efficiency", "claims", "mechanisms", "t-mechanisms"),
    *("controls", "query", "kind", "traits", "reset", "count"),
)
"""Ids of the template."""


def render(
    records: Iterable[Record],
    claims: Sequence[Published] = (),
    now: Mapping[str, Current] | None = None,
    measured: Mapping[str, Any] | None = None,
    draw: Draw | None = pattern,
    *,
    index: str = INDEX,
    folder: str = PAGES,
) -> dict[str, str]:
    """Return the pages for a set of records, by path; that of the tables comes last.

    Args:
        records: Records in any order; the same record twice counts once.
        claims: Claims with their verdicts, whose records stand in no other table.
        now: Recipes as they are now, by name.
        measured: Measurements of `zoo bench`, by name.
        draw: Says which pairs of a mechanism meet; None leaves all pictures out, those of the
            records too.
        index: Name of the page of the tables.
        folder: Name of the folder of the mechanisms' pages beside it.

    Raises:
        ZooError: Records of different budgets claim to belong into one table.
    """
    board = assemble(records, claims, now)
    ids, files = Ids(set(_FIXED)), Ids()
    specs = [row.attention for table in board.tables for row in table.rows]
    named = [name for spec in specs for _, name in mechanisms.parts(spec)]
    named += [name for one in claims for _, name in mechanisms.parts(one.verdict.claim.mechanism)]
    found = {}
    for name in mechanisms.ordered(named):
        address = f"{quote(folder)}/{files.file(name, '.html')}"
        found[name] = mechanisms.describe(name, ids.new("m", name), address, draw)
    tables = Tables(found, ids, f"../{quote(index)}")
    costs = markdown(efficiency.section(dict(measured))) if measured else Markup()
    drawn = {} if draw is None else figures.pictures(board, measured)
    shown = {name: drawing.figure(one.caption, one.svg()) for name, one in drawn.items()}
    first = _index(board, found, tables, costs, shown)
    pages = {f"{folder}/{Path(one.address).name}": one for one in found.values()}
    return {**_pages(pages, tables), index: first}


def pages(
    folder: str | Path, index: str = INDEX, beside: str = PAGES
) -> tuple[dict[str, str], int]:
    """Render the records of a folder and of the folders in it.

    Args:
        folder: Folder of the records; those in its folder `claims` belong to claims.
        index: Name of the page of the tables.
        beside: Name of the folder of the mechanisms' pages beside it.

    Returns:
        The pages by path, and the number of records read.

    Raises:
        ZooError: There is no such folder, or a verdict is not what its records give.
    """
    records, claims = read_all(folder, recursive=True, without=FOLDER), published(folder)
    count = sum(len(runs) for one in claims for runs in one.verdict.ids.values())
    now, measured = current(records), efficiency.measurements(folder)
    found = render(records, claims, now, measured, index=index, folder=beside)
    return found, len(records) + count


def write(folder: str | Path, path: str | Path) -> tuple[Path, int, int]:
    """Render the records of a folder, and of the folders in it, to files, each in one step.

    Pages of mechanisms that there are no more are named in a `RecordWarning` and left alone.

    Args:
        folder: Folder of the records.
        path: Folder of the pages, or the page of the tables, which ends in ``.html``.

    Returns:
        The page of the tables, the number of pages beside it and of records read.

    Raises:
        ZooError: There is no such folder of records, a verdict is not what its records give, or
            the pages cannot be written.
    """
    first, beside = places(path)
    found, count = pages(folder, first.name, beside.name)
    replace_texts({first.parent / name: text for name, text in found.items()})
    others = sorted(
        one.name for one in beside.glob("*.html") if f"{beside.name}/{one.name}" not in found
    )
    if others:
        names = ", ".join(others)
        warnings.warn(f"{beside} has pages of no mechanism: {names}", RecordWarning, 2)
    return first, len(found) - 1, count


def places(path: str | Path) -> tuple[Path, Path]:
    """Return where the page of the tables goes, and the folder of the others beside it.

    Args:
        path: A folder, or a file that ends in ``.html``.

    Raises:
        ZooError: Something else is in the way.
    """
    path = Path(path)
    allowed = "allowed: a folder, which is created, or a file that ends in .html"
    if path.suffix.lower() in _ENDINGS:
        first = path
        beside = path.with_name(PAGES if path.stem == "index" else f"{path.stem}_{PAGES}")
    elif path.suffix.lower() == ".md":
        raise ZooError(f"page={str(path)!r} is no HTML page; {allowed}")
    else:
        first, beside = path / INDEX, path / PAGES
    try:
        there = [one for one in (*reversed(first.parents), beside) if one.exists()]
        for one in there:
            if not one.is_dir():
                raise ZooError(f"page={str(path)!r}: {one} is a file, not a folder; {allowed}")
        if first.is_dir():
            raise ZooError(f"page={str(path)!r}: {first} is a folder, not a page; {allowed}")
    except OSError as error:
        raise ZooError(f"page={str(path)!r}: {error.strerror or error}; {allowed}") from None
    if there and not os.access(there[-1], os.W_OK | os.X_OK):
        raise ZooError(f"page={str(path)!r}: the folder {there[-1]} cannot be written; {allowed}")
    return first, beside


def _index(
    board: Board,
    found: Mapping[str, mechanisms.Mechanism],
    tables: Tables,
    costs: Markup,
    shown: Mapping[str, Picture],
) -> str:
    """The page of the tables; it tells `tables` who stands where."""
    summary = [
        {"baseline": one.baseline, "recipes": one.recipes, "grid": tables.places(one)}
        for one in summaries(board)
    ]
    tracks = [
        {
            "id": tables.ids.new("track", one.track.name),
            "track": one.track,
            "tables": [
                {
                    "board": table,
                    "grid": tables.standings(table, one.track),
                    "about": markdown(standings.about(table)),
                    "notes": markdown(standings.remarks(table, one.track)),
                    "figures": _figures_of(table, shown),
                }
                for table in one.tables
            ],
        }
        for one in board.tracks
    ]
    ledger = tables.ledger(board.claims) if board.claims else None
    outcomes = Counter(
        claim_table.STALE if one.stale else one.verdict.outcome for one in board.claims
    )
    runs = [run for table in board.tables for row in table.rows for run in row.runs]
    claimed = [run for one in board.claims for runs in one.verdict.ids.values() for run in runs]
    return filled(
        "index",
        places=summary,
        tracks=tracks,
        ledger=ledger,
        protocol=markdown(leaderboard.PROTOCOL.partition("## Protocol\n")[2]),
        rule=markdown(claim_table.RULE),
        efficiency=costs,
        overall=[shown[name] for name in shown if name == "places.svg"],
        growth=[shown[name] for name in shown if name.endswith("growth.svg")],
        verdicts=[(o, outcomes[o]) for o in (*OUTCOMES, claim_table.STALE) if outcomes[o]],
        kinds=list(dict.fromkeys(one.kind for one in found.values())),
        mechanisms=found,
        overview=tables.overview(),
        counts=_counts(board, found, tables, len(runs), len(claimed)),
    )


def _pages(found: Mapping[str, mechanisms.Mechanism], tables: Tables) -> dict[str, str]:
    """The page of each mechanism by path, once all tables are made."""
    order = list(found)
    after = dict(pairwise(order))
    before = {later: path for path, later in after.items()}
    made = {}
    for path, one in found.items():
        steps = [("Previous", "prev", before.get(path)), ("Next", "next", after.get(path))]
        made[path] = filled(
            "mechanism",
            one=one,
            home=tables.home,
            steps=[
                (word, relation, Path(other).name, found[other].name)
                for word, relation, other in steps
                if other is not None
            ],
            panels=[(panel.title, drawing.square(panel)) for panel in _panels(one)],
            records=tables.records(one.name),
            claims=tables.judged(one.name),
        )
    return made


def _panels(one: mechanisms.Mechanism) -> Sequence[Any]:
    return one.pattern.panels if one.pattern else ()


def _figures_of(table: TableBoard, shown: Mapping[str, Picture]) -> list[Picture]:
    names = [f"{table.key.recipe}_{kind}.svg" for kind in figures.KINDS if not table.stale]
    return [shown[name] for name in names if name in shown]


def _counts(
    board: Board,
    found: Mapping[str, mechanisms.Mechanism],
    tables: Tables,
    runs: int,
    claimed: int,
) -> list[tuple[str, int]]:
    stale = sum(table.stale for table in board.tables)
    pairs = [
        ("tables", len(board.tables) - stale),
        ("stale tables", stale),
        ("runs in tables", runs),
        ("claims", len(board.claims)),
        ("runs of claims", claimed),
        ("mechanisms", sum(one.entry is not None for one in found.values())),
        ("with records or claims", sum(n in tables.mentions or n in tables.claims for n in found)),
    ]
    return [(name, count) for name, count in pairs if count]
