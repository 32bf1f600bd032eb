"""What stands around the sums of lightning attention: its decays and the norm without weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.ops.slopes import alibi_slopes
from zoo.parts import widen

EPS = 1e-6


def decay_slopes(
    decay: str | float | Sequence[float] | None, heads: int, depth: int, layers: int | None
) -> tuple[float, ...] | None:
    """Slope of each head, lambda = exp(-slope), or None for no decay.

    Args:
        decay: "alibi", "paper", "fla", one decay in (0, 1] or one for each head, or None.
        heads: Heads H.
        depth: Index of the layer, from 0.
        layers: Number of layers, or None where nobody knows.

    Raises:
        ZooError: An unknown name, another number of decays than heads, or one outside (0, 1].
    """
    if decay is None:
        return None
    single = layers is None or layers == 1
    if decay == "alibi":
        factor = 1.0 if single else 1 - depth / (layers - 1) + 1e-5  # type: ignore[operator]
        return tuple(s * factor for s in alibi_slopes(heads, torch.float64).tolist())
    if decay in ("paper", "fla"):
        factor = 1.0 if single else 1 - depth / layers  # type: ignore[operator]
        start = 1 if decay == "paper" else 0
        return tuple(8 * (h + start) / heads * factor for h in range(heads))
    if isinstance(decay, str):
        raise unknown("decay", decay, ("alibi", "paper", "fla"))
    if not isinstance(decay, Iterable):
        return (-math.log(checks.number("decay", decay, above=0, high=1)),) * heads
    numbers = checks.each(checks.number, distinct=False)("decay", decay, above=0, high=1)
    if len(numbers) != heads:
        raise ZooError(
            f"decay={decay!r} has {len(numbers)} numbers; allowed: one for each of the "
            f"{heads} heads"
        )
    return tuple(-math.log(number) for number in numbers)


def srms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Divide by the root mean square along the last axis, in float32 at least; no weight."""
    wide = widen(x)
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)
