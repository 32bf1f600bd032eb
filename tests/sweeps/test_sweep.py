from __future__ import annotations

import contextlib
import fcntl
import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zoo.errors import ZooError
from zoo.runs.records import RecordWarning, read, write
from zoo.sweeps import processes
from zoo.sweeps import sweep as module
from zoo.sweeps.grid import parse_grid
from zoo.sweeps.spawn import Processes
from zoo.sweeps.sweep import sweep

RUNNER = Path(__file__).parents[1] / "support" / "toy_runner.py"


def identify(recipe, overrides):
    return "-".join([recipe, *overrides]).replace("(", "_").replace(")", "_")


@pytest.fixture
def runner(make, tmp_path):
    (tmp_path / "template.json").write_text(make().to_json())
    return [sys.executable, "-S", str(RUNNER), str(tmp_path / "template.json")]


@pytest.fixture
def go(runner, tmp_path):
    """Sweep over a grid of the runner above, all in one folder."""

    def start(*items, **options):
        defaults = {"runner": runner, "identify": identify, "progress": False}
        return sweep(
            "toy",
            parse_grid(items),
            records=tmp_path / "runs" / "records",
            runs=tmp_path / "runs",
            **(defaults | options),
        )

    return start


@pytest.fixture(autouse=True)
def hearing():
    """Listen to interrupts, which a shell makes its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def journal(tmp_path, name):
    lines = (tmp_path / "runs" / name / "journal").read_text().split("\n")[:-1]
    return [line.split()[0] for line in lines]


def names(found):
    return [cell.id for cell in found]


def words(cell):
    (line,) = [x for x in cell.log.read_text().splitlines() if x.startswith("words ")]
    return json.loads(line.removeprefix("words "))


def test_every_cell_runs_and_a_second_sweep_runs_none(go, tmp_path):
    axes = ("attention=mha,sliding_window(window=16,x=2)", "seeds=2")
    result = go(*axes)
    assert names(result.finished) == [
        "toy-attention=mha-seed=0",
        "toy-attention=mha-seed=1",
        "toy-attention=sliding_window_window=16,x=2_-seed=0",
        "toy-attention=sliding_window_window=16,x=2_-seed=1",
    ]
    assert (result.skipped, result.failed, result.pending) == ([], [], [])
    assert result.exit_code == 0
    assert result.report() == "4 finished, 0 skipped, 0 failed"
    again = go(*axes)
    assert names(again.skipped) == names(result.finished)
    assert again.finished == []
    assert journal(tmp_path, "toy-attention=mha-seed=0") == ["start", "end"]


def test_a_run_is_given_its_overrides_and_folders(go, tmp_path):
    (cell,) = go("attention=sliding_window(window=16,x=2)", "lr=1e-3").finished
    assert words(cell)[1:] == [
        "toy",
        "attention=sliding_window(window=16,x=2)",
        "lr=1e-3",
        "--records",
        str(tmp_path / "runs" / "records"),
        "--runs",
        str(tmp_path / "runs"),
        "--quiet",
        "--resume-if-possible",
    ]
    assert cell.log == tmp_path / "runs" / cell.id / "sweep.log"


def test_runs_that_form_no_grid_are_listed(runner, tmp_path):
    every = [["attention=mha", "seed=0"], ["seed=1"], ["model.dim=8", "seed=1"]]
    folders = {"records": tmp_path / "runs" / "records", "runs": tmp_path / "runs"}
    options = {"runner": runner, "identify": identify, "progress": False, **folders}
    result = sweep("toy", every, **options)
    assert [cell.overrides for cell in result.finished] == every
    assert names(sweep("toy", every[1:], **options).skipped) == [
        "toy-seed=1",
        "toy-model.dim=8-seed=1",
    ]


def test_without_a_runner_runs_are_forked_from_a_nursery(tmp_path, monkeypatch):
    given = []

    class Watched(Processes):
        def __init__(self):
            super().__init__([sys.executable, "-I", "-c", ""])

        def start(self, arguments, log, environment):
            given.append(arguments)
            return super().start(arguments, log, environment)

        def close(self):
            given.append("closed")

    monkeypatch.setattr(module, "Nursery", Watched)
    sweep("toy", {}, records=tmp_path / "records", runs=tmp_path, progress=False)
    assert given[0][0] == "toy"
    assert given[1:] == ["closed"]


@pytest.mark.parametrize(("jobs", "threads"), [(1, "6"), (2, "3"), (4, "1"), (9, "1")])
def test_jobs_share_the_cores(go, monkeypatch, jobs, threads):
    monkeypatch.setattr(module, "cores", lambda: 6)
    (cell,) = go("seeds=1", jobs=jobs).finished
    assert f"threads {threads}\n" in cell.log.read_text()


def test_jobs_run_at_once(go):
    result = go("do=meet", "seeds=2", jobs=2)
    assert len(result.finished) == 2


def test_never_more_than_jobs_run_at_once(go, tmp_path):
    result = go("seeds=6", jobs=2)
    moments = []
    for cell in result.finished:
        for line in (tmp_path / "runs" / cell.id / "journal").read_text().splitlines():
            word, moment = line.split()
            moments.append((int(moment), 1 if word == "start" else -1))
    running = [sum(change for _, change in sorted(moments)[: i + 1]) for i in range(len(moments))]
    assert len(moments) == 12
    assert max(running) <= 2


def test_a_crash_stops_nothing_and_is_reported(go):
    result = go("do=crash,silent,well")
    assert names(result.finished) == ["toy-do=well"]
    assert names(result.failed) == ["toy-do=crash", "toy-do=silent"]
    crash, silent = result.failed
    assert crash.error == "ValueError: no such thing"
    assert silent.error == "ended well, but its record is missing"
    assert result.exit_code == 1
    report = result.report()
    assert "1 finished, 0 skipped, 2 failed" in report
    assert f"failed: do=crash: ValueError: no such thing\n  see {crash.log}" in report


def test_the_error_is_of_the_last_attempt(go, runner):
    go("do=crash")
    (cell,) = go("do=crash", runner=[sys.executable, "-I", "-c", "raise SystemExit(3)"]).failed
    assert cell.error == "it said nothing"


def test_a_diverged_run_is_done_and_a_failed_one_is_not(go, tmp_path):
    first = go("do=nan,failed")
    assert names(first.finished) == ["toy-do=nan"]
    assert [cell.error for cell in first.failed] == ["ended well, but its record is failed"]
    second = go("do=nan,failed")
    assert names(second.skipped) == ["toy-do=nan"]
    assert journal(tmp_path, "toy-do=failed") == ["start", "end"] * 2


def test_a_killed_run_is_resumed_by_the_next_sweep(go, tmp_path):
    (cell,) = go("do=kill").failed
    assert cell.error == "ended by signal 9 (Killed); half done"
    result = go("do=kill")
    assert names(result.finished) == ["toy-do=kill"]
    assert journal(tmp_path, "toy-do=kill") == ["start", "start", "resumed", "end"]


def test_a_record_that_cannot_be_read_is_kept_and_repeated(go, tmp_path):
    go("seeds=2")
    path = tmp_path / "runs" / "records" / "toy-seed=0.json"
    for number, name in enumerate(["toy-seed=0.json.corrupt", "toy-seed=0.json.corrupt2"]):
        path.write_text(f"{{ half {number}")
        with pytest.warns(RecordWarning, match=f"kept as {name}.*toy-seed=0"):
            result = go("seeds=2")
        assert names(result.finished) == ["toy-seed=0"]
        assert names(result.skipped) == ["toy-seed=1"]
        assert path.with_name(name).read_text() == f"{{ half {number}"
    assert read(path).status == "finished"


def test_without_ids_the_run_decides_itself(go, tmp_path):
    for _ in range(2):
        result = go("seeds=2", identify=None)
        assert [cell.id for cell in result.finished] == [None, None]
    logs = {cell.log for cell in result.finished}
    assert len(logs) == 2
    assert all("words" in log.read_text() for log in logs)
    assert journal(tmp_path, "toy-seed=0") == ["start", "end"] * 2


def test_a_cell_that_cannot_be_identified_fails_alone(go):
    def picky(recipe, overrides):
        if "seed=1" in overrides:
            raise ZooError("seed 1 is not for you")
        return identify(recipe, overrides)

    result = go("seeds=3", identify=picky)
    assert names(result.finished) == ["toy-seed=0", "toy-seed=2"]
    assert [cell.error for cell in result.failed] == ["seed 1 is not for you"]
    assert result.report().endswith("failed: seed=1: seed 1 is not for you")


def test_if_no_cell_can_be_identified_the_first_error_is_raised(go):
    def never(recipe, overrides):
        raise ZooError(f"unknown recipe {recipe!r}")

    with pytest.raises(ZooError, match="unknown recipe 'toy'"):
        go("seeds=3", identify=never)


def test_two_cells_of_one_run_are_refused(go, tmp_path):
    with pytest.raises(ZooError, match=r"same run: 'lr=1e-3' and 'lr=0\.001'"):
        go("lr=1e-3,0.001", identify=lambda recipe, overrides: "one")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_must_be_positive(go, jobs):
    with pytest.raises(ZooError, match="jobs"):
        go(jobs=jobs)


def test_a_command_that_does_not_exist_fails_its_cells(go):
    result = go("seeds=2", runner=["/no/such/program"])
    assert all(cell.error.startswith("cannot start: ") for cell in result.failed)
    assert len(result.failed) == 2


def locked(path):
    with open(path, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_interrupt_ends_the_runs_and_keeps_what_is_finished(go, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    result = go("do=well,interrupt,nan")
    assert names(result.finished) == ["toy-do=well"]
    assert names(result.pending) == ["toy-do=interrupt", "toy-do=nan"]
    assert result.exit_code == 130
    assert "2 left undone" in result.report()
    assert signal.getsignal(signal.SIGINT) is before
    # The lock is held by whatever the run started, too: it must be gone with the run.
    deadline = time.monotonic() + 30
    while locked(result.pending[0].log) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not locked(result.pending[0].log)
    assert journal(tmp_path, "toy-do=interrupt") == ["start"]
    assert names(go("do=well,nan").skipped) == ["toy-do=well"]


def test_a_second_interrupt_kills_at_once(go, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1e9)
    result = go("do=stubborn")
    assert names(result.pending) == ["toy-do=stubborn"]
    assert journal(tmp_path, "toy-do=stubborn") == ["start"]


def test_a_sweep_works_in_another_thread(go):
    results = []
    worker = threading.Thread(target=lambda: results.append(go("seeds=1")))
    worker.start()
    worker.join()
    assert names(results[0].finished) == ["toy-seed=0"]


PARENT = """
import json, sys
from zoo.sweeps.grid import parse_grid
from zoo.sweeps.sweep import sweep

