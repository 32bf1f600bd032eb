"""The figures of the leaderboard: SVG from the records, the same bytes for the same records.

Quality against training throughput with the Pareto front, validation curves, figures by length, and
places by track, one file each. Baseline, floors and the recurrent layer are marked; of the others
the best few are coloured, and the rest stand in grey behind them.
"""

from __future__ import annotations

import io
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from zoo.leaderboard.board import Board, Standing, TableBoard, TrackBoard
from zoo.leaderboard.page._growth import against_length
from zoo.leaderboard.page._labels import place
from zoo.report.files import replace_text
from zoo.statistics.spread import Spread

FOLDER = "figures"
"""Name of the folder of figures, beside that of the records."""

KINDS = ("throughput", "lengths", "curves")
"""What is drawn of each table."""

# Okabe and Ito's colours, which most eyes can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#b0b0b0"
_SHOWN = 4  # coloured beside the marks
# The figure of places: columns of panels, and inches of what they are made of.
_ABREAST = 3
_ROW, _TITLE, _AXIS = 0.2, 0.4, 0.45
_PANEL, _LETTER, _GAP = 1.7, 0.072, 0.15
_MARKS = ("baseline", "floor", "recurrent")
_STYLES = {"baseline": "-", "floor": ":", "recurrent": "--", "": "-"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zoo",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Picture(NamedTuple):
    """A figure that can be drawn: its caption, and what draws it."""

    caption: str
    make: Callable[[], Figure]

    def svg(self) -> str:
        """Draw it."""
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": "zoo leaderboard", "Title": self.caption}
        with rc_context(_STYLE):
            self.make().savefig(buffer, format="svg", metadata=metadata, bbox_inches="tight")
        return buffer.getvalue()


def pictures(board: Board, measured: Mapping[str, Any] | None = None) -> dict[str, Picture]:
    """Return every figure that there are records for, by the names of their files.

    Args:
        board: What the leaderboard shows.
        measured: Measurements of `zoo bench`, by name.
    """
    found: dict[str, Picture] = {}
    if any(track.ranks() for track in board.tracks):
        found["places.svg"] = Picture(
            "Mean place by track, with its standard deviation over recipes and seeds",
            partial(_places, board),
        )
    for track in board.tracks:
        for table in track.counted:
            found |= _of_table(track, table)
    for name, content in sorted((measured or {}).items()):
        if "lengths" in content["setting"]:
            found[f"{name}_growth.svg"] = Picture(
                "Time and memory of a layer against the number of tokens, forward and backward",
                partial(against_length, content),
            )
    return found


def write(found: Mapping[str, Picture], folder: str | Path) -> list[str]:
    """Write figures, and return the names of other SVG files in the folder, which are left alone.

    Args:
        found: What `pictures` returned.
        folder: Where they go; it is created.

    Raises:
        ZooError: The folder cannot be written.
    """
    folder = Path(folder)
    for name, picture in found.items():
        replace_text(folder / name, picture.svg())
    return sorted(path.name for path in folder.glob("*.svg") if path.name not in found)


def pareto(points: Iterable[tuple[float, float]], *, lower: bool) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both coordinates, from left to right.

    Args:
        points: Throughput, of which more is better, and quality.
        lower: Whether less quality figure is better.
    """
    sign = 1 if lower else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], sign * point[1])):
        if not front or sign * y < sign * front[-1][1]:
            front.append((x, y))
    return front[::-1]


def lengths(table: TableBoard) -> list[tuple[int, str]]:
    """Return the lengths at which a table's figure was measured, and the name of each figure.

    Args:
        table: The table.
    """
    short = table.key.report.rpartition("/")[2]
    runs = [run for one in table.standings for run in one.row.records]
    names = {name for run in runs for name in run.metrics}
    trained = {run.config.get("data", {}).get("seq_len") for run in runs}
    found = {(length, f"test/{short}") for length in trained if isinstance(length, int)}
    if f"test/{short}" not in names or len(found) > 1:
        found = set()
    for name in names:
        split, _, figure = name.rpartition("/")
        number = re.fullmatch(r"test_[a-z]*(\d+)", split)
        if figure == short and number is not None:
            found.add((int(number[1]), name))
    # A set at the length of training says what the plain one says.
    plain = {length for length, name in found if name == f"test/{short}"}
    found = {(n, name) for n, name in found if n not in plain or name == f"test/{short}"}
    return sorted(found) if len(found) > 1 else []


def _of_table(track: TrackBoard, table: TableBoard) -> dict[str, Picture]:
    recipe, ranked = table.key.recipe, table.ranked
    if len(ranked) < 2:
        return {}
    about = f"{table.key.report} of {recipe}"
    found = {
        f"{recipe}_throughput.svg": Picture(
            f"{about} against training throughput; the line is the Pareto front",
            partial(_throughput, track, table),
        ),
        f"{recipe}_curves.svg": Picture(
            f"{table.key.select} of {recipe} during training, means over seeds",
            partial(_curves, track, table),
        ),
    }
    if marks := lengths(table):
        short = table.key.report.rpartition("/")[2]
        found[f"{recipe}_lengths.svg"] = Picture(
            f"{short} of {recipe} by length", partial(_by_length, track, table, marks)
        )
    return found


def _part(track: TrackBoard, name: str, table: TableBoard) -> str:
    if table.baseline is not None and name == table.baseline.attention:
        return "baseline"
    if name in track.track.floors:
        return "floor"
    return "recurrent" if name == track.track.ceiling else ""


def _colours(track: TrackBoard, table: TableBoard) -> dict[str, str]:
    """Return the colours of the marks and of the best few; the others have none."""
    names = [one.row.attention for one in table.ranked]
    marks = [name for name in names if _part(track, name, table)]
    best = [name for name in names if name not in marks][:_SHOWN]
    shades = dict(zip(best, COLOURS, strict=False))
    for name in marks:
        part = _part(track, name, table)
        shades[name] = {"baseline": "#000000", "floor": "#7f7f7f", "recurrent": "#8c564b"}[part]
    return shades


def _throughput(track: TrackBoard, table: TableBoard) -> Figure:
    figure = Figure(figsize=(7.5, 5))
    axis = figure.subplots()
    colours = _colours(track, table)
    points: dict[str, tuple[float, float]] = {}
    for one in table.ranked:
        rate, spread = _rate(one), one.row.spread
        if rate is None or spread is None:
            continue
        name = one.row.attention
        points[name] = rate, spread.mean
        axis.errorbar(
            rate,
            spread.mean,
            yerr=spread.std,
            fmt="s" if _part(track, name, table) else "o",
            color=colours.get(name, _GREY),
            ms=5,
            elinewidth=0.8,
            capsize=2,
        )
    front = pareto(points.values(), lower=table.key.mode == "min")
    axis.plot(*zip(*front, strict=True), color="#555555", lw=0.8, zorder=0)
    axis.set_xscale("log")
    _plain_ticks(axis, [rate for rate, _ in points.values()])
    second = "processor second" if _on_cpu(table) else "second"
    axis.set_xlabel(f"training throughput (examples per {second}), {_devices(table)}")
    axis.set_ylabel(_axis(table))
    axis.margins(0.12)
    place(axis, points, colours, _GREY)
    return figure


def _on_cpu(table: TableBoard) -> bool:
    types = {run.device["type"] for one in table.ranked for run in one.row.records}
    return types == {"cpu"}


def _rate(one: Standing) -> float | None:
    """Return examples per second of processor time, of elapsed time on a card."""
    rates = []
    for run in one.row.records:
        on_card = run.device["type"] != "cpu"
        time = run.step_time_wall if on_card else run.step_time_cpu
        if time and run.steps:
            rates.append(run.examples / run.steps / time)
    return statistics.median(rates) if rates else None


def _curves(track: TrackBoard, table: TableBoard) -> Figure:
    figure = Figure(figsize=(7.5, 4.6))
    axis = figure.subplots()
    colours = _colours(track, table)
    order = sorted(table.ranked, key=lambda one: one.row.attention in colours)
    handles = {}
    for one in order:
        name = one.row.attention
        steps, means = _history(one, table.key.select)
        shown = name in colours
        (line,) = axis.plot(
            steps,
            means,
            color=colours.get(name, _GREY),
            lw=1.6 if shown else 0.7,
            ls=_STYLES[_part(track, name, table)],
        )
        if shown:
            handles[name] = line
    _legend(axis, track, table, handles)
    axis.set_xlabel("step")
    axis.set_ylabel(
        f"{table.key.select} ({'lower' if table.key.mode == 'min' else 'higher'} is better)"
    )
    return figure


def _history(one: Standing, name: str) -> tuple[list[int], list[float]]:
    found: dict[int, list[float]] = defaultdict(list)
    for run in one.row.records:
        for entry in run.history:
            if name in entry:
                found[int(entry["step"])].append(entry[name])
    steps = sorted(found)
    return steps, [statistics.mean(found[step]) for step in steps]


def _by_length(track: TrackBoard, table: TableBoard, marks: Sequence[tuple[int, str]]) -> Figure:
    figure = Figure(figsize=(7.5, 4.6))
    axis = figure.subplots()
    colours = _colours(track, table)
    handles = {}
    for one in sorted(table.ranked, key=lambda one: one.row.attention in colours):
        row, name = one.row, one.row.attention
        spreads = [
            (length, row.spread if figure_name == table.key.report else row.extra.get(figure_name))
            for length, figure_name in marks
        ]
        there: list[tuple[int, Spread]] = [(n, s) for n, s in spreads if s is not None]
        line = axis.errorbar(
            [n for n, _ in there],
            [s.mean for _, s in there],
            yerr=[s.std or 0.0 for _, s in there] if name in colours else None,
            color=colours.get(name, _GREY),
            lw=1.6 if name in colours else 0.7,
            ls=_STYLES[_part(track, name, table)],
            capsize=2,
        )
        if name in colours:
            handles[name] = line
    axis.set_xscale("log", base=2)
    _plain_ticks(axis, [n for n, _ in marks], exact=True)
    _legend(axis, track, table, handles)
    axis.set_xlabel("length of the test sequences (tokens)")
    short = table.key.report.rpartition("/")[2]
    axis.set_ylabel(_axis(table).replace(table.key.report, short))
    return figure


def _places(board: Board) -> Figure:
    """One panel for each track, as high as it has rows, each put under the shortest column."""
    tracks = [track for track in board.tracks if track.ranks()]
    names = [sorted(t.ranks(), key=lambda n, t=t: (t.ranks()[n].mean, n)) for t in tracks]  # type: ignore[misc]
    columns: list[list[int]] = [[] for _ in tracks[:_ABREAST]]
    ends = [0.0] * len(columns)
    tops: dict[int, float] = {}
    for i, found in enumerate(names):
        shortest = ends.index(min(ends))
        tops[i] = ends[shortest] + _TITLE
        ends[shortest] = tops[i] + _ROW * len(found) + _AXIS
        columns[shortest].append(i)
    labels = [_LETTER * max(len(n) for i in column for n in names[i]) for column in columns]
    width = sum(labels) + len(columns) * (_PANEL + _GAP)
    height = max(ends) + _GAP
    figure = Figure(figsize=(width, height))
    left = 0.0
    for members, label in zip(columns, labels, strict=True):
        left += label + _GAP
        for i in members:
            rows = _ROW * len(names[i])
            bottom = height - tops[i] - rows
            box = (left / width, bottom / height, _PANEL / width, rows / height)
            _places_of(figure.add_axes(box), tracks[i], names[i])
        left += _PANEL
    figure.text(0.0, 0.0, "Black squares: baseline, floors and recurrent layer.", fontsize=9)
    return figure


def _places_of(axis: Axes, track: TrackBoard, names: Sequence[str]) -> None:
    ranks = track.ranks()
    marks = {track.track.baseline, *track.track.floors, track.track.ceiling}
    for level, name in enumerate(names):
        spread = ranks[name]
        axis.errorbar(
            spread.mean,
            level,
            xerr=spread.std,
            fmt="s" if name in marks else "o",
            color="#000000" if name in marks else COLOURS[0],
            ms=4.5,
            elinewidth=0.9,
        )
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(track.track.title, fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel("mean place", fontsize=9)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.grid(axis="y", color="#e4e4e4", lw=0.5)
    axis.set_axisbelow(True)


def _legend(axis: Axes, track: TrackBoard, table: TableBoard, handles: Mapping[str, Any]) -> None:
    names = [one.row.attention for one in table.ranked if one.row.attention in handles]
    labels = []
    for name in names:
        part = _part(track, name, table)
        labels.append(f"{name} ({part})" if part else name)
    axis.legend(
        [handles[name] for name in names],
        labels,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        title="best first; others in grey",
        title_fontsize=8,
    )


def _axis(table: TableBoard) -> str:
    better = "lower" if table.key.mode == "min" else "higher"
    return f"{table.key.report} ({better} is better)"


def _devices(table: TableBoard) -> str:
    names = {run.device["name"] for one in table.ranked for run in one.row.records}
    return ", ".join(sorted(names))


def _plain_ticks(axis: Axes, values: Sequence[float], *, exact: bool = False) -> None:
    """Write the ticks of a logarithmic axis as plain numbers."""
    if exact:
        ticks = list(values)
    else:
        steps = [base * 10**power for power in range(-3, 7) for base in (1, 2, 5)]
        low, high = min(values) / 1.3, max(values) * 1.3
        ticks = [step for step in steps if low <= step <= high]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
