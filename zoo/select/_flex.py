"""FlexAttention for windows on a grid: compiled once for each grid, on CUDA.

PyTorch's own compiler turns the mask into a fused kernel. On a CPU it has no backward pass, so
there it runs only where it is asked for by name and no gradient is due.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from zoo.select._grid import Grid

LEAST = 16  # channels of a head that its matrix products want


def refuse_flex(q: Tensor, k: Tensor, v: Tensor, by_name: bool) -> str | None:
    """Say why FlexAttention cannot take these tensors, or None.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D).
        v: (B, G, N, E).
        by_name: It was asked for by name: then it may also run on a CPU.
    """
    if torch.compiler.is_compiling():
        return "it is compiled by itself, once for each grid"
    if torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into its kernels"
    kind = q.device.type
    if kind not in ("cuda", "cpu"):
        return f"it needs a CUDA device, not {kind!r}"
    if kind == "cpu":
        if not by_name:
            return "on a CPU FlexAttention has no backward pass and runs only when named"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return "on a CPU FlexAttention has no backward pass; call it under torch.no_grad()"
    if q.dtype == torch.float64:
        return "it computes in float32 at most, but q is float64"
    if min(q.shape[-1], v.shape[-1]) < LEAST:
        return f"heads of {min(q.shape[-1], v.shape[-1])} channels; allowed: {LEAST} or more"
    if not q.numel():
        return "there are no queries"
    return None


@lru_cache(maxsize=64)
def _block_mask(grid: Grid, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return grid.allowed(i, j)

    return create_block_mask(seen, None, None, grid.length, grid.length, device=str(device))


@lru_cache(maxsize=64)
def _compiled(grid: Grid) -> Callable[..., Tensor]:
    """FlexAttention compiled for one grid.

    The compiler gives up on a code object after a few masks, so each grid gets one of its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def call(*args: Any, **options: Any) -> Any:
        return flex_attention(*args, **options)

    own = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, dynamic=False)


def flex_windows(q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float) -> Tensor:
    """Attention within the windows of a grid, its prefix included.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        grid: The grid of N tokens.
        scale: Factor on dot products.
    """
    mask = _block_mask(grid, q.device)
    # One tensor in two places trips the kernel on a CPU.
    k, v = (x.clone() if x is q else x for x in (k, v))
    v = v.clone() if v is k else v
    grouped = k.shape[1] != q.shape[1]
    return _compiled(grid)(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
