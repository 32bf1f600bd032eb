"""What the kernels share: types, tile sizes, strides."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Whether kernels run in Triton's interpreter; read when they are decorated, so one process has one
# answer.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)
# The products of a GPU's tensor cores want at least so many rows and columns.
LEAST = 16
LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
    """Queries (B, H, N, D), keys (B, G, N, D) and values (B, G, N, E), G dividing H."""

    q: Tensor
    k: Tensor
    v: Tensor


class Results(NamedTuple):
    """Outputs (B, H, N, E) and base-2 log-sum-exps of the rows (B, H, N)."""

    out: Tensor
    lse: Tensor


class Head(NamedTuple):
    """Widths of heads, and how they are read; compiled into the kernels.

    Args:
        d: Width D of queries and keys.
        e: Width E of values.
        block_d: Columns of a tile of queries or keys.
        block_e: Columns of a tile of values.
        upcast: Whether tiles become float32 after loading.
        precision: Of products of float32 tiles.
    """

    d: int
    e: int
    block_d: int
    block_e: int
    upcast: bool
    precision: str


def upcast(x: Tensor) -> bool:
    """Whether a kernel has to turn tiles of `x` into float32 after loading them.

    The interpreter computes on the bit patterns of bfloat16 as if they were integers.
    """
    return INTERPRET and x.dtype == torch.bfloat16


def block_d(width: int) -> int:
    """Columns of a tile that holds heads of this width: a power of two, at least 16."""
    return max(LEAST, triton.next_power_of_2(width))


def precision(x: Tensor) -> str:
    """Precision of products of float32 tiles: what the user allows torch's own products."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and x.is_cuda else "ieee"


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all axes but the last, whose stride has to be 1."""
    assert x.stride(-1) == 1 or x.shape[-1] <= 1
    return x.stride()[:-1]


def rows(x: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def head(q: Tensor, v: Tensor) -> Head:
    """The heads of q (.., D) and v (.., E)."""
    d, e = q.shape[-1], v.shape[-1]
    return Head(d, e, block_d(d), block_d(e), upcast(q), precision(q))


def like(x: Tensor, width: int | None = None) -> Tensor:
    """Room for (B, H, N, width), by default as wide as x, in the memory order of projections.

    Args:
        x: (B, H, N, D). The room lies in memory as (B, N, H, width).
        width: Default D.
    """
    batch, heads, length, d = x.shape
    return x.new_empty(batch, length, heads, d if width is None else width).transpose(1, 2)
