"""What the leaderboard shows, as data: tracks, tables, places, and what may not be compared.

    board = assemble(records, claims, current(records))

The page, the HTML and the figures are views of it. A table holds the runs that share everything but
attention, learning rate and seed. A row has a place in it if it was made by the protocol: every
learning rate of the recipe tried, the rate chosen run at enough seeds, and no more parameters than
the track allows. Other rows are shown without a place, with what they lack. Tables whose recipe has
been changed since are stale: they are shown, and count for nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import rankdata

from zoo.claims.trials import Published
from zoo.errors import ZooError
from zoo.leaderboard import tracks
from zoo.leaderboard.current import Current, differing, is_stale, settings_of, since
from zoo.leaderboard.tracks import Contender, Track
from zoo.report.markdown import figures
from zoo.runs import config as configs
from zoo.runs.records import Record
from zoo.statistics import spread as stats
from zoo.statistics.spread import OUTCOMES, Paired, Row, Spread, Table

SEEDS = 3
"""Seeds that a comparison needs."""


@dataclass(frozen=True)
class Standing:
    """A row and its place.

    Args:
        row: Its figures.
        rank: Its place, shared by equal rounded means; None without one.
        faults: Why it has no place.
        difference: Paired difference to the baseline; None without shared seeds.
        outcome: win, tie or loss against the baseline; None if that is not known.
    """

    row: Row
    rank: int | None
    faults: tuple[str, ...]
    difference: Paired | None
    outcome: str | None


@dataclass(frozen=True)
class TableBoard:
    """One table.

    Args:
        key: What its runs share.
        standings: Rows in the order of their places, those without one last.
        baseline: The row that the others are compared with, or None.
        rates: Learning rates that each row has to try.
        stale: Whether the recipe has been changed since.
        settings: What tells it from the recipe as it is now, or from the other tables of its
            recipe: settings by dotted key, each as JSON text.
        absent: Mechanisms that the model cannot host, with the reason.
        missing: Specifications that might stand here and have no record.
    """

    key: Table
    standings: tuple[Standing, ...]
    baseline: Row | None
    rates: tuple[float, ...]
    stale: bool
    settings: Mapping[str, str]
    absent: tuple[Contender, ...]
    missing: tuple[str, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows without their places."""
        return [one.row for one in self.standings]

    @property
    def ranked(self) -> list[Standing]:
        """The rows with a place."""
        return [one for one in self.standings if one.rank is not None]


@dataclass(frozen=True)
class TrackBoard:
    """The tables of a track.

    Args:
        track: The track.
        tables: Its tables, stale ones last.
    """

    track: Track
    tables: tuple[TableBoard, ...]

    @property
    def counted(self) -> list[TableBoard]:
        """The tables that are not stale."""
        return [table for table in self.tables if not table.stale]

    def ranks(self) -> dict[str, Spread]:
        """Return the places by specification: mean and deviation over all tables and seeds.

        At each seed all rows with a figure are ranked anew; equal figures share the mean of their
        places.
        """
        found: dict[str, list[float]] = defaultdict(list)
        for table in self.counted:
            rows = [one.row for one in table.ranked]
            sign = -1 if table.key.mode == "max" else 1
            for seed in sorted({seed for row in rows for seed in row.values}):
                there = [row for row in rows if seed in row.values]
                places = rankdata([sign * row.values[seed] for row in there])
                for row, place in zip(there, places, strict=True):
                    found[row.attention].append(float(place))
        return {name: spread for name in found if (spread := stats.spread(found[name]))}

    def outcomes(self) -> dict[str, dict[str, int]]:
        """Return the numbers of wins, ties and losses by specification."""
        found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(OUTCOMES, 0))
        for table in self.counted:
            for one in table.ranked:
                if one.outcome is not None:
                    found[one.row.attention][one.outcome] += 1
        return dict(found)


@dataclass(frozen=True)
class Board:
    """Everything that the leaderboard shows.

    Args:
        tracks: The tracks with records, in their order.
        claims: The claims with their verdicts.
    """

    tracks: tuple[TrackBoard, ...]
    claims: tuple[Published, ...]

    @property
    def tables(self) -> list[TableBoard]:
        """The tables of all tracks."""
        return [table for track in self.tracks for table in track.tables]


def assemble(
    records: Iterable[Record],
    claims: Sequence[Published] = (),
    now: Mapping[str, Current] | None = None,
) -> Board:
    """Sort records into tracks, tables and places.

    Args:
        records: Records in any order; the same record twice counts once.
        claims: Claims with their verdicts.
        now: Recipes as they are now, by name; a table of another recipe is never stale.

    Raises:
        ZooError: Records of different budgets claim to belong into one table.
    """
    found = stats.tables(stats.summarise(records))
    for key, rows in found.items():
        refuse_mixed(key, rows)
    flats = {key: settings_of(rows) for key, rows in found.items()}
    by_track: dict[str, list[TableBoard]] = defaultdict(list)
    for key, rows in found.items():
        recipe = (now or {}).get(key.recipe)
        others = [flats[other] for other in found if other.recipe == key.recipe]
        by_track[key.track].append(_table(key, rows, recipe, flats[key], others))
    order = [one.name for one in tracks.tracks()]
    names = sorted(by_track, key=lambda name: (_place(name, order), name))
    return Board(
        tuple(
            TrackBoard(
                tracks.track(name), tuple(sorted(by_track[name], key=lambda table: table.stale))
            )
            for name in names
        ),
        tuple(claims),
    )


