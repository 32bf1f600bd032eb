"""What whole mixers share: checks of sizes and inputs that the host makes for parts."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import checks
from zoo.cache import LayerCache
from zoo.errors import ZooError


def check_sizes(dim: int, heads: int, dropout: float) -> None:
    """Refuse sizes that the host would refuse.

    Args:
        dim: Channels.
        heads: Heads; they must divide `dim`.
        dropout: In [0, 1).

    Raises:
        ZooError: A size does not fit.
    """
    for name, value in (("dim", dim), ("heads", heads)):
        checks.whole(name, value)
    if dim % heads:
        near = [h for h in range(1, dim + 1) if dim % h == 0]
        best = min(near, key=lambda h: abs(h - heads))
        raise ZooError(f"dim={dim} is not divisible by heads={heads}; nearest allowed heads={best}")
    checks.number("dropout", dropout, 0, below=1)


def check_input(
    name: str, dim: int, x: Tensor, mask: Tensor | None, cache: LayerCache | None
) -> Tensor | None:
    """Check the input of a mixer that can hide keys only, and bring its mask to (B, N).

    Args:
        name: Registry name of the mixer.
        dim: Channels that it was made for.
        x: (B, N, C).
        mask: Boolean (B|1, 1, 1, N), or with all tokens since the first of the cache, or None.
        cache: The layer's cache, or None.

    Returns:
        True at the tokens of x that may be seen, (B, N), or None for all.

    Raises:
        ZooError: `x` or `mask` has the wrong shape or type.
    """
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ZooError(f"x of shape {tuple(x.shape)} must be (batch, tokens, dim={dim})")
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ZooError(f"mask has dtype {mask.dtype}; allowed: torch.bool with True = may attend")
    samples, length = x.shape[:2]
    total = length + (cache.length if cache is not None else 0)
    if (
        mask.ndim != 4
        or mask.shape[0] not in (1, samples)
        or mask.shape[1:3] != (1, 1)
        or mask.shape[3] not in (length, total)
    ):
        raise ZooError(
            f"{name!r} can hide keys only: mask must have shape (batch, 1, 1, keys) with "
            f"batch={samples} and keys={total}, got {tuple(mask.shape)}"
        )
    return mask[:, 0, 0, -length:].expand(samples, length)
