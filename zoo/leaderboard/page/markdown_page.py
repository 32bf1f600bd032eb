"""The leaderboard: one Markdown page made from the records alone.

The same records and recipes give the same bytes, in whatever order they come and on whatever day:
no clock and no locale has a say. `render` is the page, `write` puts it in place, and `verify` tells
whether a page on disk is still the one that its records give.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.claims.trials import FOLDER, Published, published
from zoo.errors import ZooError
from zoo.leaderboard import efficiency
from zoo.leaderboard.board import SEEDS, Board, TrackBoard, assemble
from zoo.leaderboard.current import Current, current
from zoo.leaderboard.page import claim_table, standings
from zoo.leaderboard.page.figures import FOLDER as FIGURES
from zoo.leaderboard.page.figures import KINDS, Picture, pictures
from zoo.leaderboard.page.figures import write as draw
from zoo.leaderboard.page.standings import place as place_text
from zoo.leaderboard.summary import Line, summaries
from zoo.report.files import replace_text
from zoo.report.markdown import NONE, code, table, words
from zoo.runs.records import Record, RecordWarning, read_all
from zoo.statistics.spread import OUTCOMES

COMMAND = "zoo leaderboard"

PROTOCOL = f"""\
# Leaderboard

Made from the run records alone; `{COMMAND}` makes it again, byte for byte.

## Protocol

- **One budget.** Runs share a table only if everything but the attention, the learning rate and the
  seed is equal: host, data and their order, optimiser, number of steps. Records that claim
  otherwise are refused. A table whose recipe was changed since is marked stale and counts for
  nothing.
- **The same tuning.** Every row tries the learning rates of its recipe at seed 0. The rate is
  chosen on validation: the one with the most usable seeds, then the best mean, then the smaller.
- **Test once.** At that rate the checkpoint that was best on validation is measured on the test
  sets, at {SEEDS} seeds or more: mean ± standard deviation (ddof = 1) and, in brackets, the number
  of seeds. One seed has no deviation. Seed 0, at which the rate was chosen, is among them.
- **Paired comparison.** "vs" is the mean difference to the baseline of the track over the shared
  seeds with its 95 % Student t interval, each row for itself. *Win* and *loss* are intervals that
  exclude zero, everything else is a *tie*, as is an interval without width. With {SEEDS} seeds the
  intervals are wide, and with many rows some exclude zero by chance.
- **Solved or not.** Where a task has a threshold, the number of seeds that reached it stands beside
  the mean, since such figures are bimodal.
- **Floors and ceilings.** Every table has its baseline, its floors (what the host reaches without
  the mechanism) and, on sequences, `gru`: what a recurrent layer reaches, which is the ceiling
  where a state is all that a task needs.
- **Failures count.** A run that diverged (nan) or failed (out of memory, out of time) has no
  figure: it shows in the brackets as in "2 of 3", counts as unsolved, and is listed.
- **Size.** A row with more parameters than its track allows is shown without a place, as is one
  that lacks rates or seeds.

