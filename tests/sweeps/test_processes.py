from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from zoo.sweeps import processes


def test_a_run_that_does_not_end_is_killed_after_its_grace(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.0)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", f"{code}; time.sleep(60)"],
        stdout=subprocess.PIPE,
        process_group=0,
    )
    with child:
        child.stdout.readline()
        processes.end([child], [])
    assert child.returncode == -signal.SIGKILL


class Stubborn:
    """A run elsewhere that lives until it is killed, and answers its end with an interrupt."""

    pid = None

    def __init__(self, received):
        self.received = received
        self.heard = []
        self.looks = 0

    def poll(self):
        self.looks += 1
        assert self.looks < 100, "it is waited for, and should be killed"
        return 0 if "kill" in self.heard else None

    def wait(self):
        return 0

    def terminate(self):
        self.heard.append("terminate")
        self.received.append(signal.SIGINT)

    def kill(self):
        self.heard.append("kill")


def test_a_signal_that_comes_while_the_runs_are_told_ends_the_grace(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1e9)
    monkeypatch.setattr(processes, "POLL", 0.0)
    received = [signal.SIGINT]
    runs = [Stubborn(received), Stubborn(received)]
    processes.end(runs, received)
    assert [run.heard for run in runs] == [["terminate", "kill"]] * 2


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_last_line_is_found_in_a_long_log(tmp_path):
    log = Path(tmp_path / "log")
    log.write_bytes(b"x" * 200_000 + b"\n\xff\rstep 3\rthe reason\n  \n-----\n")
    assert processes.last_line(log) == "the reason"
    assert processes.last_line(log, log.stat().st_size) == "it said nothing"
