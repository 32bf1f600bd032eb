"""The tower: the rooms of the package and who imports whom, drawn from the imports themselves.

``python -m zoo.docs.tower docs/architecture.md`` renews the table between the markers of the page
and the picture beside it, architecture.svg. The rows are those of the contract in pyproject.toml
that import-linter checks; the arrows are the imports that are found, those left out that follow
from others. It takes a checkout with the tools of development.
"""

from __future__ import annotations

import importlib
import inspect
import io
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ZooError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "<!-- begin tower (python -m zoo.docs.tower docs/architecture.md) -->"
END = "<!-- end tower -->"
PICTURE = "architecture.svg"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "zoo", "font.size": 9}


@dataclass(frozen=True)
class Room:
    """One package or module directly below `zoo`.

    Args:
        name: Its name without the package.
        row: Number of its row, 0 at the top.
        imports: Rooms that it imports from.
    """

    name: str
    row: int
    imports: frozenset[str]

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(importlib.import_module(f"zoo.{self.name}")) or "").split("\n")[0]


def rows(project: Path) -> list[list[str]]:
    """Rooms by row, the top first, as the contract names them.

    Args:
        project: The file pyproject.toml.

    Raises:
        ZooError: The file or the contract is missing.
    """
    try:
        content = tomllib.loads(project.read_text(encoding="utf-8"))
        (contract,) = content["tool"]["importlinter"]["contracts"]
    except (OSError, KeyError, ValueError) as error:
        raise ZooError(f"{project} states no contract of import-linter: {error}") from None
    return [[name.strip() for name in row.split("|")] for row in contract["layers"]]


def rooms(found: Sequence[Sequence[str]]) -> list[Room]:
    """Rooms with what they import, in the order of the rows.

    Args:
        found: Rooms by row.
    """
    import grimp

    graph = grimp.build_graph("zoo", include_external_packages=False, cache_dir=None)
    names = {name for row in found for name in row}
    for row in found:
        for name in row:
            if graph.find_descendants(f"zoo.{name}"):
                graph.squash_module(f"zoo.{name}")
    return [
        Room(
            name,
            number,
            frozenset(
                other.removeprefix("zoo.")
                for other in graph.find_modules_directly_imported_by(f"zoo.{name}")
                if other.removeprefix("zoo.") in names - {name}
            ),
        )
        for number, row in enumerate(found)
        for name in row
    ]


def table(found: Sequence[Room]) -> str:
    """Markdown table of the rooms, from the top down."""
    lines = ["| room | what it is | imports from |", "|---|---|---|"]
    names = [room.name for room in found]
    for room in found:
        others = ", ".join(f"`{name}`" for name in names if name in room.imports)
        lines.append(f"| `zoo.{room.name}` | {room.summary} | {others} |")
    return "\n".join(lines)


def arrows(found: Sequence[Room]) -> list[tuple[str, str]]:
    """Imports between rooms without those that follow from others."""
    import networkx as nx

    graph = nx.DiGraph((room.name, other) for room in found for other in sorted(room.imports))
    graph.add_nodes_from(room.name for room in found)
    return sorted(nx.transitive_reduction(graph).edges)


def draw(found: Sequence[Room]) -> Figure:
    """Draw the rooms as a tower."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    places = _places(found)
    height = 1 + max(room.row for room in found)
    figure = Figure(figsize=(11, 0.62 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(height - 0.3, -0.7))
    axes.axis("off")
    for upper, lower in arrows(found):
        (x, y), (u, v) = places[upper], places[lower]
        axes.annotate(
            "",
            xy=(u, v - 0.23),
            xytext=(x, y + 0.23),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#8a94a6",
                "lw": 0.8,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    for room in found:
        x, y = places[room.name]
        wide = 0.012 + 0.0088 * len(room.name)
        axes.add_patch(
            FancyBboxPatch(
                (x - wide / 2, y - 0.22),
                wide,
                0.44,
                boxstyle="round,pad=0,rounding_size=0.008",
                facecolor="#eef2fb",
                edgecolor="#3b5bdb",
                lw=0.9,
                zorder=3,
                mutation_aspect=height,
            )
        )
        axes.text(x, y, room.name, ha="center", va="center", family="monospace", zorder=4)
    return figure


def _places(found: Sequence[Room]) -> Mapping[str, tuple[float, float]]:
    """Centre of each room; rows with few rooms alternate sides, so that arrows find their way."""
    by_row: dict[int, list[str]] = {}
    for room in found:
        by_row.setdefault(room.row, []).append(room.name)
    places = {}
    for row, names in by_row.items():
        shift = 0.0 if len(names) > 2 else 0.09 * (-1) ** row
        for i, name in enumerate(names):
            places[name] = ((i + 0.5) / len(names) + shift * (len(names) == 1), float(row))
    return places


def renew(page: Path) -> dict[Path, str]:
    """What the command writes: the page with its table written anew, and the picture.

    Args:
        page: docs/architecture.md of a checkout.

    Raises:
        ZooError: A marker is missing, or there is no contract.
    """
    from matplotlib import rc_context

    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ZooError(f"the markers {BEGIN!r} and {END!r} are missing from {page}")
    found = rooms(rows(page.resolve().parents[1] / "pyproject.toml"))
    buffer = io.StringIO()
    with rc_context(STYLE):
        draw(found).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    picture = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
    return {
        page: f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}",
        page.with_name(PICTURE): picture,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m zoo.docs.tower docs/architecture.md")
    try:
        for target, content in renew(Path(sys.argv[1])).items():
            target.write_text(content, encoding="utf-8")
    except (OSError, ZooError) as problem:
        raise SystemExit(f"error: {problem}") from None
