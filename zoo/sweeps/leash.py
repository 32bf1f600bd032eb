"""The command line on a leash: ``python -m zoo.sweeps.leash ...`` ends when its input does.

Whoever starts it holds the other end of a pipe. Should that process be killed, nobody is left to
end the run, which would go on for hours on a machine that is given to others; so the run, the head
of a group of processes, ends its whole group by itself, and removes the folder that it is told of
in the environment.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
import signal
import threading

COMMAND = "zoo.cli:main"
"""What a process of a sweep is: the program's entry point, by name as for an installer."""
FOLDER = "ZOO_LEASH_FOLDER"


def _follow() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when Python ends
        pass
    if folder := os.environ.get(FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the command line until it is done or the leash is cut."""
    if os.getpgrp() == os.getpid():  # a process it has started in turn ends with the group
        threading.Thread(target=_follow, daemon=True).start()
    pkgutil.resolve_name(COMMAND)()


if __name__ == "__main__":
    main()
