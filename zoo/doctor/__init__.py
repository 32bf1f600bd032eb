"""What this installation has, what it can run, and whether what it publishes is true.

    for section in examine(records="data/runs"):
        for line in section.lines: ...

A check says `ok`, `note` (worth knowing, or something optional that is missing) or `problem`, with
what to do about it. None of them downloads anything, and whatever is broken gives a line, not an
exception: a check that fails, warns or takes too long is itself a line.
"""

from __future__ import annotations

from zoo.doctor.examination import examine
from zoo.doctor.lines import LEVELS, Line, Section

__all__ = ["LEVELS", "Line", "Section", "examine"]
