"""Large images through a model of small ones: overlapping tiles, faded into each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks


def places(length: int, tile: int) -> list[int]:
    """First pixels of tiles that cover a length, each overlapping the next by a quarter or more."""
    if length <= tile:
        return [0]
    step = max(1, tile - tile // 4)
    count = -(-(length - tile) // step) + 1
    return [round(n * (length - tile) / (count - 1)) for n in range(count)]


def in_tiles(
    model: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    mask: Tensor,
    tile: tuple[int, int],
) -> Tensor:
    """Run a model on tiles of images and put its outputs together, weighted towards their middles.

    Images smaller than a tile are continued by their last pixels, and the output is cut.

    Args:
        model: From images (b, 3, h, w) and masks (b, 1, h, w) to images.
        image: (B, 3, H, W).
        mask: (B, 1, H, W).
        tile: Height h and width w.

    Raises:
        ZooError: A tile without pixels.
    """
    checks.wholes("tile", tile, 2)
    height, width = image.shape[2:]
    room = (0, max(0, tile[1] - width), 0, max(0, tile[0] - height))
    full = F.pad(image, room, mode="replicate")
    marked = F.pad(mask.to(image.dtype), room, mode="replicate").to(mask.dtype)
    fades = []
    for side in tile:
        x = torch.arange(1, side + 1, device=image.device, dtype=image.dtype)
        fades.append(torch.minimum(x, x.flip(0)))
    weight = fades[0][:, None] * fades[1]
    total, weights = torch.zeros_like(full), torch.zeros_like(full[:1, :1])
    for top in places(full.shape[2], tile[0]):
        for left in places(full.shape[3], tile[1]):
            rows, columns = slice(top, top + tile[0]), slice(left, left + tile[1])
            found = model(full[..., rows, columns], marked[..., rows, columns])
            total[..., rows, columns] += weight * found.to(total.dtype)
            weights[..., rows, columns] += weight
    return (total / weights)[..., :height, :width]
