"""The soft mask branch of residual attention: an hourglass, and what makes a mask of its output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.feature._residual_units import Device, Unit, add_to, make_conv

# Keeps a position whose channels are all zero, or a channel that is constant, finite.
SMALLEST_NORM = 1e-6
VARIANCE_EPS = 1e-5


class MaskHead(nn.Module):
    """BatchNorm, ReLU and a 1 x 1 convolution, twice.

    Args:
        channels: Channels C.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, channels: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.conv1 = make_conv(channels, channels, 1, 1, device, dtype)
        self.bn2 = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.conv2 = make_conv(channels, channels, 1, 1, device, dtype)

    def forward(self, v: Tensor) -> Tensor:
        """Scores (B, C, H, W) of the hourglass's output (B, C, H, W)."""
        v = self.conv1(F.relu_(self.bn1(v)))
        return self.conv2(F.relu_(self.bn2(v)))


class MaskBranch(nn.Module):
    """Down by max pooling, up by interpolation, with a skip at every size between.

    Args:
        channels: Channels C.
        depth: Number of poolings, or "auto" for one where the map has room for it.
        r: Units after each change of size; the deepest level has twice as many.
        pool: "ceil" or "pad".
        extra_adds: Add each level once more on the way up, and the trunk at the top.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        channels: int,
        depth: int | str,
        r: int,
        pool: str,
        extra_adds: bool,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.depth, self.extra_adds = depth, extra_adds
        levels = max(depth, 1) if isinstance(depth, int) else 1

        def units(number: int) -> nn.Sequential:
            return nn.Sequential(
                *(Unit(channels, channels, device=device, dtype=dtype) for _ in range(number))
            )

        self.pool = make_pool(pool)
        self.down = nn.ModuleList(units(r) for _ in range(levels - 1))
        self.bottom = units(2 * r)
        self.skip = nn.ModuleList(units(1) for _ in range(levels - 1))
        self.up = nn.ModuleList(units(r) for _ in range(levels - 1))
        self.head = MaskHead(channels, device=device, dtype=dtype)

    def poolings(self, height: int, width: int) -> int:
        """Return how often a map is pooled.

        Raises:
            ZooError: It is too small for a depth that was given as a number.
        """
        side = min(height, width)
        if self.depth == "auto":
            return int(side >= 2)
        assert isinstance(self.depth, int)
        if side < 2**self.depth:
            raise ZooError(
                f"a map of {height} x {width} is too small for depth={self.depth}: its shorter "
                f"side must be at least {2**self.depth}; depth='auto' takes any map"
            )
        return self.depth

    def forward(self, x: Tensor, trunk: Tensor) -> Tensor:
        """Scores of the mask.

        Args:
            x: What both branches read, (B, C, H, W).
            trunk: Output of the trunk, (B, C, H, W).
        """
        sizes, skips, levels = [], [], []
        u = x
        for down, skip in zip(self.down, self.skip, strict=True):
            sizes.append(u.shape[2:])
            u = down(self.pool(u))
            skips.append(skip(u))
            levels.append(u)
        if self.poolings(*x.shape[2:]):
            sizes.append(u.shape[2:])
            u = self.pool(u)
        v = self.bottom(u)
        for up in self.up:
            v = resize(v, sizes.pop())
            if self.extra_adds:
                v = v.add_(levels.pop())
            v = up(v.add_(skips.pop()))
        if sizes:
            v = resize(v, sizes.pop())
            if self.extra_adds:
                v = add_to(v, trunk)
        return self.head(v)


def make_pool(pool: str) -> nn.MaxPool2d:
    """Make the max pooling 3 x 3 of stride 2.

    Args:
        pool: "ceil" halves downwards with windows that start inside, "pad" upwards with a border.
    """
    return nn.MaxPool2d(3, 2, 1) if pool == "pad" else nn.MaxPool2d(3, 2, 0, ceil_mode=True)


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolate bilinearly with the corners kept; the result is a tensor of its own."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def over_channels(m: Tensor) -> Tensor:
    """Divide (B, C, H, W) by the L2 norm over the channels of each position."""
    norm = torch.linalg.vector_norm(m, dim=1, keepdim=True, dtype=_wide(m))
    return m / norm.clamp_min(SMALLEST_NORM).to(m.dtype)


def over_positions(m: Tensor) -> Tensor:
    """Shift and scale each channel of (B, C, H, W) to mean 0 and variance 1 over positions."""
    variance, mean = torch.var_mean(m, dim=(2, 3), correction=0, keepdim=True)
    return (m - mean) * torch.rsqrt(variance + VARIANCE_EPS)


def _wide(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)
