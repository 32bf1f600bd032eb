"""Recipes as they are now: what a table has to share with its recipe to count.

A table is stale if its recipe makes runs of another group by now. Every view of the records, be it
the leaderboard, a comparison or the doctor's, asks here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from zoo.leaderboard import tracks
from zoo.leaderboard.tracks import Contender
from zoo.runs import config as configs
from zoo.runs.records import Record
from zoo.statistics.spread import Row, Table


@dataclass(frozen=True)
class Current:
    """A recipe as it is now.

    Args:
        group: Hash of what its runs share.
        rates: Learning rates of its budget.
        contenders: Who might stand in its table.
        settings: Its settings by dotted key, each as JSON text.
    """

    group: str
    rates: tuple[float, ...]
    contenders: tuple[Contender, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def current(records: Iterable[Record]) -> dict[str, Current]:
    """Return the recipes of records as they are now; those that do not ship are left out.

    Args:
        records: The records. What finished in one of them can be hosted, and is not asked about.
    """
    ran: dict[str, set[str]] = defaultdict(set)
    for record in records:
        ran[record.recipe] |= {record.attention} if record.status == "finished" else set()
    return {name: _now(name, ran[name]) for name in sorted(set(ran) & set(configs.recipes()))}


def _now(recipe: str, ran: Collection[str]) -> Current:
    config = configs.load(recipe)
    return Current(
        _group(config),
        tuple(sorted(config.budget.lrs)),
        tuple(tracks.contenders(config, lambda one: one.spec not in ran)),
        flat(configs.settings(config)),
    )


def group_now(recipe: str) -> str | None:
    """Return the group of the runs that a recipe makes now; None if it does not ship.

    Args:
        recipe: Name of a recipe.

    Raises:
        ZooError: The recipe cannot be loaded.
    """
    return _group(configs.load(recipe)) if recipe in configs.recipes() else None


def is_stale(table: Table, group: str | None) -> bool:
    """Return whether the recipe of a table has been changed since its runs.

    Args:
        table: The table.
        group: Group of the runs that its recipe makes now; None if that is not known.
    """
    return group is not None and group != table.group


def _group(config: DictConfig) -> str:
    return configs.identify(config).group


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Return a tree of settings by dotted key, each value as JSON text.

    Args:
        value: The tree.
        name: Key of the tree itself.
    """
    if not isinstance(value, dict) or not value:
        return {name: json.dumps(value, sort_keys=True)}
    found: dict[str, str] = {}
    for key, item in value.items():
        found |= flat(item, f"{name}.{key}" if name else str(key))
    return found


def settings_of(rows: Iterable[Row]) -> dict[str, set[str]]:
    """Return the settings of all runs of a table by dotted key, each with its values.

    Args:
        rows: Its rows.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for run in row.runs:
            for name, value in flat(run.config).items():
                found[name].add(value)
    return found


def _compared(name: str) -> bool:
    """Whether a difference in a setting makes tables differ."""
    free = ("attention", "seed", "optim.lr", "description", "name", "track")
    return name not in free and not name.startswith("budget.")


def differing(
    own: Mapping[str, set[str]], others: Iterable[Mapping[str, set[str]]]
) -> dict[str, str]:
    """Return what tells a table from the others of its recipe, each as JSON text.

    Args:
        own: Settings of the table.
        others: Settings of all tables of its recipe.
    """
    return {
        name: min(values)
        for name, values in sorted(own.items())
        if _compared(name)
        and len(values) == 1
        and any(other.get(name) != values for other in others)
    }


def since(own: Mapping[str, set[str]], now: Mapping[str, str]) -> dict[str, str]:
    """Return what a stale table had that its recipe has no longer, each as text.

    Args:
        own: Settings of the table.
        now: Settings of the recipe.
    """
    return {
        name: f"{min(values)} (now {now.get(name, 'gone')})"
        for name, values in sorted(own.items())
        if _compared(name) and len(values) == 1 and values != {now.get(name)}
    }
