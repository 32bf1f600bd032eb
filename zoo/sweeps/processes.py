"""Processes of a sweep: how many at once, what they said last, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zoo.sweeps.spawn import Handle

POLL = 0.05  # seconds between two looks at the running processes
GRACE = 10.0  # seconds for an ended process to put its things in order


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_line(log: Path, start: int = 0) -> str:
    """Return the last line with a word in it, without colours and frames.

    Args:
        log: What the process wrote to.
        start: Where its output begins, in bytes.
    """
    with open(log, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 65536))
        text = file.read().decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.strip(" │|") for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1][:300] if lines else "it said nothing"


def end(handles: Sequence[Handle], received: Sequence[int]) -> None:
    """End runs, each the head of its group of processes, and wait for them.

    Args:
        handles: The runs.
        received: Signals so far; one more ends the time of grace.
    """
    # Counted before any run hears of its end: the answer of a quick one may be the next signal.
    patience, deadline = len(received), time.monotonic() + GRACE
    for handle in handles:
        _signal(handle, signal.SIGTERM)
    for handle in handles:
        while handle.poll() is None:
            if time.monotonic() > deadline or len(received) > patience:
                _signal(handle, signal.SIGKILL)
                handle.wait()
                break
            time.sleep(POLL)


def _signal(handle: Handle, number: int) -> None:
    if handle.poll() is not None:
        return
    if handle.pid is None:  # it is not a process here, or none that heads a group
        (handle.kill if number == signal.SIGKILL else handle.terminate)()
    else:  # as it lives, the number surely belongs to its group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(handle.pid, number)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process, so that none comes at a bad moment."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # signals never reach another thread
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # One that is ignored stays ignored: nohup and background jobs rely on it.
    kept = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in kept}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
