"""Pictures inside the page: figures as data addresses, and patterns of pairs as SVG elements."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from zoo.leaderboard.page._html_patterns import Panel

STEPS = 10
"""Shades that are told apart; the colours themselves are those of the page, bright or dark."""


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Args:
        caption: What it shows.
        address: The picture as a data address.
    """

    caption: str
    address: str


def figure(caption: str, svg: str) -> Picture:
    """Return a figure of the leaderboard as a picture inside the page.

    Args:
        caption: What it shows.
        svg: The figure.
    """
    content = base64.b64encode(svg.encode()).decode("ascii")
    return Picture(caption, f"data:image/svg+xml;base64,{content}")


def square(panel: Panel) -> Markup:
    """Return a panel as an SVG element, queries downwards and keys to the right.

    Args:
        panel: What is drawn; a pair is one unit wide.
    """
    size = len(panel.shades)
    label = f"{panel.title}: queries downwards, keys to the right, {size} of each"
    texts: list[tuple[object, float, float]] = [("key", size / 2, size + 2.6)]
    for place in (1, size):
        texts += [(place, place - 0.5, size + 2.6), (place, -1.6, place + 0.3)]
    return Markup("").join(
        [
            Markup('<svg viewBox="-4 -1 {} {}" role="img" aria-label="{}">').format(
                size + 5, size + 5, label
            ),
            *_paths(panel.shades),
            Markup('<path class="frame" d="M0 0h{0}v{0}h-{0}z"/>').format(size),
            *(Markup('<text x="{}" y="{}">{}</text>').format(x, y, text) for text, x, y in texts),
            Markup('<text transform="rotate(-90)" x="{}" y="-1.4">query</text>').format(-size / 2),
            Markup("</svg>"),
        ]
    )


def _paths(shades: Sequence[Sequence[float]]) -> list[Markup]:
    """One path for each shade, of runs of pairs in a row."""
    runs: dict[int, list[str]] = {}
    for y, row in enumerate(shades):
        x = 0
        for step, cells in groupby(round(STEPS * shade) for shade in row):
            width = len(list(cells))
            if step:
                runs.setdefault(step, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return [
        Markup('<path fill-opacity="{}" d="{}"/>').format(f"{step / STEPS:g}", "".join(runs[step]))
        for step in sorted(runs)
    ]
