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
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zoo.errors import ZooError
from zoo.runs.grid import cells, parse_grid
from zoo.runs.processes import POLL, cores, end, last_line, signals
from zoo.runs.records import RecordWarning, read

__all__ = ["Cell", "SweepResult", "parse_grid", "sweep"]

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
    """

    overrides: list[str]
    id: str | None
    log: Path | None
    error: str | None = None


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
        identify: Returns the record's id for a recipe and overrides. Without it the run itself has
            to find out that it is done.
        progress: Whether to show a progress bar with an estimate on standard error.

    Raises:
        ZooError: `jobs` is not positive, two cells are the same run, or no cell can be identified.
    """
    if jobs < 1:
        raise ZooError(f"jobs is {jobs!r}; it must be at least 1")
    command = [*(runner or (sys.executable, "-m", "zoo", "run")), recipe]
    work = _Sweep(command, jobs, Path(records), Path(runs))
    every = cells(grid) if isinstance(grid, Mapping) else [list(cell) for cell in grid]
    for cell in _identified(recipe, every, Path(runs), identify):
        if cell.error is not None:
            work.result.failed.append(cell)
        elif work.is_done(cell):
            work.result.skipped.append(cell)
        else:
            work.queue.append(cell)
    with _bar(recipe, len(work.queue), progress) as advance, signals() as received:
        work.run(advance, received)
    return work.result


def _identified(
    recipe: str, every: list[list[str]], runs: Path, identify: Identify | None
) -> list[Cell]:
    found: list[Cell] = []
    errors: list[ZooError] = []
    for overrides in every:
        digest = hashlib.sha256("\0".join([recipe, *overrides]).encode()).hexdigest()
        cell = Cell(overrides, None, runs / "sweep" / digest[:16] / "sweep.log")
        if identify is not None:
            try:
                cell.id = identify(recipe, overrides)
                cell.log = runs / cell.id / "sweep.log"
            except ZooError as error:
                errors.append(error)
                cell.error, cell.log = str(error), None
        twin = next((other for other in found if cell.id and other.id == cell.id), None)
        if twin is not None:
            both = " and ".join(repr(" ".join(c.overrides)) for c in (twin, cell))
            raise ZooError(f"two cells of the grid are the same run: {both}")
        found.append(cell)
    if errors and len(errors) == len(found):
        raise errors[0]
    return found


class _Sweep:
    """The cells that wait, those that run, and what became of the others."""

    def __init__(self, command: list[str], jobs: int, records: Path, runs: Path) -> None:
        self.command = command
        self.jobs = jobs
        self.records = records
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
        self.running: dict[subprocess.Popen[bytes], tuple[Cell, int]] = {}
        self.result = SweepResult()

    def run(self, advance: Callable[[], None], received: list[int]) -> None:
        """Work until nothing is left or a signal was received."""
        try:
            while (self.queue or self.running) and not received:
                before = self._settled()
                for _ in range(len(self.queue)):  # a cell that another process holds waits a turn
                    if len(self.running) == self.jobs:
                        break
                    self._start(self.queue.popleft())
                for process in [p for p in self.running if p.poll() is not None]:
                    self._collect(process)
                for _ in range(self._settled() - before):
                    advance()
                if self._settled() == before:
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

    def _settled(self) -> int:
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
                    self.result.skipped.append(cell)
                    return
                self._set_aside(cell)
                start = log.tell()
                process = subprocess.Popen(
                    [*self.command, *cell.overrides, *self.options],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,  # the lock lives as long as this copy of the file
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
                self.running[process] = cell, start
        except OSError as error:
            cell.error = f"cannot start: {error}"
            self.result.failed.append(cell)

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

    def _collect(self, process: subprocess.Popen[bytes]) -> None:
        """Sort a run that has ended by its exit code and its record."""
        cell, start = self.running.pop(process)
        assert cell.log is not None
        if process.returncode < 0:
            number = -process.returncode
            said = last_line(cell.log, start)
            cell.error = f"ended by signal {number} ({signal.strsignal(number)}); {said}"
        elif process.returncode > 0:
            cell.error = last_line(cell.log, start)
        elif cell.id is not None:
            try:
                status = self._status(cell)
                if status not in _DONE:
                    cell.error = f"ended well, but its record is {status or 'missing'}"
            except ZooError as error:
                cell.error = str(error)
        (self.result.finished if cell.error is None else self.result.failed).append(cell)


@contextlib.contextmanager
def _bar(recipe: str, total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar; what it gives moves it on by one run."""
    if not shown or not total:
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
        task = bar.add_task(recipe, total=total)
        yield lambda: bar.advance(task)
