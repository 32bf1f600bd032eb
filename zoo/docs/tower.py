"""The tower: the rooms of the package and who imports whom, drawn from the imports themselves.

``python -m zoo.docs.tower docs/architecture.md`` renews the table between the markers of the page
and the picture beside it, architecture.svg. The rows are those of the contract in pyproject.toml
that import-linter checks; the arrows are the imports that are found, those left out that follow
from others. It takes a checkout with the tools of development.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import ZooError

BEGIN = "<!-- begin tower (python -m zoo.docs.tower docs/architecture.md) -->"
END = "<!-- end tower -->"
PICTURE = "architecture.svg"
WIDTH, ROW = 1000, 56  # of the picture, and from row to row


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


def draw(found: Sequence[Room]) -> str:
    """Draw the rooms as a tower, as SVG: the same rooms give the same text on every machine."""
    places = {}
    for row in range(1 + max(room.row for room in found)):
        names = [room.name for room in found if room.row == row]
        # Rooms alone in their row alternate sides, so that arrows find their way.
        shift = 80 * (-1) ** row if len(names) == 1 else 0
        for i, name in enumerate(names):
            places[name] = (round(WIDTH * (i + 0.5) / len(names)) + shift, 30 + ROW * row)
    height = 60 + ROW * max(room.row for room in found)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="13" text-anchor="middle">',
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#8a94a6"/></marker>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for upper, lower in arrows(found):
        (x, y), (u, v) = places[upper], places[lower]
        lines.append(
            f'<line x1="{x}" y1="{y + 13}" x2="{u}" y2="{v - 13}" stroke="#8a94a6" '
            'marker-end="url(#tip)"/>'
        )
    for name, (x, y) in places.items():
        wide = 20 + 8 * len(name)
        lines.append(
            f'<rect x="{x - wide // 2}" y="{y - 13}" width="{wide}" height="26" rx="6" '
            'fill="#eef2fb" stroke="#3b5bdb"/>'
            f'<text x="{x}" y="{y + 4}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def renew(page: Path) -> dict[Path, str]:
    """What the command writes: the page with its table written anew, and the picture.

    Args:
        page: docs/architecture.md of a checkout.

    Raises:
        ZooError: A marker is missing, or there is no contract.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ZooError(f"the markers {BEGIN!r} and {END!r} are missing from {page}")
    found = rooms(rows(page.resolve().parents[1] / "pyproject.toml"))
    return {
        page: f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}",
        page.with_name(PICTURE): draw(found),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m zoo.docs.tower docs/architecture.md")
    try:
        for target, content in renew(Path(sys.argv[1])).items():
            target.write_text(content, encoding="utf-8")
    except (OSError, ZooError) as problem:
        raise SystemExit(f"error: {problem}") from None
