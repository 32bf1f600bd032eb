"""The registry of tasks: a decorator on the class; modules are found by walking the package."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import TypeVar

from zoo.errors import ZooError, unknown
from zoo.tasks.base import Task

_registered: dict[str, type[Task]] = {}
T = TypeVar("T", bound=type[Task])


def task(name: str) -> Callable[[T], T]:
    """Class decorator that adds a task to the registry.

    Args:
        name: Unique snake_case name; data sets say it as their `task`.

    Raises:
        ZooError: The name is taken or malformed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ZooError(f"task name {name!r} is not snake_case, e.g. 'classification'")

    def add(cls: T) -> T:
        if name in _registered:
            owner = _registered[name]
            raise ZooError(
                f"task name {name!r} is taken by {owner.__module__}.{owner.__qualname__}"
            )
        _registered[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")


def names() -> list[str]:
    """Names of all tasks in alphabetical order."""
    _discover()
    return sorted(_registered)


def find(name: str) -> type[Task]:
    """Return the task of that name.

    Raises:
        ZooError: There is none.
    """
    _discover()
    if name not in _registered:
        raise unknown("task", name, _registered)
    return _registered[name]
