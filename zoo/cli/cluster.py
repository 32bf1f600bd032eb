"""`--ray [ADDRESS]`: an option whose value may be left out, and what it stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from zoo.sweeps.spawn import Spawner

OPTION = "--ray"
LOCAL = "local"


def complete(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the address that a bare `--ray` stands for.

    Args:
        words: What was given; a word after `--ray` is an address unless it is an option or an
            axis, which is written with ``=``.
    """
    found: list[str] = []
    for i, word in enumerate(words):
        found.append(word)
        if word == "--":
            return [*found, *words[i + 1 :]]
        follows = words[i + 1] if i + 1 < len(words) else "-"
        if word == OPTION and (follows.startswith("-") or "=" in follows):
            found.append(LOCAL)
    return found


class RayCommand(TyperCommand):
    """A command with the option `--ray [ADDRESS]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        return super().parse_args(ctx, complete(args))


@contextlib.contextmanager
def spawner(address: str | None, jobs: int | None) -> Iterator[tuple[Spawner | None, int]]:
    """Open what starts the runs of a sweep, and say how many it is to start at once.

    Args:
        address: Of a cluster; None for processes of this machine.
        jobs: Runs at once; None for one on this machine, or as many as the cluster has room for.

    Raises:
        ZooError: The cluster cannot be used.
    """
    if address is None:
        yield None, 1 if jobs is None else jobs
        return
    from zoo.sweeps.cluster import RaySpawner

    with RaySpawner(address) as found:
        yield found, found.places if jobs is None else min(jobs, found.places)
