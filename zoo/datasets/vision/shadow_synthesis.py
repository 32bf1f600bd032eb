"""Shadows cast on photographs by computation: shapes, soft edges, colour and noise.

In linear light a pixel I under a shadow of strength m from 0 to 1 becomes, in each channel c,

    D_c = I_c (1 - m (1 - a_c)) + m b_c,     S_c = D_c + m n sqrt(D_c) e,     e a normal number

with a_R < a_G < a_B below 1, since a shadow is lit by the blue sky, b a little light from around
(a share of the image's mean colour), and noise as of counted photons. Real shadows also change the
look of textures, and are darkest where things touch; these do not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.pictures.colour import to_linear, to_srgb

SHAPES = 3
"""Most polygons or ellipses of a shadow."""
EDGES = 6
STRAY = 0.05
"""Most light from around, as a share of the mean colour."""
BLURS = 4
"""Widths of blur between which the edge of a shadow varies, the sharp edge included."""


def _uniform(low: float, high: float, size: tuple[int, ...], source: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=source)


def smooth_noise(rows: int, height: int, width: int, source: torch.Generator) -> Tensor:
    """Draw smooth fields (rows, H, W): normal numbers on a grid of 5x5, and between them."""
    grid = torch.randn(rows, 1, 5, 5, generator=source)
    return F.interpolate(grid, (height, width), mode="bicubic", align_corners=True)[:, 0]


def outlines(
    rows: int, height: int, width: int, area: tuple[float, float], source: torch.Generator
) -> Tensor:
    """Draw where shadows lie: one to three polygons and ellipses, or blobs of smooth noise.

    Each is the part of a landscape above a level, which is set so that the share of pixels is as
    drawn; blobs make up a third.

    Args:
        rows: Number of shadows.
        height: Pixels, H.
        width: Pixels, W.
        area: Smallest and largest share of the pixels in a shadow.
        source: Source of randomness.

    Returns:
        (rows, H, W) bool.
    """
    side = max(height, width)
    y = (torch.arange(height) + 0.5)[:, None] / side
    x = (torch.arange(width) + 0.5) / side
    shape = (rows, SHAPES, 1, 1)
    cx = _uniform(0, width / side, shape, source)
    cy = _uniform(0, height / side, shape, source)
    size = _uniform(0.15, 0.5, shape, source)
    turn = _uniform(0, 2 * math.pi, shape, source)
    u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
    v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
    stretch = _uniform(0.4, 1.0, shape, source)
    ellipse = (u.square() + (v / stretch).square()).sqrt()
    # A polygon is cut out by its edges; one of fewer edges than the most has some of them twice.
    edges = torch.randint(3, EDGES + 1, shape[:2], generator=source)[..., None]
    which = torch.arange(EDGES) % edges
    wobble = _uniform(-0.3, 0.3, (rows, SHAPES, EDGES), source).gather(2, which)
    away = _uniform(0.6, 1.4, (rows, SHAPES, EDGES), source).gather(2, which)
    angle = (2 * math.pi * which / edges + wobble)[..., None, None]
    planes = u[:, :, None] * angle.cos() + v[:, :, None] * angle.sin()
    polygon = (planes / away[..., None, None]).amax(2)
    straight = torch.rand(shape, generator=source) < 0.5
    heights = size - torch.where(straight, polygon, ellipse)
    count = torch.randint(1, SHAPES + 1, (rows, 1, 1, 1), generator=source)
    unused = torch.arange(SHAPES)[:, None, None] >= count
    land = heights.masked_fill(unused, -math.inf).amax(1)
    blob = torch.rand(rows, 1, 1, generator=source) < 1 / 3
    land = torch.where(blob, smooth_noise(rows, height, width, source), land)
    share = _uniform(*area, (rows,), source)
    pixels = (share * height * width).round().long().clamp(1, height * width)
    ranked = land.flatten(1).sort(descending=True).values
    return land >= ranked.gather(1, pixels[:, None] - 1)[..., None]


def blurred(masks: Tensor, sigma: float) -> Tensor:
    """Blur masks (B, H, W) by a Gaussian of so many pixels; the edge of the image is continued."""
    if sigma == 0:
        return masks
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = F.pad(masks[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel[None, None, :, None]), kernel[None, None, None])[:, 0]


def penumbra(region: Tensor, widest: float, source: torch.Generator) -> Tensor:
    """Soften edges by a width that varies along them.

    Args:
        region: (B, H, W) bool.
        widest: Largest standard deviation of the blur in pixels; 0 leaves edges sharp.
        source: Source of randomness.

    Returns:
        Strength of the shadow, (B, H, W) in [0, 1].
    """
    hard = region.float()
    rows, height, width = hard.shape
    place = torch.special.ndtr(smooth_noise(rows, height, width, source)) * (BLURS - 1)
    if widest == 0:
        return hard
    soft = torch.zeros_like(hard)
    for n in range(BLURS):
        weight = (1 - (place - n).abs()).clamp(min=0)
        soft += weight * blurred(hard, widest * n / (BLURS - 1))
    return soft.clamp(0, 1)


def cast(
    target: Tensor,
    strength: Tensor,
    attenuation: tuple[float, float],
    noise: float,
    source: torch.Generator,
) -> Tensor:
    """Darken images by shadows; where there is none they stay as they are.

    Args:
        target: (B, 3, H, W) in [0, 1], of 8 bits.
        strength: (B, H, W) in [0, 1].
        attenuation: Least and most light that is left, as a factor.
        noise: Standard deviation n of the noise at white.
        source: Source of randomness.

    Returns:
        (B, 3, H, W) in [0, 1], of 8 bits.
    """
    rows = len(target)
    light = to_linear(target)
    left = _uniform(*attenuation, (rows, 3, 1, 1), source).sort(1).values
    stray = _uniform(0, STRAY, (rows, 1, 1, 1), source) * light.mean((2, 3), keepdim=True)
    normal = torch.randn(target.shape, generator=source)
    m = strength[:, None]
    dark = light * (1 - m * (1 - left)) + m * stray
    dark = dark + m * noise * dark.clamp(min=0).sqrt() * normal
    return (to_srgb(dark.clamp(0, 1)) * 255).round() / 255


def misdrawn(region: Tensor, most: int, source: torch.Generator) -> Tensor:
    """Grow or shrink masks (B, H, W) by up to so many pixels, as a careless annotator would."""
    steps = torch.randint(-most, most + 1, (len(region),), generator=source)
    found = region.clone()
    for n in range(1, most + 1):
        for sign in (1, -1):
            chosen = steps == sign * n
            found[chosen] = grown(region[chosen], sign * n)
    return found


def grown(region: Tensor, pixels: int) -> Tensor:
    """Grow masks (B, H, W) by so many pixels to all sides; shrink them by a negative number."""
    if not len(region) or pixels == 0:
        return region
    if pixels < 0:
        return ~grown(~region, -pixels)
    x = region[:, None].float()
    return F.max_pool2d(x, 2 * pixels + 1, stride=1, padding=pixels)[:, 0] > 0
