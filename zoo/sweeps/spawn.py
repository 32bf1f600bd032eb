"""How the runs of a sweep are started: each in a process of its own.

A spawner starts runs and gives a handle for each, which is polled until it has an exit code.
`Processes` starts a command anew each time. `Nursery` imports what runs need once, in a process
of its own, and forks that for each run, which saves some five seconds of processor time a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Protocol

__all__ = ["Handle", "Nursery", "Processes", "Spawner"]

_PAUSE = 0.02  # seconds


class Handle(Protocol):
    """A run that was started."""

    @property
    def pid(self) -> int | None:
        """Number of the process, which heads a group of its own; None if it is not one here."""

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""

    def poll(self) -> int | None:
        """Look whether it has ended, and return the exit code."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self) -> int:
        """Wait for its end."""


class Spawner(Protocol):
    """Starts runs."""

    def start(
        self, arguments: Sequence[str], log: BinaryIO, environment: Mapping[str, str]
    ) -> Handle:
        """Start a run.

        Args:
            arguments: Recipe, overrides and options, as `zoo run` takes them.
            log: File for its output. A lock on it must last as long as the run does.
            environment: All variables of its environment.

        Raises:
            OSError: It cannot be started.
        """

    def close(self) -> None:
        """Give back what is held; runs that are on their way go on."""


class Processes:
    """Starts a command for each run.

    Args:
        command: What comes before the arguments of a run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def start(
        self, arguments: Sequence[str], log: BinaryIO, environment: Mapping[str, str]
    ) -> Handle:
        """See `Spawner.start`."""
        return subprocess.Popen(
            [*self.command, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,  # the lock lives as long as this copy of the file
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def close(self) -> None:
        """See `Spawner.close`."""


class Nursery:
    """Starts runs as forks of a process that has imported what they need.

    The variables of the environment that matter before the imports (threads, say) are those of the
    first run.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._held = b""
        self._codes: dict[int, int] = {}

    def start(
        self, arguments: Sequence[str], log: BinaryIO, environment: Mapping[str, str]
    ) -> Handle:
        """See `Spawner.start`."""
        if self._server is None or self._server.poll() is not None:
            self._open(environment)
        request = {"arguments": list(arguments), "environment": dict(environment)}
        try:
            assert self._line is not None
            socket.send_fds(self._line, [json.dumps(request).encode() + b"\n"], [log.fileno()])
            while (message := self._receive(wait=True)) and "pid" not in message:
                self._codes[message["ended"]] = message["code"]
        except OSError:
            message = None
        if message is None:
            raise OSError(f"the process that starts runs has ended ({self._leave()})")
        return _Fork(self, message["pid"])

    def close(self) -> None:
        """See `Spawner.close`."""
        if self._server is not None:
            self._leave()

    def code(self, pid: int) -> int | None:
        """Return the exit code of a run that has ended, or None.

        Args:
            pid: Number of its process.
        """
        with contextlib.suppress(OSError):
            while message := self._receive(wait=False):
                self._codes[message["ended"]] = message["code"]
        if pid not in self._codes and (self._server is None or self._server.poll() is not None):
            self._codes[pid] = -signal.SIGKILL  # nobody is left to say how it ended
        return self._codes.get(pid)

    def _open(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "zoo.sweeps.nursery", str(theirs.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # an interrupt from the keyboard is the sweep's to pass on
            )
        if self._line is not None:
            self._line.close()
        self._line, self._held = ours, b""

    def _leave(self) -> str:
        """Hang up, at which the server ends; return how it ended."""
        assert self._server is not None
        if self._line is not None:
            self._line.close()
            self._line = None
        try:
            return f"exit code {self._server.wait(10)}"
        except subprocess.TimeoutExpired:
            self._server.kill()
            return f"exit code {self._server.wait()}"
        finally:
            self._server = None

    def _receive(self, *, wait: bool) -> dict[str, int] | None:
        """Return the next message of the server; None without one, or at its end."""
        if self._line is None:
            return None
        while b"\n" not in self._held:
            try:
                more = self._line.recv(65536, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not more:
                return None
            self._held += more
        line, _, self._held = self._held.partition(b"\n")
        found: dict[str, int] = json.loads(line)
        return found


class _Fork:
    """A run that a nursery has started."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """See `Handle.poll`."""
        if self.returncode is None:
            self.returncode = self.nursery.code(self.pid)
        return self.returncode

    def terminate(self) -> None:
        """See `Handle.terminate`."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Handle.kill`."""
        self._signal(signal.SIGKILL)

    def wait(self) -> int:
        """See `Handle.wait`."""
        while (code := self.poll()) is None:
            time.sleep(_PAUSE)  # it is no child of this process, which could wait for it
        return code

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
