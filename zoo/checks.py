"""Checks of values, with one voice: an error names the argument, its value and what is allowed.

A check takes the name of an argument and its value, and returns the value in one form (a NumPy
number as a Python number, a sequence as a list or tuple). The text of its error may say whose
argument it is (`of`) and what else is allowed or usual (`also`). Relations between arguments raise
what `wrong` builds; what a registered name should have been is said by `zoo.errors.unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, Concatenate, ParamSpec, TypeVar

from zoo import _moved
from zoo.errors import ZooError, unknown

_P = ParamSpec("_P")
_T = TypeVar("_T")
_FAR = 10**15  # beyond, a float is no guide to whole numbers


def whole(
    name: str,
    value: object,
    low: int | None = 1,
    high: int | None = None,
    *,
    of: str = "",
    also: str = "",
) -> int:
    """Require a whole number within bounds, both included.

    Args:
        name: Name of the argument.
        value: Its value; True and False are no numbers.
        low: Smallest allowed value, or None.
        high: Largest allowed value, or None.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.

    Raises:
        ZooError: Not a whole number, or out of bounds.
    """
    found = _whole(value, low, high)
    if found is not None:
        return found
    allowed, nearest = f"a whole number{_bounds(low, high)}", _nearest(value, 1, low, high)
    if isinstance(value, Integral) and (low is None or high is None):
        nearest = []  # the one bound says it
    raise wrong(name, value, allowed, of=of, also=also, nearest=nearest)


def multiple(
    name: str,
    value: object,
    step: int,
    low: int | None = None,
    *,
    of: str = "",
    also: str = "",
) -> int:
    """Require a whole number that another one divides.

    Args:
        name: Name of the argument.
        value: Its value; True and False are no numbers.
        step: What divides it.
        low: Smallest allowed value, itself a multiple; None for `step`.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.

    Raises:
        ZooError: Not a whole number, not a multiple, or too small.
    """
    kind = "an even number" if step == 2 else f"a multiple of {step}"
    return _stepped(name, value, kind, step, step if low is None else low, of, also)


def odd(name: str, value: object, low: int = 1, *, of: str = "", also: str = "") -> int:
    """Require an odd number.

    Args:
        name: Name of the argument.
        value: Its value; True and False are no numbers.
        low: Smallest allowed value, odd itself.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.

    Raises:
        ZooError: Not a whole number, even, or too small.
    """
    return _stepped(name, value, "an odd number", 2, low, of, also)


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    of: str = "",
    also: str = "",
) -> float:
    """Require a finite number within bounds; a whole one stays whole.

    Args:
        name: Name of the argument.
        value: Its value; True and False are no numbers.
        low: Smallest allowed value.
        high: Largest allowed value.
        above: A bound that the value must exceed, in place of `low`.
        below: A bound that the value must stay under, in place of `high`.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.

    Raises:
        ZooError: Not a number, not finite, or out of bounds.
    """
    found = _number(value)
    if found is not None and -math.inf < found < math.inf:
        over = found > above if above is not None else found >= low
        under = found < below if below is not None else found <= high
        if over and under:
            return found
    raise wrong(name, value, _interval(low, high, above, below), of=of, also=also)


def flag(name: str, value: object, *, of: str = "", also: str = "") -> bool:
    """Require True or False; the string "false" is neither.

    Args:
        name: Name of the argument.
        value: Its value.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.

    Raises:
        ZooError: Anything else.
    """
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False", of=of, also=also)
    return value


def text(name: str, value: object) -> str:
    """Require a string that is not empty.

    Raises:
        ZooError: Anything else.
    """
    if not isinstance(value, str) or not value:
        raise wrong(name, value, "a non-empty string")
    return str(value)


def choice(name: str, value: object, allowed: Iterable[str], *, of: str = "") -> str:
    """Require one of several names.

    Args:
        name: Name of the argument.
        value: Its value.
        allowed: The names.
        of: Name of the part or function whose argument it is.

    Raises:
        ZooError: Another name, or no name at all.
    """
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise unknown(f"{name} of {of!r}" if of else name, value, names)
    return value


def optional(
    check: Callable[Concatenate[str, object, _P], _T], meaning: str = ""
) -> Callable[Concatenate[str, object, _P], _T | None]:
    """Make a check that accepts None beside what `check` accepts.

    Args:
        check: The check.
        meaning: What None stands for, as errors add it to "or None", such as "for all blocks".
    """

    def checked(name: str, value: object, *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        if value is None:
            return None
        try:
            return check(name, value, *args, **kwargs)
        except ZooError as error:
            raise ZooError(f"{error}, or None {meaning}".rstrip()) from None

    return checked


def each(
    check: Callable[Concatenate[str, object, _P], _T], *, distinct: bool = True
) -> Callable[Concatenate[str, object, _P], list[_T]]:
    """Make a check that accepts a sequence of what `check` accepts.

    Args:
        check: Check of one item; its name is that of the sequence with the place in brackets.
        distinct: Whether an item may appear only once.
    """

    def checked(name: str, value: object, *args: _P.args, **kwargs: _P.kwargs) -> list[_T]:
        items = enumerate(several(name, value, distinct=distinct))
        return [check(f"{name}[{i}]", item, *args, **kwargs) for i, item in items]

    return checked


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
        raise wrong(name, values, "a list")
    items = list(values)
    if distinct and any(item in items[:i] for i, item in enumerate(items)):
        raise wrong(name, items, "a list of different values")
    return items


def wholes(
    name: str,
    values: object,
    count: int | None = None,
    low: int = 1,
    *,
    of: str = "",
    also: str = "",
) -> tuple[int, ...]:
    """Require a sequence of whole numbers.

    Args:
        name: Name of the argument.
        values: Its value.
        count: How many; None for one or more.
        low: Smallest allowed value of each.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.

    Raises:
        ZooError: Not a sequence of so many whole numbers, or one out of bounds.
    """
    right = isinstance(values, Iterable) and not isinstance(values, str | bytes)
    items = list(values) if right else []  # type: ignore[call-overload]
    found = [_whole(item, low, None) for item in items]
    if found and None not in found and count in (None, len(found)):
        return tuple(found)  # type: ignore[arg-type]
    many = "whole numbers" if count is None else f"{count} whole numbers"
    raise wrong(name, values, f"{many} of at least {low}", of=of, also=also)


def image_shape(name: str, value: object) -> tuple[int, int, int]:
    """Require the channels, height and width of images.

    Raises:
        ZooError: Not three whole numbers of at least 1.
    """
    sides = list(value) if isinstance(value, Iterable) else []
    if len(sides) != 3:
        raise wrong(name, value, "(channels, height, width)")
    channels = whole(f"{name}: channels", sides[0])
    return channels, whole(f"{name}: height", sides[1]), whole(f"{name}: width", sides[2])


def wrong(
    name: str,
    value: object,
    allowed: str,
    *,
    of: str = "",
    also: str = "",
    nearest: Iterable[object] = (),
) -> ZooError:
    """Build the error for a value that is not what it must be.

    Args:
        name: Name of the argument.
        value: Its value.
        allowed: What it must be.
        of: Name of the part or function whose argument it is.
        also: What else is allowed or usual.
        nearest: Valid values next to it.
    """
    whose = f" of {of!r}" if of else ""
    close = ", ".join(map(str, nearest))
    close = f" (nearest: {close})" if close else ""
    more = f", {also}" if also else ""
    return ZooError(f"{name}={shown(value)}{whose} must be {allowed}{close}{more}")


def shown(value: object) -> str:
    """Return a value as errors show it, in one line and cut to a length that is read."""
    written = repr(value).replace("\n", " ")
    return written if len(written) <= 80 else written[:77] + "..."


def _whole(value: object, low: int | None, high: int | None) -> int | None:
    """Return the whole number within bounds that a value is, None if it is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    found = int(value)
    return found if (low is None or found >= low) and (high is None or found <= high) else None


