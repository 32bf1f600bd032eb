"""Checks of option values, so that a wrong one is refused where the data set is built."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from zoo.errors import ZooError


def whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Require a whole number within bounds.

    Args:
        name: Name of the option.
        value: Its value.
        low: Smallest allowed value.
        high: Largest allowed value, or None.

    Raises:
        ZooError: Not a whole number, or out of bounds.
    """
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    right = isinstance(value, int) and not isinstance(value, bool)
    if not right or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ZooError(f"{name} must be a whole number {allowed}; got {value!r}")


def number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Require a finite number within bounds, both included.

    Raises:
        ZooError: Not a number, not finite, or out of bounds.
    """
    allowed = f">= {low}" if high == math.inf else f"from {low} to {high}"
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not (math.isfinite(value) and low <= value <= high):  # type: ignore[arg-type,operator]
        raise ZooError(f"{name} must be a number {allowed}; got {value!r}")


def flag(name: str, value: object) -> None:
    """Require True or False.

    Raises:
        ZooError: Anything else, the string "false" included.
    """
    if not isinstance(value, bool):
        raise ZooError(f"{name} must be True or False; got {value!r}")


def several(name: str, values: object, *, distinct: bool = True) -> list[Any]:
    """Return the items of a sequence option as a list.

    Args:
        name: Name of the option.
        values: Its value.
        distinct: Whether an item may appear only once.

    Raises:
        ZooError: A single value where several are expected, or an item twice.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ZooError(f"{name} must be a list; got {values!r}")
    items = list(values)
    if distinct and any(item in items[:i] for i, item in enumerate(items)):
        raise ZooError(f"{name} names a value twice: {items!r}")
    return items
