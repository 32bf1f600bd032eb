"""The cells of a sweep, from the words of a command line.

`["attention=mha,linear", "seeds=3", "lr=1e-3,3e-3"]` is a grid of three axes and twelve cells; a
cell is the list of overrides of one run, such as `["attention=mha", "seed=0", "lr=1e-3"]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from zoo import checks
from zoo.errors import ZooError
from zoo.host.spec import split

Grid = dict[str, tuple[str, ...]]


def parse_grid(items: Iterable[str]) -> Grid:
    """Read the axes of a grid.

    Args:
        items: `key=value,value`; a comma within brackets or quotes separates nothing. `seeds=3`
            means the seeds 0, 1 and 2.

    Returns:
        Values by key, in the order given.

    Raises:
        ZooError: An axis is malformed or given twice.
    """
    grid: Grid = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ZooError(f"axis {item!r} of the grid: write key=value or key=value,value")
        if key == "seeds":
            key, values = "seed", _seeds(text)
        else:
            values = tuple(split(text, ","))
        if key in grid:
            raise ZooError(f"axis {item!r} of the grid: {key!r} is given twice")
        if "" in values:
            raise ZooError(f"axis {item!r} of the grid has an empty value")
        if twice := [value for value in values if values.count(value) > 1]:
            raise ZooError(f"axis {item!r} of the grid has {twice[0]!r} twice")
        grid[key] = values
    return grid


def cells(grid: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the overrides of every run of a grid, the last axis varying fastest.

    Args:
        grid: Values by key.
    """
    axes = [[f"{key}={value}" for value in values] for key, values in grid.items()]
    return [list(cell) for cell in itertools.product(*axes)]


def _seeds(text: str) -> tuple[str, ...]:
    given = int(text) if text.strip().isdecimal() else text
    number = checks.whole("seeds", given, also="or write seed=4,7 to name them")
    return tuple(map(str, range(number)))
