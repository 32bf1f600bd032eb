"""Labels of points in a figure, put where they hide nothing."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi, sin

from matplotlib.axes import Axes

_SIZE = 7  # points
_RINGS = (7, 14, 22, 32, 44)  # distances to try, in points
_WAYS = 12


def place(
    axis: Axes,
    points: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    other: str,
) -> None:
    """Label points, each at the nearest place that no label and no point has taken.

    Args:
        axis: Where the points are; its limits and scales are final.
        points: Position of each point by its label.
        colours: Colours of the labels.
        other: Colour of points whose label has none.
    """
    figure = axis.figure
    axis.autoscale_view()
    scale = 72 / figure.dpi
    spots = {name: axis.transData.transform(spot) * scale for name, spot in points.items()}
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots.values()]
    left, bottom, right, top = (value * scale for value in axis.bbox.extents)
    for name in sorted(spots, key=lambda name: (name not in colours, name)):
        x, y = spots[name]
        width, height = 0.62 * _SIZE * len(name), 1.1 * _SIZE
        dx, dy = float(_RINGS[0]), 0.0
        for away, way in ((r, w) for r in _RINGS for w in range(_WAYS)):
            angle = 2 * pi * way / _WAYS
            dx, dy = away * cos(angle), away * sin(angle)
            start = x + dx - (width if cos(angle) < -0.1 else 0 if cos(angle) > 0.1 else width / 2)
            box = (start, y + dy - height / 2, start + width, y + dy + height / 2)
            inside = box[0] > left and box[2] < right + 60 and box[1] > bottom and box[3] < top
            if inside and not any(_meet(box, item) for item in taken):
                break
        side = "right" if dx < -0.1 * _RINGS[0] else "left" if dx > 0.1 * _RINGS[0] else "center"
        taken.append(
            (
                x + dx - (width if side == "right" else 0 if side == "left" else width / 2),
                y + dy - height / 2,
                x + dx + (0 if side == "right" else width if side == "left" else width / 2),
                y + dy + height / 2,
            )
        )
        far = (dx**2 + dy**2) ** 0.5 > 1.5 * _RINGS[0]
        axis.annotate(
            name,
            points[name],
            (dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=_SIZE,
            color=colours.get(name, "#707070"),
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": other} if far else None,
            annotation_clip=False,
        )


def _meet(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
