"""Sinusoidal absolute positions (Vaswani et al. 2017, section 3.5).

    x_t <- x_t + p_t,    p_t[2m] = sin(t w_m),  p_t[2m + 1] = cos(t w_m),  w_m = base^(-2m / C)

Added to the embeddings once, below the first layer; no parameters, no longest sequence, cost N * C.
The dot product p_s . p_t depends on s - t alone, which is what attention can read relative
positions from. Sines and cosines alternate as in the paper; its released code puts all sines in
front of all cosines, the same thing up to a fixed permutation of channels. An odd C ends with a
sine. The paper multiplies its embeddings by sqrt(C) first: that is the model's choice, not made
here. Angles are computed in float32 at least, whatever the type of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo import checks
from zoo.parts import Position
from zoo.registry import Paper, Taxonomy, Traits, register


def sinusoidal_reference(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Position vectors, one entry at a time, in float64.

    Args:
        positions: (N,).
        dim: Channels C.
        base: Base of the wavelengths.

    Returns:
        (N, C).
    """
    rows = []
    for t in positions.tolist():
        angles = [t * base ** (-2 * (c // 2) / dim) for c in range(dim)]
        rows.append([math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)])
    return torch.tensor(rows, dtype=torch.float64)


def sinusoidal_table(
    positions: Tensor, dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Position vectors of positions of any shape.

    Args:
        positions: (..., N).
        dim: Channels C.
        base: Base of the wavelengths.
        dtype: float32 or float64.

    Returns:
        (..., N, C).
    """
    pairs = torch.arange(0, dim, 2, device=positions.device, dtype=dtype)
    angles = positions[..., None].to(dtype) * base ** (-pairs / dim)  # (..., N, ceil(C / 2))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :dim]


@register(
    "sinusoidal",
    kind="position",
    paper=Paper("Attention Is All You Need", 2017, "1706.03762"),
    traits=Traits(equivariant=False),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
    ),
)
class Sinusoidal(Position):
    """Fixed sines and cosines of the position, added to the embeddings.

    Args:
        dim: Channels.
        base: Base of the wavelengths, which run from 2 pi to about ``base * 2 pi`` tokens.

    Raises:
        ZooError: `base` is not a number above 1.
    """

    embeds = True

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        also = "e.g. 10000.0"
        self.dim = dim
        self.base = float(checks.number("base", base, above=1, of="sinusoidal", also=also))

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the vectors of positions (N,) or (B, N) to embeddings (B, N, C)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x + sinusoidal_table(positions, self.dim, self.base, dtype).to(x.dtype)

    def extra_repr(self) -> str:
        """Base."""
        return f"base={self.base}"
