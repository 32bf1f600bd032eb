"""Images of any size through a network by overlapping tiles.

The image is cut into tiles of one size that overlap; the network sees one at a time, and where
tiles meet their outputs are blended with weights that rise smoothly from nothing:

    y_p = sum_t w_t(p) y_t(p) / sum_t w_t(p)
    w   = 0 for the first `margin` pixels inside a border, then sin^2 up to 1 along the overlap

along each axis, and w is the product; borders of the image have no ramp. Tiles start at multiples
of `multiple`, so that a network which halves the image sees the pixels in the same phase as in the
whole image, and the last tile of a row ends where the image ends.

An output that depends on at most `margin` pixels around it is the same as for the whole image.
RASM's depends on all pixels, through the means of channels, so its tiles are an approximation.
Memory: the image, the output and a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError


def _starts(size: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """First pixels of the tiles along an axis."""
    if size <= tile:
        return [0]
    step = (tile - overlap) // multiple * multiple
    last = -(-(size - tile) // multiple) * multiple
    return [*range(0, last, step), last]


def _ramp(start: int, stop: int, size: int, overlap: int, margin: int, like: Tensor) -> Tensor:
    """Weights of a tile along an axis, (stop - start,)."""
    weights = like.new_ones(stop - start)
    rising = like.new_zeros(overlap)
    steps = torch.arange(overlap - 2 * margin, device=like.device) + 0.5
    eased = torch.sin(steps * (math.pi / 2 / (overlap - 2 * margin))).square() if overlap else steps
    rising[margin : overlap - margin] = eased.to(like.dtype)
    rising[overlap - margin :] = 1.0
    if start > 0:
        weights[:overlap] *= rising
    if stop < size:
        weights[stop - start - overlap :] *= rising.flip(0)
    return weights


def tiled(
    model: Callable[..., Tensor],
    image: Tensor,
    mask: Tensor | None = None,
    *,
    tile: int = 256,
    overlap: int = 64,
    margin: int = 0,
    multiple: int = 8,
) -> Tensor:
    """Run a network on an image of any size, tile by tile, without gradients.

    Args:
        model: From the image, and the mask where one is given, to an image of the same height and
            width. It should be in evaluation mode.
        image: (B, C, H, W).
        mask: (B, 1, H, W), or None.
        tile: Side of a tile in pixels.
        overlap: Pixels that neighbouring tiles share, at least.
        margin: Pixels next to the border of a tile that are thrown away, below half of `overlap`.
        multiple: Tiles start at multiples of this; the factor by which the network shrinks maps.

    Returns:
        What the network gives, (B, C', H, W).

    Raises:
        ZooError: Sizes that do not fit each other, or a network that changes height or width.
    """
    tile, multiple = checks.whole("tile", tile), checks.whole("multiple", multiple)
    overlap, margin = checks.whole("overlap", overlap, 0), checks.whole("margin", margin, 0)
    if tile - overlap < multiple:
        raise ZooError(
            f"overlap={overlap} leaves less than multiple={multiple} pixels of tile={tile} to step "
            f"by; allowed: up to {max(0, tile - multiple)}"
        )
    if tile < 2 * overlap:
        raise ZooError(f"overlap={overlap} is above half of tile={tile}")
    if margin and 2 * margin >= overlap:
        raise ZooError(f"margin={margin} must be below half of overlap={overlap}")
    if image.ndim != 4:
        raise ZooError(f"image of shape {tuple(image.shape)} must be (batch, channels, H, W)")
    height, width = image.shape[2:]
    if mask is not None and tuple(mask.shape) != (len(image), 1, height, width):
        raise ZooError(
            f"mask of shape {tuple(mask.shape)} does not fit an image of shape "
            f"{tuple(image.shape)}; allowed: {(len(image), 1, height, width)}"
        )
    given = (image,) if mask is None else (image, mask)
    out, total = None, None
    with torch.no_grad():
        rows = _starts(height, tile, overlap, multiple)
        columns = _starts(width, tile, overlap, multiple)
        for top in rows:
            bottom = min(top + tile, height)
            for left in columns:
                right = min(left + tile, width)
                y = model(*(x[..., top:bottom, left:right] for x in given))
                if tuple(y.shape[2:]) != (bottom - top, right - left):
                    raise ZooError(
                        f"the network gave {tuple(y.shape)} for a tile of {bottom - top} x "
                        f"{right - left} pixels; allowed: the same height and width"
                    )
                if len(rows) == len(columns) == 1:
                    return y
                down = _ramp(top, bottom, height, overlap, margin, y)
                weights = down[:, None] * _ramp(left, right, width, overlap, margin, y)
                if out is None or total is None:
                    out = y.new_zeros(*y.shape[:2], height, width)
                    total = y.new_zeros(height, width)
                out[..., top:bottom, left:right] += weights * y
                total[top:bottom, left:right] += weights
    assert out is not None
    assert total is not None
    return out / total
