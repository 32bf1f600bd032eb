"""What a check says, and how a check is kept from failing or hanging."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

LEVELS = ("ok", "note", "problem")
PATIENCE = 120.0
"""Seconds that the checks of one section may take."""


@dataclass(frozen=True)
class Line:
    """What a check says.

    Args:
        name: What was looked at.
        level: One of `LEVELS`.
        text: The finding, in one sentence.
        todo: What to do about it; empty if nothing.
        facts: The finding as plain data.
    """

    name: str
    level: str
    text: str
    todo: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """The lines of one topic.

    Args:
        title: The topic.
        lines: What its checks say.
    """

    title: str
    lines: tuple[Line, ...]


def ok(name: str, text: str, **facts: Any) -> Line:
    """Say that something is as it should be."""
    return Line(name, "ok", text, "", facts)


def note(name: str, text: str, todo: str = "", **facts: Any) -> Line:
    """Say something worth knowing, or that something optional is missing."""
    return Line(name, "note", text, todo, facts)


def problem(name: str, text: str, todo: str, **facts: Any) -> Line:
    """Say that something is wrong, and what to do about it."""
    return Line(name, "problem", text, todo, facts)


def reason(error: BaseException) -> str:
    """Return what an error says in one line; its kind, if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def section(title: str, check: Callable[[], Iterable[Line]], patience: float = PATIENCE) -> Section:
    """Carry out the checks of one topic, whatever becomes of them.

    Args:
        title: The topic.
        check: Yields the lines; those that came before it failed or was given up are kept.
        patience: Seconds to wait for it.
    """
    found: list[Line] = []
    failed: list[Line] = []

    def work() -> None:
        try:
            for line in check():
                found.append(line)
        except (Exception, SystemExit) as error:
            text = f"this check failed: {type(error).__name__}: {reason(error)}"
            failed.append(problem(title, text, "report it together with this line"))

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        # A driver or a file system that does not answer cannot be interrupted, only left alone.
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(patience)
    if thread.is_alive():
        text = f"this check did not end within {patience:g} seconds"
        failed.append(problem(title, text, "see whether a device or a folder does not answer"))
    said = dict.fromkeys(reason(item.message) for item in heard if _worth_telling(item))  # type: ignore[arg-type]
    remarks = (note(title, f"warning: {text}") for text in said)
    return Section(title, (*found, *failed, *remarks))


def _worth_telling(heard: warnings.WarningMessage) -> bool:
    """Whether a warning is for users; the others are for those who write libraries."""
    quiet = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)
    return not issubclass(heard.category, (*quiet, ResourceWarning))
