"""From records to figures with an uncertainty, by one rule for every mechanism.

Runs are comparable if they share recipe, group and metric. For each attention the learning rate is
chosen on validation: the rate with the most usable seeds, then the best mean of the selecting
metric, then the smaller rate. At that rate the test metric is reported as mean and standard
deviation (ddof = 1) over the seeds. A run that failed or diverged gives no figure; it is counted in
the solve rate, listed, and never left out. Two mechanisms are compared over the seeds they share,
by Student's t interval of the paired differences.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from zoo import checks
from zoo.host.spec import DEFAULTS
from zoo.runs.records import Record, sort_key

OUTCOMES = ("win", "tie", "loss")
"""What a paired comparison may say of the first of the two."""


class Spread(NamedTuple):
    """Mean of `n` figures and their standard deviation, which one figure alone does not have."""

    mean: float
    std: float | None
    n: int


class Paired(NamedTuple):
    """Mean difference over `n` shared seeds and its interval, which one seed does not have."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool | None:
        """Whether zero lies outside the interval; None without an interval."""
        if self.low is None or self.high is None:
            return None
        # Equal differences leave the interval no width: the test set cannot tell them finer.
        return self.low != self.high and (self.low > 0 or self.high < 0)

    def outcome(self, mode: str) -> str | None:
        """Return one of `OUTCOMES` for the first; None without an interval.

        Args:
            mode: Whether the figure is to be "max" or "min".
        """
        if self.excludes_zero is None:
            return None
        if not self.excludes_zero:
            return "tie"
        return "win" if (self.mean > 0) == (mode == "max") else "loss"


class Failure(NamedTuple):
    """A run without a figure: its learning rate, its seed and what became of it."""

    lr: float
    seed: int
    status: str


class Table(NamedTuple):
    """What runs must share to stand in one table."""

    track: str
    recipe: str
    group: str
    select: str
    report: str
    mode: str
    solved: float | None


@dataclass(frozen=True)
class Row:
    """One attention in one table.

    Args:
        table: The table it stands in.
        attention: Canonical specification.
        lr: Learning rate chosen on validation; None if no run gave a figure.
        lrs: Learning rates tried.
        values: Test figure by seed at the chosen rate.
        attempts: Seeds tried at the chosen rate (or at the rate with the most, if none was
            chosen), with or without a figure.
        solved: Seeds that reached the threshold; None where the table has none.
        extra: Spread of every further test metric.
        failures: Every run without a figure, at any rate.
        records: The records at the chosen rate that gave a figure.
        runs: Records that the row is made of, at any rate.
        repeats: Older records of a rate and seed that was run again; they are not counted.
    """

    table: Table
    attention: str
    lr: float | None
    lrs: tuple[float, ...]
    values: Mapping[int, float]
    attempts: int
    solved: int | None
    extra: Mapping[str, Spread]
    failures: tuple[Failure, ...]
    records: tuple[Record, ...]
    runs: tuple[Record, ...]
    repeats: int

    @property
    def spread(self) -> Spread | None:
        """Mean and deviation of the test figure."""
        return spread(self.values.values())

    def median(self, name: str) -> float | None:
        """Return the median of a numeric field of the records with a figure; None if unknown."""
        known = [value for r in self.records if (value := getattr(r, name)) is not None]
        return statistics.median(known) if known else None


def spread(values: Iterable[float]) -> Spread | None:
    """Return mean and standard deviation (ddof = 1); None without values.

    Args:
        values: Finite figures, one a seed.
    """
    figures = list(values)
    if not figures:
        return None
    # Both are exact sums, so that the order of the seeds cannot change a digit.
    deviation = statistics.stdev(figures) if len(figures) > 1 else None
    return Spread(statistics.mean(figures), deviation, len(figures))


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float], level: float = 0.95
) -> Paired | None:
    """Compare two mechanisms over the seeds they share; None if they share none.

    Args:
        ours: Figure by seed.
        theirs: Figure by seed, subtracted.
        level: Coverage of the interval, between 0 and 1.

    Raises:
        ZooError: The level is no coverage.
    """
    checks.number("level", level, above=0, below=1)
    found = spread(ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs)))
    if found is None:
        return None
    if found.std is None:
        return Paired(found.mean, None, None, found.n)
    half = float(stats.t.ppf((1 + level) / 2, found.n - 1)) * found.std / math.sqrt(found.n)
    return Paired(found.mean, found.mean - half, found.mean + half, found.n)


