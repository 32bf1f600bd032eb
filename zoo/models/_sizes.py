"""Checks of sizes that the vision models share."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.errors import ZooError


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        ZooError: Not three whole numbers of at least 1.
    """
    if len(shape) != 3:
        raise ZooError(f"image_shape={shape!r} must be (channels, height, width)")
    for name, value in zip(("channels", "height", "width"), shape, strict=True):
        check_whole(f"image_shape: {name}", value, 1)
    return shape[0], shape[1], shape[2]


def check_whole(name: str, value: object, low: int) -> None:
    """Refuse what is no whole number, or too small.

    Raises:
        ZooError: It is not a whole number of at least `low`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ZooError(f"{name}={value!r} must be a whole number of at least {low}")


def check_rate(name: str, value: float) -> None:
    """Refuse a rate outside [0, 1).

    Raises:
        ZooError: It is one.
    """
    if not 0.0 <= value < 1.0:
        raise ZooError(f"{name}={value!r} must lie in [0, 1)")
