"""The leaderboard: one Markdown page made from the records alone.

The same records and recipes give the same bytes, in whatever order they come and on whatever day:
no clock and no locale has a say. `render` is the page, `write` puts it in place, and `verify` tells
whether a page on disk is still the one that its records give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.runs import claim_table, efficiency, standings, stats
from zoo.runs.board import OUTCOMES, SEEDS, Board, Current, TrackBoard, assemble, current
from zoo.runs.claims import FOLDER, Published, published
from zoo.runs.markdown import NONE, code, table, words
from zoo.runs.records import Record, read_all, replace_text

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
  exclude zero, everything else is a *tie*. With {SEEDS} seeds the intervals are wide, and with many
  rows some exclude zero by chance.
- **Solved or not.** Where a task has a threshold, the number of seeds that reached it stands beside
  the mean, since such figures are bimodal.
- **Floors and ceilings.** Every table has its baseline, its floors (what the host reaches without
  the mechanism) and, where there is one, a ceiling (`gru`: what a recurrent layer reaches).
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
    figures: Sequence[tuple[str, str]] = (),
    measured: Mapping[str, Any] | None = None,
) -> str:
    """Return the page for a set of records.

    Args:
        records: Records in any order; the same record twice counts once.
        claims: Claims with their verdicts, whose records stand in no other table.
        now: Recipes as they are now, by name.
        figures: Caption and address of each picture.
        measured: Measurements of `zoo bench`, by name.

    Raises:
        ZooError: Records of different budgets claim to belong into one table.
    """
    board = assemble(records, claims, now)
    stated = [claim_table.section(claims)] if claims else []
    if not board.tracks:
        return "\n".join([PROTOCOL, *(stated or ["There are no records yet.\n"])])
    parts = [PROTOCOL, "## Summary\n", *_summary(board), *_pictures(figures), *stated]
    for track in board.tracks:
        parts.append(_heading(track))
        parts += [standings.section(table, track.track) for table in track.tables]
    if measured:
        parts.append(efficiency.section(dict(measured)))
    return "\n".join(parts)


def page(folder: str | Path) -> tuple[str, int]:
    """Render the records of a folder and of the folders in it.

    The records of claims, in the folder `claims` inside it, stand in a section of their own.

    Args:
        folder: Folder of the records.

    Returns:
        The page and the number of records read.

    Raises:
        ZooError: There is no such folder, or a verdict is not what its records give.
    """
    records, claims = read_all(folder, recursive=True, without=FOLDER), published(folder)
    count = sum(len(ids) for one in claims for ids in one.verdict.ids.values())
    now = current({record.recipe for record in records})
    measured = efficiency.measurements(folder)
    return render(records, claims, now, measured=measured), len(records) + count


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
    wanted = page(folder)[0].encode()
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
        + (f"; ceiling: {code(track.track.ceiling)}" if track.track.ceiling else "")
        + f"; parameters: at most {track.track.size:g} times the baseline's.\n"
    )


def _pictures(figures: Sequence[tuple[str, str]]) -> list[str]:
    if not figures:
        return []
    return ["## Figures\n", *(f"![{words(caption)}]({path})\n" for caption, path in figures)]


def _summary(board: Board) -> list[str]:
    """Return one table for the tracks of each baseline: places and outcomes."""
    baselines = dict.fromkeys(track.track.baseline for track in board.tracks if track.counted)
    parts = []
    for name in baselines:
        found = [t for t in board.tracks if t.track.baseline == name and t.counted]
        recipes = sum(len(track.counted) for track in found)
        parts.append(
            f"Against {code(name)}, over {recipes} recipe{'s' * (recipes != 1)}: mean place ± its "
            "standard deviation over recipes and seeds, in brackets how many; win / tie / loss "
            "are tables.\n"
        )
        parts.append(_places(name, found))
    return parts or ["No table counts: all are stale.\n"]


def _places(baseline: str, found: Sequence[TrackBoard]) -> str:
    ranks = [track.ranks() for track in found]
    outcomes = [track.outcomes() for track in found]
    names = sorted({name for one in ranks for name in one})
    total = {
        name: [sum(one.get(name, {}).get(kind, 0) for one in outcomes) for kind in OUTCOMES]
        for name in names
    }

    def order(name: str) -> tuple[bool, float, str]:
        places = [one[name].mean for one in ranks if name in one]
        return len(places) < len(found), sum(places) / len(places), name

    lines = []
    for name in sorted(names, key=order):
        cells = [code(name)]
        for one in ranks:
            place = one.get(name)
            if place is None:
                cells.append(NONE)
            else:
                spread = "" if place.std is None else f" ± {place.std:.1f}"
                cells.append(f"{place.mean:.1f}{spread} ({place.n})")
        is_baseline = name == baseline or (stats.is_softmax(baseline) and stats.is_softmax(name))
        cells.append("baseline" if is_baseline else " / ".join(map(str, total[name])))
        lines.append(cells)
    header = ["attention", *(words(track.track.title) for track in found), "win / tie / loss"]
    return table(header, lines)
