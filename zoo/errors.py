"""Errors that name what was wrong, what was allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(ValueError):
    """Something a user asked for is wrong; the message is one readable line."""


class CompatibilityError(ZooError):
    """Two parts, or a part and a setting, that cannot work together."""


def nearest(name: str, allowed: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of the allowed names that look most like `name`, best first."""
    names = sorted({str(item) for item in allowed})
    lowered = {item.lower(): item for item in names}
    wanted = name.lower()
    close = difflib.get_close_matches(wanted, list(lowered), n=max(1, len(lowered)), cutoff=0.5)

    def likeness(item: str) -> tuple[float, bool]:
        ratio = difflib.SequenceMatcher(None, item, wanted).ratio()
        return ratio, sorted(item) == sorted(wanted)  # letters that changed places count for more

    close.sort(key=likeness, reverse=True)
    found = [lowered[item] for item in close[:limit]]
    if name:
        found += [n for n in names if name.lower() in n.lower() and n not in found]
    return found[:limit]


def unknown(what: str, name: object, allowed: Iterable[str]) -> ZooError:
    """Build the error for an unknown name.

    Args:
        what: What the name should have been, e.g. ``"recipe"``.
        name: The value that was given.
        allowed: Every valid name.
    """
    names = sorted({str(item) for item in allowed})
    close = nearest(str(name), names)
    if close:
        hint = f"did you mean {' or '.join(repr(n) for n in close)}?"
    elif not names:
        hint = "none is allowed here"
    elif len(names) <= 12:
        hint = f"allowed: {', '.join(names)}"
    else:
        hint = f"there are {len(names)}, e.g. {', '.join(names[:6])}"
    return ZooError(f"unknown {what} {name!r}; {hint}")
