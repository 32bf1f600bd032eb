"""MoBA on the GPU: rows are gathered by the block of keys they chose, and every block meets them.

The choices are sorted once, by head and block, into lists: ``slots`` names every choice as
``row * P + rank``, ``ends`` says where each block's share begins. The forward pass multiplies dense
tiles of gathered rows with a block and leaves (output, log-sum-exp) in the choice's slot; then each
row goes through its own block, causally, and takes its slots into the same running softmax.
Backwards, whoever owns a piece of keys walks through the same lists with the rows' final
log-sum-exp, and rows sum what is in their slots: no atomics, the same bits in every run.

Everything goes by upper bounds of sizes, nothing waits for the device, so that it can be captured
in a graph and compiled. Memory: P + 1 partial outputs while a pass runs, the lists in between.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import _moba, refuse
from zoo.kernels.common import INTERPRET, block_d, precision, rows, strides, upcast

HEAD_DIM = 256
LOG2_E = math.log2(math.e)


class _Tables(NamedTuple):
    """Where blocks and rows are, int32; the same for all heads and samples.

    Args:
        starts: First token of each block, (blocks,).
        stops: Token after its last one; blocks that do not exist are empty.
        begins: First token of each row's own block, (N,).
        numbers: Number of a row's own block within its sequence, (N,).
        base: Number of the first block of a row's sequence among all blocks, (N,).
    """

    starts: Tensor
    stops: Tensor
    begins: Tensor
    numbers: Tensor
    base: Tensor


class _Tile(NamedTuple):
    """How a kernel is launched: rows and columns of its tiles, warps, stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def _blocks(tokens: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Most blocks that there can be; without a look at where sequences end."""
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (tokens + sequences * (block - 1)) // block


def _tables(tokens: int, block: int, cu_seqlens: Tensor | None, device: torch.device) -> _Tables:
    """Tables of sequences packed one after the other, or of a single one."""
    blocks = _blocks(tokens, block, cu_seqlens)
    row = torch.arange(tokens, device=device)
    number = torch.arange(blocks, device=device)
    if cu_seqlens is None:
        begins, index, base = row // block * block, row // block, torch.zeros_like(row)
        starts = number * block
        limits = torch.full_like(starts, tokens)
    else:
        cu = cu_seqlens.long()
        until = ((cu.diff() + block - 1) // block).cumsum(0)  # blocks of this and earlier sequences
        before = torch.cat([until.new_zeros(1), until])
        sequence = torch.searchsorted(cu, row, right=True) - 1
        index = (row - cu[sequence]) // block
        begins, base = cu[sequence] + index * block, before[sequence]
        sequence = torch.searchsorted(until, number, right=True)
        # Numbers beyond the last block belong to the sequence after the last: no tokens.
        starts = cu[sequence] + (number - before[sequence]) * block
        limits = torch.cat([cu[1:], cu[-1:]])[sequence]
    stops = torch.minimum(starts + block, limits)
    return _Tables(*(x.clamp(max=tokens).int() for x in (starts, stops, begins, index, base)))


def _lists(chosen: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """The choices (B, H, N, P) sorted by head and block.

    Returns:
        slots: Choices within their head, (B H N P,) int32; those of no block at each head's end.
        ends: Where each block's choices begin among all, (B H, blocks + 1) int64.
    """
    heads, choices = chosen.shape[0] * chosen.shape[1], chosen.shape[2] * chosen.shape[3]
    blocks = tables.starts.shape[0]
    past = (chosen >= 0) & (chosen < tables.numbers[:, None])
    key = torch.where(past, chosen + tables.base[:, None], blocks).view(heads, choices)
    count = heads * (blocks + 1)
    # The fewer bytes a key has, the fewer passes sorting takes.
    dtype = next(t for t in (torch.int16, torch.int32, torch.int64) if count <= torch.iinfo(t).max)
    every = torch.arange(count, device=chosen.device).view(heads, blocks + 1)
    key, order = (key + every[:, :1]).to(dtype).flatten().sort(stable=True)
    ends = torch.searchsorted(key, every.to(dtype))
    return (order % max(choices, 1)).int(), ends


def _gather_tiles(ends: Tensor, choices: int, size: int) -> tuple[int, Tensor, Tensor]:
    """Cut every block's gathered rows into tiles.

    Args:
        ends: (B H, blocks + 1).
        choices: Choices of a head.
        size: Rows of a tile.

    Returns:
        The most tiles that a head can have; the block of each of them, (B H, tiles) int32, the
        number of blocks beyond the last tile; tiles up to and with each block, (B H, blocks) int32.
    """
    blocks = ends.shape[1] - 1
    tiles = (choices + blocks * (size - 1)) // size
    until = ((ends.diff(dim=1) + size - 1) // size).cumsum(1)
    number = torch.arange(tiles, device=ends.device).expand(ends.shape[0], tiles).contiguous()
    return tiles, torch.searchsorted(until, number, right=True, out_int32=True), until.int()


def _tile(q: Tensor, v: Tensor, block: int, *, backward: bool = False) -> _Tile:
    """Sizes as an H200 likes them; small ones in the interpreter, where tests need many tiles."""
    if INTERPRET:
        return _Tile(32, min(32, block_d(block)), 4, 1)
    row = max(block_d(q.shape[-1]), block_d(v.shape[-1])) * q.element_size()
    if q.dtype == torch.float32:  # exact products keep their operands in registers
        size = _Tile(32, 32, 8, 1)
    elif row > 256:
        size = _Tile(64, 32, 4, 2) if not backward else _Tile(32, 32, 4, 2)
    else:
        size = _Tile(64, 64, 4, 2 if backward else 3)
    return size._replace(columns=min(size.columns, block_d(block)))


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _options(q: Tensor, k: Tensor, v: Tensor, tile: _Tile) -> dict[str, Any]:
    return {
        "H": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "E": v.shape[3],
        "BD": block_d(q.shape[3]),
        "BE": block_d(v.shape[3]),
        "BM": tile.rows,
        "BN": tile.columns,
        "UPCAST": upcast(q),
        "PREC": precision(q),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _check_device(q: Tensor) -> None:
    if not q.is_cuda and not INTERPRET:
        raise ZooError("a CPU runs Triton kernels in the interpreter only (TRITON_INTERPRET=1)")


@torch.library.custom_op("zoo::moba_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def moba_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, N, E), base-2 log-sum-exp (B, H, N), and the lists of `_lists`."""
    _check_device(q)
    q, k, v, chosen = rows(q), rows(k), rows(v), chosen.contiguous()
    batch, heads, tokens, picks = chosen.shape
    out = q.new_empty(batch, heads, tokens, v.shape[3])
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    tables = _tables(tokens, block, cu_seqlens, q.device)
    slots, ends = _lists(chosen, tables)
    if not out.numel():
        return out, lse, slots, ends
    part = q.new_empty(batch, heads, tokens, picks, v.shape[3])
    part_lse = q.new_empty(batch, heads, tokens, picks, dtype=torch.float32)
    moves = (*strides(q), *strides(k), *strides(v))
    factor = scale * LOG2_E
    with _on(q):
        if picks and block < tokens:
            tile = _tile(q, v, block)
            tiles, tile_block, tile_end = _gather_tiles(ends, tokens * picks, tile.rows)
            _moba.chosen_forward[(tiles * batch * heads,)](
                q, k, v, part, part_lse, slots, ends, tile_block, tile_end, tables.starts,
                *moves, factor, tokens, tiles, ends.shape[1] - 1,
                P=picks, BLOCK=block, **_options(q, k, v, tile),
            )  # fmt: skip
        tile = _tile(q, v, tokens)
        tiles = triton.cdiv(tokens, tile.rows)
        _moba.own_forward[(tiles * batch * heads,)](
            q, k, v, part, part_lse, chosen, tables.begins, tables.numbers, out, lse,
            *moves, factor, tokens, tiles, P=picks, **_options(q, k, v, tile),
        )  # fmt: skip
    return out, lse, slots, ends


@moba_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, picks = chosen.shape
    blocks = _blocks(tokens, block, cu_seqlens)
    return (
        q.new_empty(batch, heads, tokens, v.shape[3]),
        q.new_empty(batch, heads, tokens, dtype=torch.float32),
        chosen.new_empty(batch * heads * tokens * picks, dtype=torch.int32),
        chosen.new_empty(batch * heads, blocks + 1, dtype=torch.int64),
    )


@torch.library.custom_op("zoo::moba_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def moba_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    slots: Tensor,
    ends: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    _check_device(q)
    q, k, v, chosen = rows(q), rows(k), rows(v), chosen.contiguous()
    grad = rows(grad.to(q.dtype))
    out, lse = out.contiguous(), lse.contiguous()
    batch, heads, tokens, picks = chosen.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not out.numel():
        return dq, dk, dv
    tables = _tables(tokens, block, cu_seqlens, q.device)
    blocks = ends.shape[1] - 1
    delta = torch.empty_like(lse)
    part = q.new_empty(batch, heads, tokens, picks, q.shape[3])
    moves = (*strides(grad), *strides(q), *strides(k), *strides(v))
    factor = scale * LOG2_E
    with _on(q):
        tile = _tile(q, v, tokens, backward=True)
        tiles = triton.cdiv(tokens, tile.rows)
        options = _options(q, k, v, tile)
        _moba.row_products[(tiles * batch * heads,)](
            grad, out, delta, *strides(grad), tokens, tiles,
            H=heads, E=v.shape[3], BE=options["BE"], BM=tile.rows, UPCAST=options["UPCAST"],
        )  # fmt: skip
        near = _tile(q, v, min(block, tokens), backward=True)
        pieces = triton.cdiv(min(block, tokens), near.columns)
        shared = _options(q, k, v, near)
        group = {name: value for name, value in shared.items() if name != "H"}
        _moba.key_backward[(pieces * blocks * batch * k.shape[1],)](
            grad, q, k, v, lse, delta, slots, ends, tables.starts, tables.stops, dk, dv,
            *moves, factor, scale, tokens, blocks, pieces, G=k.shape[1], P=picks, **group,
        )  # fmt: skip
        if picks and block < tokens:
            gathered, tile_block, tile_end = _gather_tiles(ends, tokens * picks, near.rows)
            _moba.chosen_backward[(gathered * batch * heads,)](
                grad, q, k, v, lse, delta, part, slots, ends, tile_block, tile_end, tables.starts,
                *moves, factor, scale, tokens, gathered, blocks,
                P=picks, BLOCK=block, **shared,
            )  # fmt: skip
        _moba.own_backward[(tiles * batch * heads,)](
            grad, q, k, v, lse, delta, part, chosen, tables.begins, tables.numbers, dq,
            *moves, factor, scale, tokens, tiles, P=picks, **options,
        )  # fmt: skip
    return dq, dk, dv


@moba_bwd.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    slots: Tensor,
    ends: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, chosen, cu_seqlens, ctx.block, ctx.scale = inputs
    out, lse, slots, ends = output
    ctx.mark_non_differentiable(lse, slots, ends)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, chosen, cu_seqlens, out, lse, slots, ends)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    found = moba_bwd(grad, *ctx.saved_tensors, ctx.block, ctx.scale)
    return (*found, None, None, None, None)


def _no_second(ctx: Any, *grads: Any) -> None:
    raise ZooError(
        "the Triton kernel of MoBA has no second derivative; backend 'reference' has one"
    )


moba_fwd.register_autograd(_differentiate, setup_context=_keep)
moba_bwd.register_autograd(_no_second)


def _pairs(q: tuple[int, ...], chosen: tuple[int, ...], block: int) -> int:
    """Pairs of a query and a key, counted as everywhere: without what causality hides."""
    return math.prod(q[:3]) * min(q[2], (chosen[3] + 1) * block)


@register_flop_formula(torch.ops.zoo.moba_fwd)
def _forward_flops(
    q: Any, k: Any, v: Any, chosen: Any, cu_seqlens: Any, block: int, *args: Any, **kwargs: Any
) -> int:
    return 2 * _pairs(q, chosen, block) * (q[3] + v[3])


@register_flop_formula(torch.ops.zoo.moba_bwd)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, chosen: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _pairs(q, chosen, args[5]) * (3 * q[3] + 2 * v[3])


def _check(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, cu: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ZooError(
            f"q, k and v have {q.ndim}, {k.ndim} and {v.ndim} axes; allowed: 4, (B, heads, N, D)"
        )
    if k.shape != (q.shape[0], k.shape[1], q.shape[2], q.shape[3]):
        raise ZooError(
            f"k of shape {tuple(k.shape)} for q of shape {tuple(q.shape)}; allowed: the same but "
            "for the number of heads"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ZooError(f"v of shape {tuple(v.shape)} for k of shape {tuple(k.shape)}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ZooError(f"k has {k.shape[1]} heads; allowed: a divisor of q's {q.shape[1]}")
    if block < 1:
        raise ZooError(f"block is {block}; allowed: 1 or more")
    whole = not chosen.dtype.is_floating_point and not chosen.dtype.is_complex
    if chosen.shape[:3] != q.shape[:3] or chosen.ndim != 4 or not whole:
        raise ZooError(
            f"chosen is {chosen.dtype} of shape {tuple(chosen.shape)}; allowed: int32 of shape "
            f"{(*q.shape[:3], 'P')}"
        )
    for name, x in (("chosen", chosen), ("cu_seqlens", cu)):
        if x is not None and x.device != q.device:
            raise ZooError(f"{name} is on {x.device}; allowed: {q.device}, where q is")
    if q.shape[2] * chosen.shape[3] >= 2**31:
        raise ZooError(
            f"{chosen.shape[3]} choices of {q.shape[2]} tokens; allowed: less than 2^31 in all"
        )
    if cu is not None:
        if cu.ndim != 1 or cu.shape[0] < 2 or cu.dtype not in (torch.int32, torch.int64):
            raise ZooError(
                f"cu_seqlens is {cu.dtype} of shape {tuple(cu.shape)}; allowed: int32 or int64 "
                "of shape (sequences + 1,)"
            )
        if q.shape[0] != 1:
            raise ZooError(f"cu_seqlens with a batch of {q.shape[0]}; allowed: a batch of 1")


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention of every query to its own block of keys and to the blocks it chose.

    Gradients reach q, k and v, once; the choice gets none.

    Args:
        q: (B, H, N, D), float16, bfloat16 or float32.
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        chosen: (B, H, N, P) int32: numbers of different blocks before the query's own one, counted
            within the sequence; -1 or any other number is no block. P may be 0.
        block: Tokens of a block; the last of a sequence may be shorter.
        scale: Factor on the scores.
        cu_seqlens: Where packed sequences (B = 1) begin, from 0 to N, (sequences + 1,).

    Returns:
        (B, H, N, E).

    Raises:
        ZooError: Shapes or types that do not fit, or tensors that no Triton kernel takes here.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    # Compilers see no environment; there the operator itself refuses a CPU.
    if not torch.compiler.is_compiling():
        reason = refuse(q, k, v, head_dim=HEAD_DIM, by_name=True)
        if reason is not None:
            raise ZooError(f"backend 'triton': {reason}")
    _check(q, k, v, chosen, block, cu_seqlens)
    return moba_fwd(q, k, v, chosen.int(), cu_seqlens, block, scale)[0]
