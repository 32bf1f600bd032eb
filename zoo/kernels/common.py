"""What the kernels share: types, tile sizes, strides."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# Whether kernels run in Triton's interpreter; read when they are decorated, so one process has one
# answer.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)
# The products of a GPU's tensor cores want at least so many rows and columns.
LEAST = 16


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
