"""Colours between the screen's sRGB, linear light and CIE L*a*b*.

    linear   v / 12.92 for v <= 0.04045, otherwise ((v + 0.055) / 1.055)^2.4      (IEC 61966-2-1)
    XYZ      a matrix times linear red, green and blue, over that of white
    f(t)     t^(1/3) for t > (6/29)^3, otherwise t / (3 (6/29)^2) + 4/29
    L, a, b  116 f(Y) - 16,  500 (f(X) - f(Y)),  200 (f(Y) - f(Z))

White is D65, as the screen's and as in scikit-image and OpenCV, or D50, to which MATLAB's
``makecform('srgb2lab')`` adapts colours (Bradford); either way a grey has a = b = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import checks

MATRICES = {
    "D65": (
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    ),
    "D50": (
        (0.4360747, 0.3850649, 0.1430804),
        (0.2225045, 0.7168786, 0.0606169),
        (0.0139322, 0.0971045, 0.7141733),
    ),
}
"""From linear red, green and blue to X, Y and Z, by white; white itself is the sum of columns."""


def to_linear(srgb: Tensor) -> Tensor:
    """Turn what a screen is told, from 0 to 1, into light."""
    high = ((srgb.clamp(min=0.04045) + 0.055) / 1.055).pow(2.4)
    return torch.where(srgb <= 0.04045, srgb / 12.92, high)


def to_srgb(linear: Tensor) -> Tensor:
    """Turn light, from 0 to 1, into what a screen is told."""
    high = 1.055 * linear.clamp(min=0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, linear * 12.92, high)


def to_lab(srgb: Tensor, white: str = "D65") -> Tensor:
    """Turn sRGB into L*a*b*, L from 0 to 100.

    Args:
        srgb: (B, 3, H, W) in [0, 1].
        white: "D65" or "D50".

    Returns:
        (B, 3, H, W).

    Raises:
        ZooError: Another white.
    """
    checks.choice("white", white, MATRICES)
    matrix = torch.tensor(MATRICES[white], device=srgb.device, dtype=srgb.dtype)
    matrix = matrix / matrix.sum(1, keepdim=True)
    t = torch.einsum("ij,bjhw->bihw", matrix, to_linear(srgb))
    edge = 6 / 29
    low = t / (3 * edge**2) + 4 / 29
    x, y, z = torch.where(t > edge**3, t.clamp(min=edge**3).pow(1 / 3), low).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
