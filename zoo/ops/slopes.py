"""The slopes of ALiBi, which decays use as well."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(
    heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Slope of each head, (heads,), for any number of heads.

    Args:
        heads: Heads H.
        dtype: float32 or float64.
        device: Where the slopes are needed.
    """
    power = 1 << (heads.bit_length() - 1)  # the largest power of two that is not above H
    first = torch.arange(1, power + 1, dtype=dtype, device=device)
    rest = torch.arange(heads - power, dtype=dtype, device=device) * 2 + 1
    return torch.exp2(-torch.cat((first * (8 / power), rest * (4 / power))))
