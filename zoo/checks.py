"""Checks of values, with one voice: an error names the argument, its value and what is allowed.

A check takes the name of an argument and its value, and returns the value in one form. What a
registered name should have been is said by `zoo.errors.unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from zoo import _moved
from zoo.errors import ZooError


def whole(name: str, value: object, low: int | None = 1, high: int | None = None) -> int:
    """Require a whole number within bounds, both included.

    Args:
        name: Name of the argument.
        value: Its value; True and False are no numbers.
        low: Smallest allowed value, or None.
        high: Largest allowed value, or None.

    Raises:
        ZooError: Not a whole number, or out of bounds.
    """
    right = isinstance(value, Integral) and not isinstance(value, bool)
    if right and (low is None or value >= low) and (high is None or value <= high):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload]
    raise ZooError(f"{name}={shown(value)} must be a whole number{_bounds(low, high)}")


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Require a finite number within bounds.

    Args:
        name: Name of the argument.
        value: Its value; True and False are no numbers.
        low: Smallest allowed value.
        high: Largest allowed value.
        above: A bound that the value must exceed, in place of `low`.
        below: A bound that the value must stay under, in place of `high`.

    Raises:
        ZooError: Not a number, not finite, or out of bounds.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        found = float(value)
        over = found > above if above is not None else found >= low
        under = found < below if below is not None else found <= high
        if over and under:
            return found
    raise ZooError(f"{name}={shown(value)} must be {_interval(low, high, above, below)}")


def flag(name: str, value: object) -> bool:
    """Require True or False; the string "false" is neither.

    Args:
        name: Name of the argument.
        value: Its value.

    Raises:
        ZooError: Anything else.
    """
    if not isinstance(value, bool):
        raise ZooError(f"{name}={shown(value)} must be True or False")
    return value


def several(name: str, values: object, *, distinct: bool = True) -> list[Any]:
    """Return the items of a sequence as a list.

    Args:
        name: Name of the argument.
        values: Its value.
        distinct: Whether an item may appear only once.

    Raises:
        ZooError: A single value where several are expected, or an item twice.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ZooError(f"{name}={shown(values)} must be a list")
    items = list(values)
    if distinct and any(item in items[:i] for i, item in enumerate(items)):
        raise ZooError(f"{name}={shown(items)} names a value twice")
    return items


def shown(value: object) -> str:
    """Return a value as errors show it, cut to a length that is read."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bounds(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return "" if high is None else f" of at most {high}"


def _interval(low: float, high: float, above: float | None, below: float | None) -> str:
    least, most = (low if above is None else above), (high if below is None else below)
    if math.isinf(least) and math.isinf(most):
        return "a finite number"
    if math.isinf(most):
        return f"a number {'of at least' if above is None else 'above'} {least:g}"
    if math.isinf(least):
        return f"a number {'of at most' if below is None else 'below'} {most:g}"
    left, right = "[" if above is None else "(", "]" if below is None else ")"
    return f"a number in {left}{least:g}, {most:g}{right}"


def __getattr__(name: str) -> Any:
    return _moved.function(__name__, name)
