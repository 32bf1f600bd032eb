"""What a field of a record may hold, beside what `zoo.checks` knows: one check per kind of value.

A check returns the value in the one form that JSON gives back (a tuple as a list, a NumPy number as
a Python number), so that a record equals its own round trip. Numbers that JSON cannot hold have
names, `nan`, `inf` and `-inf`, which stand for them wherever the field is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any

from zoo import checks
from zoo.checks import choice, optional, text, wrong
from zoo.checks import flag as flag
from zoo.errors import ZooError

Check = Callable[[str, object], Any]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,()@~-]{0,199}")
_NON_FINITE = ("nan", "inf", "-inf")


def identifier(name: str, value: object) -> str:
    """Accept a string that is a file name on every system."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise wrong(name, value, "a name that is safe as a file name (at most 200 characters)")
    return value


def count(name: str, value: object) -> int:
    """Accept a whole number of at least 0."""
    return checks.whole(name, value, 0)


def number(name: str, value: object) -> float:
    """Accept any number, finite or not."""
    given = float(value) if isinstance(value, str) and value in _NON_FINITE else value
    if isinstance(given, bool) or not isinstance(given, Real):
        raise wrong(name, value, "a number")
    try:
        converted = float(given)
    except OverflowError:
        raise wrong(name, value, "a number within the range of a float") from None
    return math.nan if math.isnan(converted) else converted  # one nan object: records compare


def seconds(name: str, value: object) -> float:
    """Accept a finite number of at least 0."""
    return float(checks.number(name, value, 0))


def positive(name: str, value: object) -> float:
    """Accept a finite number above 0."""
    return float(checks.number(name, value, above=0))


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
    raise wrong(name, value, "plain data (None, True, False, numbers, text, lists, mappings)")


def tree(name: str, value: object) -> dict[str, Any]:
    """Accept a mapping of plain data."""
    if not isinstance(value, dict):
        raise wrong(name, value, "a mapping")
    return plain(name, value)


def one_of(*allowed: Any) -> Check:
    """Make a check that accepts the given values, which are names or not."""
    names = [item for item in allowed if isinstance(item, str)]

    def check(name: str, value: object) -> Any:
        if names:
            return choice(name, value, names)
        if isinstance(value, bool) or value not in allowed:
            raise wrong(name, value, " or ".join(map(str, allowed)))
        return allowed[allowed.index(value)]

    return check


def keyed(**inner: Check) -> Check:
    """Make a check that accepts a mapping with exactly the given keys."""

    def check(name: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) != set(inner):
            raise wrong(name, value, f"a mapping with exactly the keys {', '.join(sorted(inner))}")
        return {key: of(f"{name}.{key}", value[key]) for key, of in inner.items()}

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
            raise ZooError(f"{name} lacks {key!r}; it holds {held}")