def _stepped(name: str, value: object, kind: str, step: int, low: int, of: str, also: str) -> int:
    found = _whole(value, low, None)
    if found is not None and (found - low) % step == 0:
        return found
    nearest = _nearest(value, step, low, None)
    raise wrong(name, value, f"{kind} of at least {low}", of=of, also=also, nearest=nearest)


def _nearest(value: object, step: int, low: int | None, high: int | None) -> list[int]:
    """Return the allowed values on both sides of a number that is none of them."""
    found = _number(value)
    if found is None or not -_FAR < found < _FAR:
        return []
    first = 0 if low is None else low
    under = first + math.floor((found - first) / step) * step
    sides = {under, under if under == found else under + step}
    least, most = (-_FAR if low is None else low), (_FAR if high is None else high)
    return sorted({min(max(side, least), most) for side in sides})


def _number(value: object) -> float | None:
    """Return the Python number that a value stands for, None if there is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return int(value) if isinstance(value, Integral) else found


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
        return f"a number {'of at least' if above is None else 'above'} {_short(least)}"
    if math.isinf(least):
        return f"a number {'of at most' if below is None else 'below'} {_short(most)}"
    left, right = "[" if above is None else "(", "]" if below is None else ")"
    return f"a number in {left}{_short(least)}, {_short(most)}{right}"


def _short(bound: float) -> str:
    written = f"{bound:g}"
    return written if float(written) == bound else str(bound)


def __getattr__(name: str) -> Any:
    return _moved.function(__name__, name)
