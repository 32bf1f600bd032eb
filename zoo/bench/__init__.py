"""Speed, memory and FLOPs of mechanisms side by side, in one process.

`measure` takes a `Setting` (token mixers over lengths) or a `ShapeSetting` (feature modules, slots
and whole timm models) and returns a `Report`, `zoo.bench.report` prints and saves it. Every
contender is timed in turn, round after round, so that a slow neighbour on the machine slows all of
them alike, and is compared with the baseline of the same round.
"""

from __future__ import annotations

from zoo.bench.contenders import HANDWRITTEN, Handwritten
from zoo.bench.measurement import Report, Row, measure
from zoo.bench.settings import Setting
from zoo.bench.shapes import ShapeSetting, sort_of

__all__ = [
    "HANDWRITTEN",
    "Handwritten",
    "Report",
    "Row",
    "Setting",
    "ShapeSetting",
    "measure",
    "sort_of",
]
