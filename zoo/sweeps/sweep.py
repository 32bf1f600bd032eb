"""Many runs of one recipe, each in a process of its own, resumable after a kill at any moment.

What is done is what has a record, so a sweep keeps no state: started again, it skips the runs whose
record says `finished` or `nan`, repeats failed ones and lets half-done ones go on from their
checkpoint. The output of a run goes to `sweep.log` in its folder. The run holds a lock on that file
for as long as it lives, even if the sweep is killed, so that no run is ever done by two processes
at once: a sweep that meets a running one waits for its record. (Such locks are POSIX.)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zoo import checks
from zoo.errors import ZooError
from zoo.runs.records import RecordWarning, read
from zoo.sweeps.grid import cells, parse_grid
from zoo.sweeps.processes import POLL, cores, end, last_line, signals
from zoo.sweeps.spawn import Handle, Nursery, Processes, Spawner

__all__ = ["Cell", "SweepResult", "parse_grid", "sweep", "sweep_cells"]

Identify = Callable[[str, Sequence[str]], str]
_DONE = ("finished", "nan")


@dataclass
class Cell:
    """One run of a sweep.

    Args:
        overrides: What it changes in the recipe, as `key=value`.
        id: The id of its record; None if it is not known beforehand.
        log: Where its output goes; None if it could not even be named.
        error: Why it failed, in one line.
        recipe: Name or path of the recipe.
    """

    overrides: list[str]
    id: str | None
    log: Path | None
    error: str | None = None
    recipe: str = ""


Follow = Callable[[Cell], Iterable[tuple[str, Sequence[str]]]]


@dataclass
class SweepResult:
    """What became of the runs of a sweep.

    Args:
        finished: Runs that ended now with a record.
        skipped: Runs that had a record already.
        failed: Runs that ended without one.
        pending: Runs that an interrupt left undone.
    """

    finished: list[Cell] = field(default_factory=list)
    skipped: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    pending: list[Cell] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, 1 if any run failed, 130 after an interrupt."""
        return 130 if self.pending else int(bool(self.failed))

    def report(self) -> str:
        """Return the outcome in one line, and up to two more for each run that failed."""
        text = f"{len(self.finished)} finished, {len(self.skipped)} skipped, "
        text += f"{len(self.failed)} failed"
        if self.pending:
            text += f", {len(self.pending)} left undone; start the sweep again to go on"
        for cell in self.failed:
            text += f"\nfailed: {' '.join(cell.overrides)}: {cell.error}"
            text += f"\n  see {cell.log}" if cell.log else ""
        return text


