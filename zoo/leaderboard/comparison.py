"""Two attentions side by side, in every table in which both stand.

    found = compare(read(records), "moba(block=8)", "mha")

Rows and differences are those of the leaderboard (`zoo.statistics`). In one table the first wins if
the interval of its paired difference excludes zero on the better side, loses if on the worse, and
ties if it does not exclude zero; without an interval, for want of two shared seeds with a figure,
nothing is decided. Beside that stands which rounded mean is the better one, whatever the interval.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.claims import trials as claims
from zoo.errors import ZooError, nearest
from zoo.host.spec import canonical, split
from zoo.leaderboard.current import group_now, is_stale
from zoo.report.markdown import figures
from zoo.runs.records import Record, RecordWarning, read_all
from zoo.statistics import spread as stats
from zoo.statistics.spread import Paired, Row, Table

OUTCOMES = (*stats.OUTCOMES, "undecided")
SIGNS = ("better", "equal", "worse", "unknown")
COSTS = ("parameters", "flops", "state_bytes", "step_time_cpu", "step_time_wall")


@dataclass(frozen=True)
class Pairing:
    """Two attentions in one table.

    Args:
        first: Row of the one.
        second: Row of the other.
        difference: First minus second over the shared seeds; None if they share none.
        stale: Whether the recipe has been changed since; such a table counts for nothing.
    """

    first: Row
    second: Row
    difference: Paired | None
    stale: bool = False

    @property
    def table(self) -> Table:
        """The table that both stand in."""
        return self.first.table

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`, for the first."""
        decided = self.difference and self.difference.outcome(self.table.mode)
        return decided or "undecided"

    @property
    def sign(self) -> str:
        """One of `SIGNS`, for the rounded mean of the first."""
        first, second = self.first.spread, self.second.spread
        if first is None or second is None:
            return "unknown"
        if figures(first.mean)[0] == figures(second.mean)[0]:
            return "equal"
        better = (first.mean > second.mean) == (self.table.mode == "max")
        return "better" if better else "worse"

    @property
    def devices(self) -> list[str]:
        """Every device that a figure of the two comes from, with its threads."""
        runs = (*self.first.records, *self.second.records)
        return sorted(
            {
                f"{r.device['name']} ({r.device['type']}, threads {r.device['threads']})"
                for r in runs
            }
        )

    def ratio(self, cost: str) -> float | None:
        """Return how many times the median cost of the second that of the first is.

        Args:
            cost: One of `COSTS`.
        """
        first, second = self.first.median(cost), self.second.median(cost)
        return first / second if first is not None and second else None


@dataclass(frozen=True)
class Comparison:
    """Two attentions over all records.

    Args:
        first: Canonical specification of the one.
        second: Canonical specification of the other.
        pairings: The tables in which both stand, in order.
        alone: The tables in which only one of them stands, in order, and which one.
    """

    first: str
    second: str
    pairings: tuple[Pairing, ...]
    alone: tuple[tuple[Table, str], ...]

    @property
    def counted(self) -> list[Pairing]:
        """The pairings in tables that are not stale."""
        return [pairing for pairing in self.pairings if not pairing.stale]

    @property
    def groups(self) -> dict[str, list[Pairing]]:
        """Those that count, by track; the runs of claims, which tune nothing, stand apart."""
        stated = set(claims.names())
        found: dict[str, list[Pairing]] = defaultdict(list)
        for pairing in sorted(self.counted, key=lambda p: p.table.recipe in stated):
            of_claim = pairing.table.recipe in stated
            found[claims.FOLDER if of_claim else pairing.table.track].append(pairing)
        return dict(found)


def outcomes(pairings: Iterable[Pairing]) -> dict[str, int]:
    """Count how often the first wins, ties, loses, or nothing is decided.

    Args:
        pairings: Tables in which both stand.
    """
    return _count(OUTCOMES, (p.outcome for p in pairings))


def signs(pairings: Iterable[Pairing]) -> dict[str, int]:
    """Count how often the mean of the first is better, equal or worse, or one has none.

    Args:
        pairings: Tables in which both stand.
    """
    return _count(SIGNS, (p.sign for p in pairings))


def read(folder: str | Path) -> list[Record]:
    """Read the records of a folder and of all folders in it, those of claims among them.

    A file that is no record is skipped without a word; the leaderboard names it.

    Args:
        folder: Folder of the records.

    Raises:
        ZooError: There is no such folder, or no record in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordWarning)
        found = read_all(folder, recursive=True)
    if not found:
        raise ZooError(f"the records folder {folder} holds no record; 'zoo sweep' makes some")
    return found


def groups_now(records: Iterable[Record]) -> dict[str, str]:
    """Return the groups that the recipes of records have now; what cannot be loaded is left out.

    Args:
        records: The records; those of claims do not count, whose variants have groups of their own.
    """
    found = {}
    for recipe in sorted({record.recipe for record in records} - set(claims.names())):
        with contextlib.suppress(ZooError):
            if (group := group_now(recipe)) is not None:
                found[recipe] = group
    return found


def compare(
    records: Iterable[Record], first: str, second: str, now: Mapping[str, str] | None = None
) -> Comparison:
    """Compare two attentions in every table in which both stand.

    Args:
        records: Records in any order.
        first: Specification of the one.
        second: Specification of the other.
        now: Groups of recipes as they are now, by name; a table of another recipe is not stale.

    Raises:
        ZooError: A specification is wrong or has no records, or both are the same.
    """
    pair = canonical(first), canonical(second)
    if pair[0] == pair[1]:
        raise ZooError(f"{first!r} and {second!r} are both {pair[0]!r}; give two that differ")
    rows = stats.summarise(records)
    known = {row.attention for row in rows}
    for spec in pair:
        if spec not in known:
            raise ZooError(f"there is no record of {spec!r}; {_hint(spec, known)}")
    pairings, alone, groups = [], [], now or {}
    for table, standing in stats.tables(rows).items():
        found = {row.attention: row for row in standing if row.attention in pair}
        if len(found) == 2:
            one, other = (found[spec] for spec in pair)
            difference = stats.paired(one.values, other.values)
            stale = is_stale(table, groups.get(table.recipe))
            pairings.append(Pairing(one, other, difference, stale))
        else:
            alone += [(table, spec) for spec in found]
    return Comparison(*pair, tuple(pairings), tuple(alone))


def _count(names: Iterable[str], values: Iterable[str]) -> dict[str, int]:
    counted = Counter(values)
    return {name: counted[name] for name in names}


def _hint(spec: str, known: Iterable[str]) -> str:
    """Name what has records: what shares the most mechanisms with it, else what is spelt alike."""
    wanted = _names(spec)
    shared = {name: len(wanted & _names(name)) for name in known}
    close = sorted((name for name in shared if shared[name]), key=lambda n: (-shared[n], n))
    close += [name for name in nearest(spec, shared) if name not in close]
    if close:
        return f"nearest with records: {', '.join(map(repr, close[:3]))}"
    some = sorted(shared)
    listed = ", ".join(map(repr, some[:6]))
    return f"there are records of {listed}{' and others' if len(some) > 6 else ''}"


def _names(spec: str) -> set[str]:
    """Return the mechanisms of a specification, of which a record may hold one unknown by now."""
    return {part.partition("(")[0] for part in split(spec, "+")} - {"mha"}
