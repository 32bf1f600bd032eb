"""What a field of a record may hold: one check per kind of value.

A check takes the name of the field and a value, and returns the value in the one form that JSON
gives back (a tuple as a list, a NumPy number as a Python number), so that a record equals its own
round trip; anything else is refused by name. Numbers that JSON cannot hold have names, `nan`, `inf`
and `-inf`, which stand for them wherever the field is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any

from zoo.errors import ZooError

Check = Callable[[str, object], Any]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,()@~-]{0,199}")
_NON_FINITE = ("nan", "inf", "-inf")


def wrong(name: str, value: object, allowed: str) -> ZooError:
    """Build the error for a field that holds something else than it may."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ZooError(f"record field {name!r} is {shown} ({type(value).__name__}), not {allowed}")


def text(name: str, value: object) -> str:
    """Accept a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise wrong(name, value, "a non-empty string")
    return str(value)


def identifier(name: str, value: object) -> str:
    """Accept a string that is a file name on every system."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise wrong(name, value, "a name that is safe as a file name (at most 200 characters)")
    return value


def flag(name: str, value: object) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def count(name: str, value: object) -> int:
    """Accept an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise wrong(name, value, "an integer of at least 0")
    return int(value)


def number(name: str, value: object) -> float:
    """Accept any number, finite or not."""
    if isinstance(value, str) and value in _NON_FINITE:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(name, value, "a number")
    try:
        converted = float(value)
    except OverflowError:
        raise wrong(name, value, "a number within the range of a float") from None
    return math.nan if math.isnan(converted) else converted  # one nan object: records compare


def seconds(name: str, value: object) -> float:
    """Accept a finite number of at least 0."""
    converted = number(name, value)
    if not math.isfinite(converted) or converted < 0:
        raise wrong(name, value, "a finite number of at least 0")
    return converted


def positive(name: str, value: object) -> float:
    """Accept a finite number above 0."""
    converted = number(name, value)
    if not math.isfinite(converted) or converted <= 0:
        raise wrong(name, value, "a finite number above 0")
    return converted


def moment(name: str, value: object) -> str:
    """Accept an ISO time with its zone; it is kept in UTC."""
    try:
        parsed = datetime.fromisoformat(text(name, value))
        if parsed.tzinfo is None:
            raise ValueError
        return parsed.astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        raise wrong(name, value, "an ISO time with its zone") from None


def plain(name: str, value: object) -> Any:
    """Accept plain data; a number that JSON cannot hold becomes its name."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        converted = float(value)
        return converted if math.isfinite(converted) else str(converted)
    if isinstance(value, list | tuple):
        return [plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        kept = {str(key): plain(f"{name}.{key}", item) for key, item in value.items()}
        if len(kept) != len(value):
            raise wrong(name, value, "a mapping whose keys differ as text")
        return kept
    raise wrong(name, value, "plain data (null, true, false, numbers, text, lists, mappings)")


def tree(name: str, value: object) -> dict[str, Any]:
    """Accept a mapping of plain data."""
    if not isinstance(value, dict):
        raise wrong(name, value, "a mapping")
    return plain(name, value)


def one_of(*allowed: Any) -> Check:
    """Make a check that accepts the given values."""

    def check(name: str, value: object) -> Any:
        if isinstance(value, bool) or value not in allowed:
            raise wrong(name, value, f"one of {', '.join(map(str, allowed))}")
        return allowed[allowed.index(value)]

    return check


def optional(check: Check) -> Check:
    """Make a check that accepts null beside what `check` accepts."""
    return lambda name, value: None if value is None else check(name, value)


def keyed(**checks: Check) -> Check:
    """Make a check that accepts a mapping with exactly the given keys."""

    def check(name: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != set(checks):
            raise wrong(name, value, f"a mapping with exactly the keys {', '.join(sorted(checks))}")
        return {key: inner(f"{name}.{key}", value[key]) for key, inner in checks.items()}

    return check


def mapping(inner: Check) -> Check:
    """Make a check that accepts a mapping from non-empty text to what `inner` accepts."""

    def check(name: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(name, value, "a mapping")
        return {text(name, key): inner(f"{name}.{key}", item) for key, item in value.items()}

    return check


def history(name: str, value: object) -> list[dict[str, float]]:
    """Accept a list of mappings from metric to number, each with its step."""
    if not isinstance(value, list | tuple):
        raise wrong(name, value, "a list of mappings")
    rows = []
    for index, row in enumerate(value):
        label = f"{name}[{index}]"
        numbers = mapping(number)(label, row)
        if "step" not in numbers:
            raise wrong(label, row, "a mapping with a step")
        rows.append({**numbers, "step": count(f"{label}.step", row["step"])})
    return rows


metric = keyed(select=text, report=text, mode=one_of("max", "min"), solved=optional(number))
data = keyed(name=text, fingerprint=optional(text))
device = keyed(type=text, name=text, threads=count)


def require(name: str, value: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise unless every key is in the mapping."""
    for key in keys:
        if key not in value:
            held = ", ".join(sorted(value)) or "nothing"
            raise ZooError(f"record field {name!r} lacks {key!r}; it holds {held}")
