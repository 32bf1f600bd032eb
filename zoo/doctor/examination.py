"""All checks in their order."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from zoo.doctor.lines import Line, Section, section
from zoo.doctor.world import World

RECORDS = Path("data/runs")
PAGE = Path("leaderboard.md")


def examine(records: str | Path | None = None, page: str | Path | None = None) -> Iterator[Section]:
    """Look at everything, one topic after the other.

    Args:
        records: Folder of the records; None takes those of the repository in this folder, if this
            is one, and holds them to what is published.
        page: The leaderboard; None takes that of the repository, unless `records` are others.

    Yields:
        The topics with what their checks say.
    """
    yield _section("versions", "software", "versions")
    yield _section("optional extras", "software", "extras")
    yield _section("devices", "devices", "devices")
    yield _section("triton", "devices", "triton")
    world = World()
    yield _section("data", "data", "sources", world)
    yield _section("recipes", "data", "recipes", world)
    folder, strict = Path(records or RECORDS), records is None
    yield _section("records", "published", "records", folder, strict=strict)
    yield _section("claims", "published", "claims", folder, strict=strict)
    if page is not None or strict:
        path, strict = Path(page or PAGE), page is None
        yield _section("leaderboard", "published", "page", path, folder, strict=strict)


def _section(title: str, module: str, check: str, *args: Any, **options: Any) -> Section:
    """Carry out a check of a module, which may not even be importable where a library is broken."""

    def lines() -> Iterable[Line]:
        found = getattr(importlib.import_module(f"zoo.doctor.{module}"), check)
        yield from found(*args, **options)

    return section(title, lines)
