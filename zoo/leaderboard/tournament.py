"""The sweep that the leaderboard is made of: every contender in every recipe, tuned alike.

For each recipe and each mechanism that its model can host, every learning rate of the recipe's
`budget.lrs` is tried at seed 0; the rate that is best on validation is then run at the other seeds.
Nothing is decided beforehand that a record does not say, so that a sweep that was killed goes on
where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.host.spec import canonical, split
from zoo.leaderboard import tracks
from zoo.leaderboard.tracks import Contender
from zoo.runs import config as configs
from zoo.runs import train
from zoo.runs.records import Record, read
from zoo.statistics import spread as stats
from zoo.sweeps.spawn import Spawner
from zoo.sweeps.sweep import Cell, SweepResult, sweep_cells

KEYS = ("track", "recipe", "attention", "seeds")
TUNED = 0
"""Seed at which the learning rates are compared."""


@dataclass(frozen=True)
class Match:
    """One mechanism in one recipe.

    Args:
        recipe: Name of the recipe.
        spec: Specification of the mechanism.
        rates: Learning rates to try.
        seeds: Number of seeds.
    """

    recipe: str
    spec: str
    rates: tuple[float, ...]
    seeds: int

    def overrides(self, rate: float, seed: int) -> list[str]:
        """Return the overrides of one of its runs."""
        return [f"attention={self.spec}", f"lr={rate:g}", f"seed={seed}"]

    @property
    def runs(self) -> int:
        """Number of its runs."""
        return len(self.rates) + self.seeds - 1


def plan(words: Iterable[str] = ()) -> list[Match]:
    """Return what is to be run.

    Args:
        words: What to restrict it to, as ``key=value,value``: tracks, recipes, mechanisms (names
            or specifications), or the number of seeds. A recipe whose data need files or a network
            is left out unless it is named.

    Raises:
        ZooError: A key, a track, a recipe or a mechanism is unknown, or nothing is left.
    """
    asked = _asked(words)
    known = [one.name for one in tracks.tracks()]
    for name in asked.get("track", ()):
        if name not in known:
            raise unknown("track", name, known)
    every = [recipe for name in known for recipe in tracks.recipes_of(name)]
    for name in asked.get("recipe", ()):
        if name not in every:
            raise unknown("recipe of a track", name, every)
    chosen = asked.get("recipe") or tracks.published()
    wanted = asked.get("track") or known
    seeds = _number(",".join(asked["seeds"])) if "seeds" in asked else None
    specs = {canonical(spec) for spec in asked.get("attention", ())}

    def meant(one: Contender) -> bool:
        return not specs or one.spec in specs or canonical(one.name) in specs

    found: list[Match] = []
    refused: dict[str, str] = {}
    for recipe in chosen:
        config = configs.load(recipe)
        if config.track not in wanted:
            continue
        rates, count = tuple(config.budget.lrs), seeds or config.budget.seeds
        for one in filter(meant, tracks.contenders(config, meant)):
            if one.reason is None:
                found.append(Match(recipe, one.spec, rates, count))
            else:
                refused.setdefault(one.reason, f"{recipe} has no {one.name!r}: {one.reason}")
    if not found:
        raise ZooError(
            f"nothing to run: no recipe of {_shown(asked)} hosts any of what is asked"
            + "".join(f"; {text}" for text in [*refused.values()][: 1 if specs else 0])
        )
    return found


def tournament(
    matches: Sequence[Match],
    *,
    jobs: int = 1,
    records: str | Path = "data/runs",
    runs: str | Path = "runs",
    minutes: float | None = None,
    spawner: Spawner | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run every match: its rates at one seed, then its best rate at the others.

    A run that ends without a record, by a signal or out of time, leaves one that says so.

    Args:
        matches: What to run.
        jobs: Number of processes at once.
        records: Folder of the records.
        runs: Folder of the run folders.
        minutes: Time allowed to a run; None is as long as it takes.
        spawner: Starts the runs; forks of one process if None.
        progress: Whether to show a progress bar with an estimate on standard error.

    Raises:
        ZooError: `jobs` is not positive.
    """
    work = _Tournament(matches, Path(records), Path(runs))
    return sweep_cells(
        work.first(),
        jobs=jobs,
        records=records,
        runs=runs,
        spawner=spawner,
        identify=configs.run_id,
        follow=work.follow,
        minutes=minutes,
        title="leaderboard" if progress else None,
        total=sum(match.runs for match in matches),
    )


class _Tournament:
    """What is known of each match while its rates are tried."""

    def __init__(self, matches: Sequence[Match], records: Path, runs: Path) -> None:
        self.matches = matches
        self.records = records
        self.runs = runs
        self.open: dict[tuple[str, ...], Match] = {}
        self.waiting: dict[Match, int] = {}

    def first(self) -> list[tuple[str, list[str]]]:
        """Return the runs that compare learning rates."""
        found = []
        for match in self.matches:
            self.waiting[match] = len(match.rates)
            for rate in match.rates:
                overrides = match.overrides(rate, TUNED)
                self.open[(match.recipe, *overrides)] = match
                found.append((match.recipe, overrides))
        return found

    def follow(self, cell: Cell) -> list[tuple[str, list[str]]]:
        """Return the runs at the other seeds once all rates of a match were tried."""
        if cell.error is not None and cell.id is not None:
            self._note(cell)
        match = self.open.pop((cell.recipe, *cell.overrides), None)
        if match is None:
            return []
        self.waiting[match] -= 1
        if self.waiting[match]:
            return []
        rate = self._best(match)
        if rate is None:
            return []
        seeds = range(TUNED + 1, match.seeds)
        return [(match.recipe, match.overrides(rate, seed)) for seed in seeds]

    def _best(self, match: Match) -> float | None:
        found: list[Record] = []
        for rate in match.rates:
            name = configs.run_id(match.recipe, match.overrides(rate, TUNED))
            with contextlib.suppress(ZooError):
                found.append(read(self.records / f"{name}.json"))
        rows = stats.summarise(found)
        return rows[0].lr if rows else None

    def _note(self, cell: Cell) -> None:
        """Leave a record of a run that could not write one itself."""
        if not (self.records / f"{cell.id}.json").exists():
            with contextlib.suppress(ZooError):
                train.fail(
                    cell.recipe,
                    cell.overrides,
                    str(cell.error),
                    records=self.records,
                    runs=self.runs,
                )


def _asked(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise ZooError(f"{word!r}: write key=value or key=value,value")
        if key not in KEYS:
            raise unknown("key of the sweep over the leaderboard", key, KEYS)
        if key in found:
            raise ZooError(f"{word!r}: {key!r} is given twice")
        found[key] = tuple(split(text, ","))
    return found


def _number(text: str) -> int:
    return checks.whole("seeds", int(text) if text.isdecimal() else text)


def _shown(asked: dict[str, tuple[str, ...]]) -> str:
    return " ".join(f"{key}={','.join(values)}" for key, values in asked.items())
