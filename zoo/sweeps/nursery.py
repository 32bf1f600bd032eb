"""The process that a sweep's runs are forked from: ``python -m zoo.sweeps.nursery FD``.

It imports what a run needs, and neither starts a thread nor touches a device. On the socket it is
given it takes requests, lines of JSON with the file for the output attached, and answers each with
the number of the new process; when one has ended it says so. Once the other end of the socket is
gone it leaves; its forks go on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import select
import socket
import sys
import traceback
from typing import Any, NoReturn

from zoo import models, registry
from zoo.sweeps.leash import COMMAND

_PAUSE = 0.05  # seconds between two looks at the forks
_LONGEST = 1 << 20  # bytes of a request


def main(descriptor: int) -> None:
    """Serve until the other end hangs up.

    Args:
        descriptor: Number of the socket.
    """
    import zoo.runs.train  # noqa: F401

    for name in ("zoo.cli", "zoo.cli.training"):  # the program, which a fork enters by its name
        importlib.import_module(name)
    registry.discover()
    models.names()
    line = socket.socket(fileno=descriptor)
    while True:
        ready, _, _ = select.select([line], [], [], _PAUSE)
        if ready and not _serve(line):
            return
        _reap(line)


def _serve(line: socket.socket) -> bool:
    """Fork for a request; return whether there was one."""
    text = b""
    files: list[int] = []
    while not text.endswith(b"\n"):
        part, found, _, _ = socket.recv_fds(line, _LONGEST, 1)
        if not part:
            return False
        text, files = text + part, files + found
    request = json.loads(text)
    pid = os.fork()
    if pid == 0:
        line.close()
        _run(request, files[0])
    os.close(files[0])
    with contextlib.suppress(OSError):  # both sides set it, so that it is whoever comes first
        os.setpgid(pid, pid)
    line.sendall(json.dumps({"pid": pid}).encode() + b"\n")
    return True


def _reap(line: socket.socket) -> None:
    """Say which forks have ended, and how."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended = {"ended": pid, "code": os.waitstatus_to_exitcode(status)}
        line.sendall(json.dumps(ended).encode() + b"\n")


def _run(request: dict[str, Any], output: int) -> NoReturn:
    """Be a run: its output, its environment, its exit code."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)  # the lock on the file lives as long as one of these
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        command = pkgutil.resolve_name(COMMAND)
        # A run on several devices starts the other processes by what this one was started with.
        sys.argv = ["zoo", "run", *request["arguments"]]
        sys.modules["__main__"].__spec__ = importlib.util.find_spec("zoo.__main__")
        command(sys.argv[1:])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