def is_softmax(attention: str) -> bool:
    """Return whether a specification is plain softmax attention, the baseline of every table.

    Args:
        attention: A specification; it is one if each part is its socket's default.
    """
    return set(attention.split("+")) <= set(DEFAULTS.values())


def baseline(rows: Iterable[Row]) -> Row | None:
    """Return the softmax row of a table, or None.

    Args:
        rows: The rows of one table.
    """
    plain = [row for row in rows if is_softmax(row.attention)]
    return min(plain, key=lambda row: (row.attention != "mha", row.attention), default=None)


def tables(rows: Iterable[Row]) -> dict[Table, list[Row]]:
    """Sort rows into their tables, in order.

    Args:
        rows: Rows of any number of tables.
    """
    found: dict[Table, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.table].append(row)
    # A table without a threshold sorts before one with it; None itself does not compare.
    return {key: found[key] for key in sorted(found, key=lambda t: (*t[:6], t[6] or -math.inf))}


def summarise(records: Iterable[Record]) -> list[Row]:
    """Make one row of every table and attention, ordered by both.

    Args:
        records: Records in any order.
    """
    cells: dict[tuple[Table, str], list[Record]] = defaultdict(list)
    for record in records:
        table = Table(record.track, record.recipe, record.group, **record.metric)
        cells[table, record.attention].append(record)
    rows = [_row(table, attention, runs) for (table, attention), runs in cells.items()]
    rows.sort(key=lambda row: row.attention)
    return [row for group in tables(rows).values() for row in group]


def _row(table: Table, attention: str, records: list[Record]) -> Row:
    distinct = {record.to_json(): record for record in records}
    latest: dict[tuple[float, int], Record] = {}
    for record in sorted(distinct.values(), key=sort_key):  # the time of creation comes last
        latest[record.lr, record.seed] = record
    runs = tuple(latest.values())
    usable = [run for run in runs if _status(run) == "finished"]
    lr = _choose(usable, table)
    chosen = tuple(run for run in usable if run.lr == lr)
    values = {run.seed: run.metrics[table.report] for run in chosen}
    tried = Counter(run.lr for run in runs)
    return Row(
        table=table,
        attention=attention,
        lr=lr,
        lrs=tuple(sorted(tried)),
        values=values,
        attempts=max(tried.values()) if lr is None else tried[lr],
        solved=_solved(values.values(), table),
        extra=_extra(chosen, table),
        failures=tuple(
            Failure(run.lr, run.seed, _status(run)) for run in runs if _status(run) != "finished"
        ),
        records=chosen,
        runs=runs,
        repeats=len(distinct) - len(runs),
    )


def _status(record: Record) -> str:
    """Return the status that counts: a run with an infinite figure has diverged too."""
    if record.status == "finished":
        figures = (record.metrics[record.metric[role]] for role in ("select", "report"))
        return "finished" if all(map(math.isfinite, figures)) else "nan"
    return record.status


def _choose(usable: list[Record], table: Table) -> float | None:
    """Return the learning rate to report, by validation alone."""
    figures: dict[float, list[float]] = defaultdict(list)
    for run in usable:
        figures[run.lr].append(run.metrics[table.select])
    sign = 1 if table.mode == "min" else -1

    def order(lr: float) -> tuple[int, float, float]:
        return -len(figures[lr]), sign * statistics.mean(figures[lr]), lr

    return min(figures, key=order, default=None)


def _solved(values: Iterable[float], table: Table) -> int | None:
    if table.solved is None:
        return None
    if table.mode == "min":
        return sum(value <= table.solved for value in values)
    return sum(value >= table.solved for value in values)


def _extra(records: Iterable[Record], table: Table) -> dict[str, Spread]:
    """Return the spread of every test metric beside the reported one, finite figures only."""
    figures: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.metrics.items():
            if name.startswith("test") and name != table.report and math.isfinite(value):
                figures[name].append(value)
    return {name: Spread(*found) for name in sorted(figures) if (found := spread(figures[name]))}