Equal rounded means share a place. "lr (tried)" has the rate chosen and the number of rates; "runs"
are those of all rates. Times are medians of one training step, on a machine that did other work
too; FLOPs and state are those of one sequence or image, forward.
"""


def render(
    records: Iterable[Record],
    claims: Sequence[Published] = (),
    now: Mapping[str, Current] | None = None,
    figures: Mapping[str, tuple[str, str]] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> str:
    """Return the page for a set of records.

    Args:
        records: Records in any order; the same record twice counts once.
        claims: Claims with their verdicts, whose records stand in no other table.
        now: Recipes as they are now, by name.
        figures: Caption and address of each picture, by the name of its file.
        measured: Measurements of `zoo bench`, by name.

    Raises:
        ZooError: Records of different budgets claim to belong into one table.
    """
    board = assemble(records, claims, now)
    stated = [claim_table.section(claims)] if claims else []
    if not board.tracks:
        return "\n".join([PROTOCOL, *(stated or ["There are no records yet.\n"])])
    links = dict(figures or {})
    overall = [links[name] for name in links if name == "places.svg" or name.endswith("growth.svg")]
    parts = [PROTOCOL, "## Summary\n", *_summary(board), *_images(overall), *stated]
    for track in board.tracks:
        parts.append(_heading(track))
        for one in track.tables:
            parts.append(standings.section(one, track.track))
            own = [f"{one.key.recipe}_{kind}.svg" for kind in KINDS if not one.stale]
            parts += _images([links[name] for name in own if name in links])
    if measured:
        parts.append(efficiency.section(dict(measured)))
    return "\n".join(parts)


def page(folder: str | Path, beside: str | Path | None = None) -> tuple[str, int]:
    """Render the records of a folder and of the folders in it.

    The records of claims, in the folder `claims` inside it, stand in a section of their own.

    Args:
        folder: Folder of the records.
        beside: Folder of the page; its links to figures, if they are published beside the records,
            start from there. Without it there are none.

    Returns:
        The page and the number of records read.

    Raises:
        ZooError: There is no such folder, or a verdict is not what its records give.
    """
    return _page(_read(folder), beside)


class _Content(NamedTuple):
    """What is published: records, claims, recipes as they are now, measurements, figures."""

    records: list[Record]
    claims: list[Published]
    now: dict[str, Current]
    measured: dict[str, Any]
    drawings: Path

    @property
    def pictures(self) -> dict[str, Picture]:
        """The figures, by their names."""
        return pictures(assemble(self.records, self.claims, self.now), self.measured)


def _read(folder: str | Path) -> _Content:
    records, claims = read_all(folder, recursive=True, without=FOLDER), published(folder)
    now = current(records)
    drawings = Path(folder).resolve().parent / FIGURES
    return _Content(records, claims, now, efficiency.measurements(folder), drawings)


def _page(found: _Content, beside: str | Path | None) -> tuple[str, int]:
    links: dict[str, tuple[str, str]] = {}
    if beside is not None and found.drawings.is_dir():
        start = Path(os.path.relpath(found.drawings, Path(beside).resolve())).as_posix()
        links = {name: (one.caption, f"{start}/{name}") for name, one in found.pictures.items()}
    text = render(found.records, found.claims, found.now, links, found.measured)
    claimed = sum(len(ids) for one in found.claims for ids in one.verdict.ids.values())
    return text, len(found.records) + claimed


def write(folder: str | Path, path: str | Path, *, figures: bool = False) -> tuple[Path, int]:
    """Render the records of a folder, and of the folders in it, to a file in one step.

    Figures are drawn anew in the folder `figures` beside the records, if there is one.

    Args:
        folder: Folder of the records.
        path: The page.
        figures: Whether to make the folder of figures.

    Returns:
        The path and the number of records read.

    Raises:
        ZooError: There is no such folder, a verdict is not what its records give, or the page
            cannot be written.
    """
    found = _read(folder)
    if figures or found.drawings.is_dir():
        others = draw(found.pictures, found.drawings)
        if others:
            names = ", ".join(others)
            warnings.warn(f"{found.drawings} has figures of no record: {names}", RecordWarning, 2)
    text, count = _page(found, Path(path).parent)
    return replace_text(path, text), count


def verify(path: str | Path, folder: str | Path) -> str:
    """Compare a page with what its records give, byte for byte.

    Args:
        path: The page.
        folder: Folder of the records.

    Returns:
        What is out of date, in one line; an empty string if nothing is.

    Raises:
        ZooError: There is no such page or folder.
    """
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read the leaderboard {path}: {error.strerror or error}") from None
    wanted = page(folder, Path(path).parent)[0].encode()
    if found == wanted:
        return ""
    pairs = zip(found.split(b"\n"), wanted.split(b"\n"), strict=False)
    # Two different texts of which one is the beginning of the other differ after the shorter.
    equal = [old == new for old, new in pairs]
    line = equal.index(False) + 1 if False in equal else len(equal)
    return f"{path} is not what {folder} gives, from line {line} on; run `{COMMAND}`"


def _heading(track: TrackBoard) -> str:
    about = f"{words(track.track.description)} " if track.track.description else ""
    fixed = ", ".join(map(code, track.track.floors))
    return (
        f"## Track: {words(track.track.title)}\n\n{about}Baseline: {code(track.track.baseline)}"
        + (f"; floors: {fixed}" if fixed else "")
        + (f"; recurrent: {code(track.track.ceiling)}" if track.track.ceiling else "")
        + f"; parameters: at most {track.track.size:g} times the baseline's.\n"
    )


def _images(found: Sequence[tuple[str, str]]) -> list[str]:
    """Show the first picture and link the others."""
    if not found:
        return []
    (caption, path), *others = found
    parts = [f"![{words(caption)}]({path})\n"]
    if others:
        parts.append("; ".join(f"[{words(text)}]({address})" for text, address in others) + "\n")
    return parts


def _summary(board: Board) -> list[str]:
    """Return one table for the tracks of each baseline: places and outcomes."""
    parts = []
    for one in summaries(board):
        parts.append(
            f"Against {code(one.baseline)}, over {one.recipes} recipe{'s' * (one.recipes != 1)}: "
            "mean place ± its standard deviation over recipes and seeds, in brackets how many; "
            "win / tie / loss are tables.\n"
        )
        titles = (words(track.track.title) for track in one.tracks)
        header = ["attention", *titles, "win / tie / loss"]
        parts.append(table(header, [_line(line) for line in one.lines]))
    return parts or ["No table counts: all are stale.\n"]


def _line(line: Line) -> list[str]:
    places = [NONE if place is None else place_text(place) for place in line.places]
    counts = line.outcomes
    outcomes = "baseline" if counts is None else " / ".join(str(counts[one]) for one in OUTCOMES)
    return [code(line.attention), *places, outcomes]