runner, records, runs, *items = json.loads(sys.argv[1])
identify = lambda recipe, overrides: "-".join([recipe, *overrides])
sweep("toy", parse_grid(items), runner=runner, records=records, runs=runs, identify=identify)
"""


def test_a_sweep_that_is_killed_goes_on_without_doing_a_run_twice(go, runner, tmp_path):
    runs = tmp_path / "runs"
    items = ["do=well,hold,open"]
    arguments = json.dumps([runner, str(runs / "records"), str(runs), *items])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (runs / "toy-do=hold" / "journal").exists():
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    # The run that the dead sweep had started is alive and waits for "open", which is next in turn:
    # it is neither started again nor forgotten.
    assert locked(runs / "toy-do=hold" / "sweep.log")
    result = go(*items)
    assert names(result.finished) == ["toy-do=open"]
    assert names(result.skipped) == ["toy-do=well", "toy-do=hold"]
    assert journal(tmp_path, "toy-do=hold") == ["start", "end"]
    assert journal(tmp_path, "toy-do=well") == ["start", "end"]


def test_the_progress_bar_counts_what_is_left_to_do(go, make, tmp_path):
    write(make(id="toy-seed=0"), tmp_path / "runs" / "records")
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        go("seeds=3", progress=True)
    assert "toy" in error.getvalue()
    assert "2/2" in error.getvalue()
    quiet = io.StringIO()
    with contextlib.redirect_stderr(quiet):
        go("seed=4", progress=False)
        go("seeds=3", progress=True)
    assert quiet.getvalue() == ""