def sweep(
    recipe: str,
    grid: Mapping[str, Sequence[str]] | Sequence[Sequence[str]],
    *,
    jobs: int = 1,
    records: str | Path = "runs/records",
    runs: str | Path = "runs",
    runner: Sequence[str] | None = None,
    spawner: Spawner | None = None,
    identify: Identify | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run every cell of a grid that has no record yet.

    An interrupt (or a signal to end or to hang up) ends the running processes and returns; what has
    finished stays.

    Args:
        recipe: Name or path of the recipe.
        grid: Values by key, from `parse_grid`; or the overrides of every run.
        jobs: Number of processes at once; they share the processor's cores.
        records: Folder of the records.
        runs: Folder of the run folders.
        runner: Command that is given the recipe, the overrides and the options; `zoo run` if None.
        spawner: Starts the runs, in place of a runner.
        identify: Returns the record's id for a recipe and overrides. Without it the run itself has
            to find out that it is done.
        progress: Whether to show a progress bar with an estimate on standard error.

    Raises:
        ZooError: `jobs` is not positive, two cells are the same run, or no cell can be identified.
    """
    every = cells(grid) if isinstance(grid, Mapping) else [list(cell) for cell in grid]
    return sweep_cells(
        [(recipe, overrides) for overrides in every],
        jobs=jobs,
        records=records,
        runs=runs,
        spawner=Processes(runner) if spawner is None and runner else spawner,
        identify=identify,
        title=recipe if progress else None,
    )


def sweep_cells(
    every: Sequence[tuple[str, Sequence[str]]],
    *,
    jobs: int = 1,
    records: str | Path = "runs/records",
    runs: str | Path = "runs",
    spawner: Spawner | None = None,
    identify: Identify | None = None,
    follow: Follow | None = None,
    minutes: float | None = None,
    title: str | None = None,
    total: int | None = None,
) -> SweepResult:
    """Run cells of any number of recipes that have no record yet, and what follows from them.

    Args:
        every: Recipe and overrides of each run.
        jobs: Number of processes at once; they share the processor's cores.
        records: Folder of the records.
        runs: Folder of the run folders.
        spawner: Starts the runs; forks of one process if None.
        identify: As in `sweep`.
        follow: Called with each cell that is settled, done before or failed as well; returns the
            recipe and overrides of the runs to do next.
        minutes: Time allowed to a run; None is as long as it takes.
        title: What the progress bar is called; None shows none.
        total: Number of runs that the bar counts to; those of `every` if None.

    Raises:
        ZooError: `jobs` or `minutes` is not positive, two cells are the same run, or no cell can be
            identified.
    """
    checks.whole("jobs", jobs)
    checks.optional(checks.number)("minutes", minutes, above=0)
    ours = Nursery() if spawner is None else spawner
    work = _Sweep(ours, jobs, Path(records), Path(runs), identify, follow, minutes)
    try:
        work.add(every)
        if identify is not None and every and not work.queue and not work.result.skipped:
            raise ZooError(work.result.failed[0].error or "no cell can be identified")
        left = len(work.queue) if total is None else total - work.settled
        with _bar(title, left) as advance, signals() as received:
            work.run(advance, received)
    finally:
        if spawner is None:
            ours.close()
    return work.result


class _Sweep:
    """The cells that wait, those that run, and what became of the others."""

    def __init__(
        self,
        spawner: Spawner,
        jobs: int,
        records: Path,
        runs: Path,
        identify: Identify | None,
        follow: Follow | None,
        minutes: float | None,
    ) -> None:
        self.spawner = spawner
        self.jobs = jobs
        self.records = records
        self.runs = runs
        self.identify = identify
        self.follow = follow
        self.minutes = minutes
        self.options = ["--records", str(records), "--runs", str(runs)]
        self.options += ["--quiet", "--resume-if-possible"]
        threads = max(1, cores() // jobs)
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "NO_COLOR": "1",  # the output goes to a file,
            "PYTHONUNBUFFERED": "1",  # in which the error is to come after what led to it
        }
        self.queue: deque[Cell] = deque()
        self.running: dict[Handle, tuple[Cell, int]] = {}
        self.begun: dict[Handle, float] = {}
        self.result = SweepResult()
        self.known: dict[str, Cell] = {}

    def add(self, every: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Put cells before those that wait, but for those that are done or have no name.

        Raises:
            ZooError: A cell is the same run as another.
        """
        named = [self._cell(recipe, list(overrides)) for recipe, overrides in every]
        done = [cell.error is None and self.is_done(cell) for cell in named]
        waiting = [c for c, d in zip(named, done, strict=True) if c.error is None and not d]
        self.queue.extendleft(reversed(waiting))
        for cell, is_done in zip(named, done, strict=True):
            if cell.error is not None:
                self._settle(cell, self.result.failed)
            elif is_done:
                self._settle(cell, self.result.skipped)

    def _cell(self, recipe: str, overrides: list[str]) -> Cell:
        digest = hashlib.sha256("\0".join([recipe, *overrides]).encode()).hexdigest()
        log = self.runs / "sweep" / digest[:16] / "sweep.log"
        cell = Cell(overrides, None, log, recipe=recipe)
        if self.identify is None:
            return cell
        try:
            cell.id = self.identify(recipe, overrides)
        except ZooError as error:
            cell.error, cell.log = str(error), None
            return cell
        cell.log = self.runs / cell.id / "sweep.log"
        twin = self.known.setdefault(cell.id, cell)
        if twin is not cell:
            both = " and ".join(repr(" ".join(c.overrides)) for c in (twin, cell))
            raise ZooError(f"two cells of the grid are the same run: {both}")
        return cell

    def _settle(self, cell: Cell, outcome: list[Cell]) -> None:
        """Put a cell where it belongs, and what follows from it into the queue."""
        outcome.append(cell)
        if self.follow is not None:
            self.add(self.follow(cell))

    def run(self, advance: Callable[[], None], received: list[int]) -> None:
        """Work until nothing is left or a signal was received."""
        try:
            while (self.queue or self.running) and not received:
                before = self.settled
                for _ in range(len(self.queue)):  # a cell that another process holds waits a turn
                    if len(self.running) == self.jobs:
                        break
                    self._start(self.queue.popleft())
                for handle in [h for h in self.running if h.poll() is not None]:
                    self._collect(handle)
                self._end_the_late(received)
                for _ in range(self.settled - before):
                    advance()
                if self.settled == before:
                    time.sleep(POLL)
        finally:
            self.result.pending += [cell for cell, _ in self.running.values()]
            self.result.pending += self.queue
            end(list(self.running), received)

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell has a readable record that needs no repetition."""
        with contextlib.suppress(ZooError):
            return self._status(cell) in _DONE
        return False

    def _status(self, cell: Cell) -> str | None:
        if cell.id is None or not (path := self.records / f"{cell.id}.json").exists():
            return None
        return read(path).status

    @property
    def settled(self) -> int:
        """Number of cells of which nothing more is to come."""
        return len(self.result.finished) + len(self.result.skipped) + len(self.result.failed)

    def _start(self, cell: Cell) -> None:
        assert cell.log is not None
        try:
            cell.log.parent.mkdir(parents=True, exist_ok=True)
            with open(cell.log, "ab") as log:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.queue.append(cell)
                    return
                # Whoever held the lock until now may have left a record.
                if self.is_done(cell):
                    self._settle(cell, self.result.skipped)
                    return
                self._set_aside(cell)
                start = log.tell()
                words = [cell.recipe, *cell.overrides, *self.options]
                handle = self.spawner.start(words, log, self.environment)
                self.running[handle] = cell, start
                self.begun[handle] = time.monotonic()
        except OSError as error:
            cell.error = f"cannot start: {error}"
            self._settle(cell, self.result.failed)

    def _set_aside(self, cell: Cell) -> None:
        """Keep a record that cannot be read under another name, so that it is not overwritten."""
        try:
            self._status(cell)
        except ZooError as error:
            path = self.records / f"{cell.id}.json"
            number, backup = 1, path.with_name(f"{path.name}.corrupt")
            while backup.exists():
                number += 1
                backup = path.with_name(f"{path.name}.corrupt{number}")
            os.replace(path, backup)
            warnings.warn(f"kept as {backup.name} and repeated: {error}", RecordWarning, 2)

    def _end_the_late(self, received: list[int]) -> None:
        """End the runs that have had their time."""
        if self.minutes is None:
            return
        now = time.monotonic()
        late = [h for h in self.running if now - self.begun[h] > 60 * self.minutes]
        end(late, received)
        for handle in late:
            cell, _ = self.running.pop(handle)
            cell.error = f"out of time: it took more than {self.minutes:g} minutes"
            self._settle(cell, self.result.failed)

    def _collect(self, handle: Handle) -> None:
        """Sort a run that has ended by its exit code and its record."""
        cell, start = self.running.pop(handle)
        code = handle.returncode
        assert cell.log is not None
        assert code is not None
        if code < 0:
            number = -code
            said = last_line(cell.log, start)
            cell.error = f"ended by signal {number} ({signal.strsignal(number)}); {said}"
        elif code > 0:
            cell.error = last_line(cell.log, start)
        elif cell.id is not None:
            try:
                status = self._status(cell)
                if status not in _DONE:
                    cell.error = f"ended well, but its record is {status or 'missing'}"
            except ZooError as error:
                cell.error = str(error)
        self._settle(cell, self.result.finished if cell.error is None else self.result.failed)


@contextlib.contextmanager
def _bar(title: str | None, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar; what it gives moves it on by one run."""
    if title is None or total < 1:
        yield lambda: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # A run may take far longer than the half minute that the bar would look back by default.
    with progress.Progress(
        *columns, console=Console(stderr=True), speed_estimate_period=math.inf
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