def refuse_mixed(key: Table, rows: Iterable[Row]) -> None:
    """Refuse a table whose finished runs did not have the same number of steps and examples.

    Args:
        key: The table.
        rows: Its rows.

    Raises:
        ZooError: Two runs differ; both are named.
    """
    runs = [
        run
        for row in rows
        for run in row.runs
        if run.status == "finished" and not _may_stop(run.config)
    ]
    for run in runs[1:]:
        if (run.steps, run.examples) != (runs[0].steps, runs[0].examples):
            raise ZooError(
                f"different budgets in the table of {key.recipe!r}: {runs[0].id} has "
                f"{runs[0].steps} steps and {runs[0].examples} examples, {run.id} has {run.steps} "
                f"and {run.examples}; remove one of them"
            )
    for run in runs:
        if run.group != (held := configs.group_of(run.config)) and held is not None:
            raise ZooError(
                f"different budgets in the table of {key.recipe!r}: {run.id} says that its group "
                f"is {run.group[:12]}, but its settings are those of {held[:12]}"
            )


def _may_stop(config: Mapping[str, Any]) -> bool:
    trainer = config.get("trainer", {})
    return trainer.get("stop_at") is not None or trainer.get("max_minutes") is not None


def _table(
    key: Table,
    rows: list[Row],
    recipe: Current | None,
    own: Mapping[str, set[str]],
    others: Sequence[Mapping[str, set[str]]],
) -> TableBoard:
    track = tracks.track(key.track)
    baseline = find_baseline(rows, track)
    stale = recipe is not None and is_stale(key, recipe.group)
    if recipe is not None and not stale:
        rates = recipe.rates
    else:
        rates = baseline.lrs if baseline is not None else tuple(sorted({*rows[0].lrs}))
    here = {row.attention for row in rows}
    contenders = () if recipe is None or stale else recipe.contenders
    return TableBoard(
        key,
        tuple(_standings(key, rows, baseline, rates, track)),
        baseline,
        rates,
        stale,
        since(own, recipe.settings) if recipe is not None and stale else differing(own, others),
        tuple(one for one in contenders if one.reason is not None),
        tuple(one.spec for one in contenders if one.reason is None and one.spec not in here),
    )


def find_baseline(rows: Iterable[Row], track: Track) -> Row | None:
    """Return the row that the others of a table are compared with, or None.

    Args:
        rows: The rows of a table.
        track: Its track.
    """
    if stats.is_softmax(track.baseline):
        return stats.baseline(rows)
    return next((row for row in rows if row.attention == track.baseline), None)


def _standings(
    key: Table, rows: Sequence[Row], baseline: Row | None, rates: tuple[float, ...], track: Track
) -> list[Standing]:
    sign = -1 if key.mode == "max" else 1
    means = {id(row): row.spread and figures(row.spread.mean)[0] for row in rows}
    faults = {id(row): _faults(row, baseline, rates, track) for row in rows}

    def order(row: Row) -> tuple[bool, bool, float, str]:
        mean = means[id(row)]
        return mean is None, bool(faults[id(row)]), sign * float(mean or 0), row.attention

    ranked = sorted(rows, key=order)
    places = [means[id(row)] for row in ranked if not faults[id(row)]]
    found = []
    for row in ranked:
        mean = means[id(row)]
        placed = mean is not None and not faults[id(row)]
        against = None
        if baseline is not None and row is not baseline:
            against = stats.paired(row.values, baseline.values)
        rank = places.index(mean) + 1 if placed else None
        outcome = against and against.outcome(key.mode)
        found.append(Standing(row, rank, faults[id(row)], against, outcome))
    return found


def _faults(
    row: Row, baseline: Row | None, rates: tuple[float, ...], track: Track
) -> tuple[str, ...]:
    found = []
    if untried := [f"{rate:g}" for rate in rates if rate not in row.lrs]:
        found.append(f"learning rates not tried: {', '.join(untried)}")
    if further := [f"{rate:g}" for rate in row.lrs if rate not in rates]:
        found.append(f"learning rates beyond the others': {', '.join(further)}")
    if row.attempts < SEEDS:
        found.append(f"seeds: {row.attempts} of {SEEDS}")
    ours, theirs = row.median("parameters"), baseline and baseline.median("parameters")
    # Floors and ceilings are marks, of whatever size they are.
    too_large = ours is not None and theirs and ours > track.size * theirs
    if ours is not None and theirs and too_large and row.attention not in track.fixed:
        found.append(f"parameters: {ours / theirs:.2f} times the baseline's")
    return tuple(found)


def _place(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)
