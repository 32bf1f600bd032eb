"""The gate of MoBA on the GPU: the best past blocks of each query, without all of their scores.

One kernel leaves the mean key of each block; another walks over the means with a tile of queries
and keeps the best few blocks of every row in registers, sorted. Scores are exact to float32 and,
as with `zoo.select.moba.choose_blocks`, the first of equal blocks wins.

Everything goes by upper bounds of sizes, nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import _moba_gate, moba, refuse
from zoo.kernels import _moba_launch as launch
from zoo.kernels.common import INTERPRET, block_d, rows, strides, upcast

HEAD_DIM = 256
# The lists of a tile of queries stay in registers; longer ones would spill on Hopper.
MOST = 16
# Parts of bfloat16 that hold a number of each type.
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def refuse_gate(q: Tensor, k: Tensor, picks: int, *, by_name: bool = False) -> str | None:
    """Say why the kernel cannot choose `picks` blocks by q and k, or None where it can."""
    reason = refuse(q, k, head_dim=HEAD_DIM, by_name=by_name)
    if reason is None and picks > MOST:
        reason = f"{picks} blocks to choose are more than {MOST}"
    return reason


def _tile(q: Tensor) -> tuple[int, int, int]:
    """Rows and blocks of a tile, warps; small in the interpreter, where tests need many tiles."""
    if INTERPRET:
        return 32, 16, 4
    wide = block_d(q.shape[-1]) > 128 or q.dtype == torch.float32
    return 64, 32 if wide else 64, 4


@torch.library.custom_op("zoo::moba_choose", mutates_args=(), device_types=("cpu", "cuda"))
def moba_choose(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, block: int, picks: int) -> Tensor:
    """Chosen blocks (B, H, N, P) int32."""
    moba._check_device(q)
    q, k = rows(q), rows(k)
    batch, heads, length, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    out = q.new_empty(batch, heads, length, picks, dtype=torch.int32)
    if not out.numel():
        return out
    packed = cu_seqlens is not None
    # Of a single sequence only whole blocks can be chosen.
    count = launch.count_blocks(keys, block, cu_seqlens) if packed else keys // block
    if not count:
        return out.fill_(-1)
    starts = stops = numbers = base = None
    if packed:
        starts, stops, _, numbers, base = launch.tables(keys, block, cu_seqlens, q.device)
    means = q.new_empty(batch, groups, count, 3, width, dtype=torch.bfloat16)
    size, columns, warps = _tile(q)
    padded = block_d(width)
    tokens = min(16 if INTERPRET else 4096 // padded, triton.next_power_of_2(block))
    with torch.cuda.device_of(q):
        _moba_gate.block_means[(count * batch * groups,)](
            k, means, starts, stops, *strides(k), count, block,
            G=groups, D=width, BD=padded, BT=tokens, PACKED=packed, UPCAST=upcast(k),
        )  # fmt: skip
        _moba_gate.choose[(triton.cdiv(length, size) * batch * heads,)](
            q, means, numbers, base, out, *strides(q),
            length, count, batch * heads, keys - length, block,
            H=heads, GROUP=heads // groups, P=picks, D=width, BD=padded, TERMS=TERMS[q.dtype],
            BM=size, BN=columns, PACKED=packed, UPCAST=INTERPRET, num_warps=warps,
        )  # fmt: skip
    return out


@moba_choose.register_fake
def _(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, block: int, picks: int) -> Tensor:
    return q.new_empty(*q.shape[:3], picks, dtype=torch.int32)


@register_flop_formula(torch.ops.zoo.moba_choose)
def _flops(q: Any, k: Any, cu_seqlens: Any, block: int, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q) * (k[2] // block)


def choose(
    q: Tensor, k: Tensor, block: int, picks: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The past blocks that each query likes best; no gradient.

    Args:
        q: (B, H, N, D), float16, bfloat16 or float32: the last N of the tokens.
        k: (B, G, M, D), G dividing H, M at least N.
        block: Tokens of a block.
        picks: P, blocks to choose beside a query's own one, 0 to `MOST`.
        cu_seqlens: Where packed sequences (B = 1, M = N) begin, from 0 to N, (sequences + 1,).

    Returns:
        (B, H, N, P) int32, numbered within the sequence, best first, -1 where there are fewer.

    Raises:
        ZooError: Shapes or types that do not fit, or tensors that no Triton kernel takes here.
    """
    if picks < 0 or picks > MOST:
        raise ZooError(f"picks is {picks}; allowed: 0 to {MOST}")
    if block < 1:
        raise ZooError(f"block is {block}; allowed: 1 or more")
    if q.ndim != 4 or k.ndim != 4:
        raise ZooError(f"q and k have {q.ndim} and {k.ndim} axes; allowed: 4, (B, heads, N, D)")
    longer = k.shape[2] - q.shape[2]
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or longer < 0:
        raise ZooError(
            f"k of shape {tuple(k.shape)} for q of shape {tuple(q.shape)}; allowed: the same batch "
            "and width, and no fewer tokens"
        )
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ZooError(f"k has {k.shape[1]} heads; allowed: a divisor of q's {q.shape[1]}")
    if cu_seqlens is not None:
        whole = cu_seqlens.dtype in (torch.int32, torch.int64)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or not whole:
            raise ZooError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; allowed: "
                "int32 or int64 of shape (sequences + 1,)"
            )
        if q.shape[0] != 1 or longer:
            raise ZooError(
                f"cu_seqlens with q of shape {tuple(q.shape)} and {k.shape[2]} keys; allowed: a "
                "batch of 1, and as many keys as queries"
            )
        if cu_seqlens.device != q.device:
            raise ZooError(f"cu_seqlens is on {cu_seqlens.device}; allowed: {q.device}")
    # Compilers see no environment; there the operator itself refuses a CPU.
    if not torch.compiler.is_compiling():
        reason = refuse_gate(q, k, picks, by_name=True)
        if reason is not None:
            raise ZooError(f"backend 'triton': {reason}")
    return moba_choose(q.detach(), k.detach(), cu_seqlens, block, picks)
