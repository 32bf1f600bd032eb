"""The leaderboard as one HTML page that needs nothing else: tables, claims and mechanisms.

`zoo leaderboard --html` writes it. Style, script and pictures are inside it, nothing is loaded from
anywhere, and the same records, recipes and registry give the same bytes. The address says how the
page is looked at, so that a view can be sent on:

    #kind=position&trait=causal,no-decode&q=rope&sort=t-mqar-836e5c46:mean:down&at=m-rope

Without JavaScript it is the same page, unsorted and unfiltered.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
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
from zoo.leaderboard.page._html_grid import Ids
from zoo.leaderboard.page._html_pictures import Picture
from zoo.leaderboard.page._html_tables import Tables
from zoo.leaderboard.page._html_text import markdown
from zoo.leaderboard.summary import summaries
from zoo.registry import Entry
from zoo.report.files import replace_text
from zoo.runs.records import Record, read_all

Draw = Callable[[Entry], Picture]

_FIXED = (
    *("top", "summary", "protocol", "efficiency", "claims", "mechanisms"),
    *("controls", "query", "kind", "traits", "reset", "count"),
)
"""Ids of the template."""


def render(
    records: Iterable[Record],
    claims: Sequence[Published] = (),
    now: Mapping[str, Current] | None = None,
    measured: Mapping[str, Any] | None = None,
    draw: Draw | None = drawing.picture,
) -> str:
    """Return the page for a set of records.

    Args:
        records: Records in any order; the same record twice counts once.
        claims: Claims with their verdicts, whose records stand in no other table.
        now: Recipes as they are now, by name.
        measured: Measurements of `zoo bench`, by name.
        draw: Draws a mechanism; None leaves all pictures out, those of the records too.

    Raises:
        ZooError: Records of different budgets claim to belong into one table.
    """
    board = assemble(records, claims, now)
    ids = Ids(
        {"top", "summary", "protocol", "claims", "mechanisms", "controls", "count", "efficiency"}
    )
    specs = [row.attention for table in board.tables for row in table.rows]
    named = [name for spec in specs for _, name in mechanisms.parts(spec)]
    named += [name for one in claims for _, name in mechanisms.parts(one.verdict.claim.mechanism)]
    names = mechanisms.ordered(named)
    pictures = _pictures(names, draw)
    found = {name: mechanisms.describe(name, ids.new("m", name), pictures) for name in names}
    costs = markdown(efficiency.section(dict(measured))) if measured else Markup()
    drawn = {} if draw is None else figures.pictures(board, measured)
    shown = {name: drawing.figure(one.caption, one.svg()) for name, one in drawn.items()}
    return _page(board, found, Tables(found, ids), ids, costs, shown)


def page(folder: str | Path) -> tuple[str, int]:
    """Render the records of a folder and of the folders in it.

    Args:
        folder: Folder of the records; those in its folder `claims` belong to claims.

    Returns:
        The page and the number of records read.

    Raises:
        ZooError: There is no such folder, or a verdict is not what its records give.
    """
    records, claims = read_all(folder, recursive=True, without=FOLDER), published(folder)
    count = sum(len(runs) for one in claims for runs in one.verdict.ids.values())
    now = current(records)
    text = render(records, claims, now, efficiency.measurements(folder))
    return text, len(records) + count


def write(folder: str | Path, path: str | Path) -> tuple[Path, int]:
    """Render the records of a folder, and of the folders in it, to a file in one step.

    Args:
        folder: Folder of the records.
        path: The page.

    Returns:
        The path and the number of records read.

    Raises:
        ZooError: There is no such folder, a verdict is not what its records give, or the page
            cannot be written.
    """
    text, count = page(folder)
    return replace_text(path, text), count


def _pictures(names: Iterable[str], draw: Draw | None) -> dict[str, Picture | str | None]:
    """Draw each specification once; who shares it with another is told whose it is."""
    found: dict[str, Picture | str | None] = {}
    owners: dict[str, str] = {}
    for name in names:
        entry = mechanisms.find(name)
        spec = None if entry is None or draw is None else drawing.shown(entry)
        if entry is None or draw is None or spec is None:
            continue
        if spec in owners:
            found[name] = owners[spec]
            continue
        try:
            found[name] = draw(entry)
        except ZooError:  # it cannot be built at the size of the pictures
            continue
        owners[spec] = name
    return found


def _page(
    board: Board,
    found: Mapping[str, mechanisms.Mechanism],
    tables: Tables,
    ids: Ids,
    costs: Markup,
    shown: Mapping[str, Picture],
) -> str:
    places = [
        {"baseline": one.baseline, "recipes": one.recipes, "grid": tables.places(one)}
        for one in summaries(board)
    ]
    tracks = [
        {
            "id": ids.new("track", one.track.name),
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
    groups: dict[str, list[mechanisms.Mechanism]] = {}
    for one in found.values():
        groups.setdefault(one.kind, []).append(one)
    runs = [run for table in board.tables for row in table.rows for run in row.runs]
    claimed = [run for one in board.claims for runs in one.verdict.ids.values() for run in runs]
    shared = {
        "style": _asset("page.css"),
        "script": _asset("page.js"),
        "protocol": markdown(leaderboard.PROTOCOL.partition("## Protocol\n")[2]),
        "rule": markdown(claim_table.RULE),
        "traits": mechanisms.TRAITS,
        "gone": mechanisms.GONE,
        "kinds": list(groups),
    }
    return _template().render(
        **shared,
        hashes={name: _hash(str(shared[name])) for name in ("style", "script")},
        places=places,
        tracks=tracks,
        ledger=ledger,
        efficiency=costs,
        overall=[shown[name] for name in shown if name == "places.svg"],
        growth=[shown[name] for name in shown if name.endswith("growth.svg")],
        verdicts=[(o, outcomes[o]) for o in (*OUTCOMES, claim_table.STALE) if outcomes[o]],
        groups=groups,
        mechanisms=found,
        records={name: tables.records(name) for name in found},
        claims=tables.claims,
        counts=_counts(board, found, tables, len(runs), len(claimed)),
    )


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


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("zoo.leaderboard.page", "_html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja")


def _asset(name: str) -> Markup:
    """Return a file of ours that stands in the page as it is."""
    file = resources.files("zoo.leaderboard.page") / "_html" / name
    return Markup(file.read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    """Return what a browser must find before it runs a script or applies a style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
