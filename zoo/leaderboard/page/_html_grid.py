"""Sortable tables as data: columns, lines and cells, and names for what links point to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

_LONGEST = 100  # characters of a file's name, which file systems bound


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        key: Its name in the address of a view.
        title: Heading.
        number: Whether it is sorted by numbers.
        down: Whether the first click puts the greatest on top.
        initial: Whether the lines come sorted by it, the smallest on top.
    """

    key: str
    title: str | Markup
    number: bool = True
    down: bool = False
    initial: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, and what it is sorted by if that is not the text itself."""

    shown: str | Markup
    value: float | str | None = None

    @property
    def key(self) -> str | None:
        """The value as an attribute has it."""
        return repr(self.value) if isinstance(self.value, float) else self.value


@dataclass(frozen=True)
class Line:
    """A row.

    Args:
        id: Where links point to, or an empty string.
        cells: Its cells.
        kinds: Kinds of its mechanisms; None for a row that no filter hides.
        traits: Traits that all of its mechanisms have.
        words: What a search looks through.
    """

    id: str
    cells: tuple[Cell, ...]
    kinds: tuple[str, ...] | None = None
    traits: frozenset[str] = frozenset()
    words: str = ""


@dataclass(frozen=True)
class Grid:
    """A table."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


@dataclass
class Ids:
    """Gives every thing a name of its own that is safe in an attribute and in an address.

    Args:
        taken: Names that are given, in small letters.
    """

    taken: set[str] = field(default_factory=set)

    def new(self, *texts: str) -> str:
        """Return a name that nothing else has, made of some texts."""
        base = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-") for text in texts)
        return self._free(base, "")

    def file(self, text: str, ending: str) -> str:
        """Return a name for a file that nothing else has, whatever the case of its letters.

        Args:
            text: What it is made of; it may be anything that a record has.
            ending: With its dot.
        """
        base = re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:_LONGEST]
        return self._free(base or "unnamed", ending)

    def _free(self, base: str, ending: str) -> str:
        name, count = base + ending, 1
        while name.lower() in self.taken:
            count += 1
            name = f"{base}-{count}{ending}"
        self.taken.add(name.lower())
        return name


def coded(text: str) -> Markup:
    """Return a text in the style of code."""
    return Markup("<code>{}</code>").format(text)


def linked(address: str, text: str | Markup) -> Markup:
    """Return a link to a place in this page, or to another page."""
    return Markup('<a href="{}">{}</a>').format(address, text)


def lines(texts: Sequence[str | Markup]) -> Markup:
    """Return texts below each other."""
    return Markup("<br>").join(texts)
