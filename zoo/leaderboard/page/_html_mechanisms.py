"""What the pages say of each mechanism, from the registry and the file it is written in."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from markupsafe import Markup

from zoo import registry
from zoo.errors import ZooError
from zoo.host.spec import split
from zoo.leaderboard.page._html_patterns import Pattern
from zoo.leaderboard.page._html_text import arguments, docstring, inline
from zoo.registry import Entry, Traits

Draw = Callable[[Entry], Pattern | None]

GONE = "unregistered"
"""Kind of a mechanism that records name and nobody registers any more."""
_NOTHING = Markup()
ANY_MASK = "any_mask"
TRAITS = (*(item.name for item in fields(Traits) if item.type == "bool"), ANY_MASK)
"""Traits that rows can be filtered by."""


@dataclass(frozen=True)
class Option:
    """An option of a mechanism: its name, its default as text, and what it is."""

    name: str
    default: str
    about: Markup


@dataclass(frozen=True)
class Mechanism:
    """A mechanism as the pages show it.

    Args:
        name: Its registered name, or the one that a record has.
        id: Of its line among the mechanisms.
        address: Of its page, as seen from the leaderboard.
        entry: What the registry knows; None for one that is not registered.
        lead: Its file's docstring up to the first formula.
        rest: What follows there.
        options: Its options.
        pattern: Which pairs of query and key meet.
    """

    name: str
    id: str
    address: str
    entry: Entry | None
    lead: Markup = _NOTHING
    rest: Markup = _NOTHING
    options: tuple[Option, ...] = ()
    pattern: Pattern | None = None

    @property
    def kind(self) -> str:
        """Its kind."""
        return GONE if self.entry is None else self.entry.kind

    @property
    def traits(self) -> frozenset[str]:
        """The traits that hold."""
        if self.entry is None:
            return frozenset()
        held = self.entry.promises
        return frozenset(
            name
            for name in TRAITS
            if held.get(name, name == ANY_MASK and held.get("mask") == "any")
        )

    @property
    def summary(self) -> Markup:
        """What it is, in one sentence."""
        return inline("" if self.entry is None else self.entry.summary)

    @property
    def notes(self) -> Markup:
        """Remarks of its registration."""
        return inline("" if self.entry is None else self.entry.notes)

    @property
    def words(self) -> str:
        """What a search looks through."""
        if self.entry is None:
            return self.name.lower()
        title = self.entry.paper.title if self.entry.paper else ""
        words = (self.name, *self.entry.aliases, self.kind, self.entry.summary, title)
        return " ".join(words).lower()

    @property
    def file(self) -> str:
        """The file it is written in, as seen from the root of its package."""
        return "" if self.entry is None else self.entry.cls.__module__.replace(".", "/") + ".py"

    @property
    def taxonomy(self) -> list[tuple[str, str]]:
        """The axes that say something, with their values."""
        if self.entry is None:
            return []
        axes = {**asdict(self.entry.taxonomy), "family": self.entry.family}
        axes["causality"] = self.entry.causality
        texts = {name.replace("_", " "): _text(value) for name, value in axes.items()}
        return [(name, text) for name, text in texts.items() if text]


def parts(spec: str) -> list[tuple[str, str]]:
    """Return the parts of a specification: the text and the mechanism's name of each.

    Records may name what is not registered here, so that nothing is looked up by import.

    Args:
        spec: A specification, as a record has it.
    """
    try:
        texts = split(spec, "+")
    except ZooError:
        texts = [spec]
    return [(text, resolve(text.partition("(")[0].strip())) for text in texts]


def resolve(name: str) -> str:
    """Return the registered name of an alias, and any other name as it is."""
    entry = find(name)
    return name if entry is None else entry.name


def find(name: str) -> Entry | None:
    """Return what the registry knows of a name; None if it does not know it."""
    if ":" in name:
        return None
    try:
        return registry.info(name)
    except ZooError:
        return None


def ordered(names: Iterable[str]) -> list[str]:
    """Return all registered names and the given ones, by kind and then as the registry has them."""
    known = [name for kind in registry.KINDS for name in registry.list_names(kind=kind)]
    return [*known, *sorted(set(names) - set(known))]


def describe(name: str, id: str, address: str, draw: Draw | None) -> Mechanism:
    """Gather what the pages say of a mechanism.

    Args:
        name: Its name.
        id: Of its line among the mechanisms.
        address: Of its page, as seen from the leaderboard.
        draw: Says which pairs meet; None leaves that out.
    """
    entry = find(name)
    if entry is None:
        return Mechanism(name, id, address, None)
    module = inspect.getmodule(entry.cls)
    lead, rest = docstring((module and module.__doc__) or entry.cls.__doc__ or "")
    about = arguments(entry.cls.__doc__ or "")
    options = tuple(
        Option(key, _default(item), inline(about.get(key, "")))
        for key, item in entry.options.items()
    )
    drawn = None
    if draw is not None:
        with contextlib.suppress(ZooError):  # it cannot be built at the size of the patterns
            drawn = draw(entry)
    return Mechanism(name, id, address, entry, lead, rest, options, drawn)


def _default(item: inspect.Parameter) -> str:
    if item.default is item.empty:
        return "required"
    # Where something lies in memory is another thing every time.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(item.default))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return str(value)
