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
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import _moba, refuse
from zoo.kernels import _moba_launch as launch
from zoo.kernels._operator import refuse_second, spread
from zoo.kernels.common import INTERPRET, LOG2_E, rows, strides

HEAD_DIM = 256


class Inputs(NamedTuple):
    """What attends to what; the arguments of `moba_attention`.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D).
        v: (B, G, N, E).
        chosen: (B, H, N, P) int32.
        cu_seqlens: (sequences + 1,), or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor
    cu_seqlens: Tensor | None

    def by_rows(self) -> Inputs:
        """The same, as kernels read it."""
        q, k, v = (rows(x) for x in self[:3])
        return Inputs(q, k, v, self.chosen.contiguous(), self.cu_seqlens)


class Options(NamedTuple):
    """Tokens of a block, and the factor on the scores."""

    block: int
    scale: float


class Results(NamedTuple):
    """What the backward pass needs of the forward pass.

    Args:
        out: (B, H, N, E).
        lse: Base-2 log-sum-exps of the rows, (B, H, N).
        slots: The choices sorted by block; see `zoo.kernels._moba_launch.lists`.
        ends: Where each block's choices begin.
    """

    out: Tensor
    lse: Tensor
    slots: Tensor
    ends: Tensor


def _check_device(q: Tensor) -> None:
    if not q.is_cuda and not INTERPRET:
        raise ZooError("a CPU runs Triton kernels in the interpreter only (TRITON_INTERPRET=1)")


def _outputs(x: Inputs) -> tuple[Tensor, Tensor]:
    """Room for what the forward pass leaves behind, beside the lists."""
    out = x.q.new_empty(*x.q.shape[:3], x.v.shape[3])
    return out, x.q.new_empty(x.q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("zoo::moba_fwd", mutates_args=(), device_types=("cpu", "cuda"))
@spread
def moba_fwd(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend; what comes out are `Results`."""
    _check_device(x.q)
    x = x.by_rows()
    q, k, v, chosen = x[:4]
    batch, heads, tokens, picks = chosen.shape
    block = options.block
    out, lse = _outputs(x)
    tables = launch.tables(tokens, block, x.cu_seqlens, q.device)
    slots, ends = launch.lists(chosen, tables)
    if not out.numel():
        return out, lse, slots, ends
    part = q.new_empty(batch, heads, tokens, picks, v.shape[3])
    part_lse = q.new_empty(batch, heads, tokens, picks, dtype=torch.float32)
    moves = (strides(q), strides(k), strides(v))
    factor = options.scale * LOG2_E
    with torch.cuda.device_of(q):
        if picks and block < tokens:
            size = launch.tile(q, v, block)
            tiles, tile_block, tile_end = launch.gather_tiles(ends, tokens * picks, size.rows)
            _moba.chosen_forward[(tiles * batch * heads,)](
                q, k, v, part, part_lse, slots, ends, tile_block, tile_end, tables.starts,
                *moves, factor, tokens, tiles, ends.shape[1] - 1,
                P=picks, BLOCK=block, H=heads, **launch.options(q, k, v, size),
            )  # fmt: skip
        size = launch.tile(q, v, tokens)
        tiles = triton.cdiv(tokens, size.rows)
        _moba.own_forward[(tiles * batch * heads,)](
            q, k, v, part, part_lse, chosen, tables.begins, tables.numbers, out, lse,
            *moves, factor, tokens, tiles, P=picks, H=heads, **launch.options(q, k, v, size),
        )  # fmt: skip
    return out, lse, slots, ends


@moba_fwd.register_fake
@spread
def _(x: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, picks = x.chosen.shape
    blocks = launch.count_blocks(tokens, options.block, x.cu_seqlens)
    return (
        *_outputs(x),
        x.chosen.new_empty(batch * heads * tokens * picks, dtype=torch.int32),
        x.chosen.new_empty(batch * heads, blocks + 1, dtype=torch.int64),
    )


@torch.library.custom_op("zoo::moba_bwd", mutates_args=(), device_types=("cpu", "cuda"))
@spread
def moba_bwd(
    grad: Tensor, x: Inputs, results: Results, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    _check_device(x.q)
    x = x.by_rows()
    q, k, v, chosen = x[:4]
    grad = rows(grad.to(q.dtype))
    out, lse = results.out.contiguous(), results.lse.contiguous()
    slots, ends = results.slots, results.ends
    batch, heads, tokens, picks = chosen.shape
    block, scale = options
    dq, dk, dv = _gradients(x)
    if not out.numel():
        return dq, dk, dv
    tables = launch.tables(tokens, block, x.cu_seqlens, q.device)
    blocks = ends.shape[1] - 1
    delta = torch.empty_like(lse)
    part = q.new_empty(batch, heads, tokens, picks, q.shape[3])
    moves = (strides(grad), strides(q), strides(k), strides(v))
    factor = scale * LOG2_E
    with torch.cuda.device_of(q):
        far = launch.tile(q, v, tokens, backward=True)
        tiles = triton.cdiv(tokens, far.rows)
        whole = launch.options(q, k, v, far)
        _moba.row_products[(tiles * batch * heads,)](
            grad, out, delta, strides(grad), tokens, tiles,
            H=heads, HEAD=whole["HEAD"], BM=far.rows,
        )  # fmt: skip
        near = launch.tile(q, v, min(block, tokens), backward=True)
        pieces = triton.cdiv(min(block, tokens), near.columns)
        within = launch.options(q, k, v, near)
        _moba.key_backward[(pieces * blocks * batch * k.shape[1],)](
            grad, q, k, v, lse, delta, slots, ends, tables.starts, tables.stops, dk, dv,
            *moves, factor, scale, tokens, blocks, pieces, P=picks, G=k.shape[1], **within,
        )  # fmt: skip
        if picks and block < tokens:
            gathered, tile_block, tile_end = launch.gather_tiles(ends, tokens * picks, near.rows)
            _moba.chosen_backward[(gathered * batch * heads,)](
                grad, q, k, v, lse, delta, part, slots, ends, tile_block, tile_end, tables.starts,
                *moves, factor, scale, tokens, gathered, blocks,
                P=picks, BLOCK=block, H=heads, **within,
            )  # fmt: skip
        _moba.own_backward[(tiles * batch * heads,)](
            grad, q, k, v, lse, delta, part, chosen, tables.begins, tables.numbers, dq,
            *moves, factor, scale, tokens, tiles, P=picks, H=heads, **whole,
        )  # fmt: skip
    return dq, dk, dv


def _gradients(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what the backward pass finds."""
    return x.q.new_empty(x.q.shape), x.k.new_empty(x.k.shape), x.v.new_empty(x.v.shape)


@moba_bwd.register_fake
@spread
def _(grad: Tensor, x: Inputs, results: Results, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.block, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    found = moba_bwd(grad, *ctx.saved_tensors, ctx.block, ctx.scale)
    return (*found, None, None, None, None)


moba_fwd.register_autograd(_differentiate, setup_context=_keep)
refuse_second(
    moba_bwd, "the Triton kernel of MoBA has no second derivative; backend 'reference' has one"
)


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
