"""Landmark attention (Mohtashami and Jaggi, 2023) in Triton: a softmax in two levels.

Groups of L ordinary tokens end with a landmark. A query i of group g meets the ordinary tokens
j <= i of g and the landmarks of the groups before g in one softmax, the outer one; what it gives a
landmark is shared out among the ordinary tokens of that group by a second one, the inner one:

    o_i = sum_{j in g, j <= i} p_ij v_j + sum_{t < g} p_i,landmark(t) sum_{j in t} r^t_ij v_j

The landmark of the own group is never seen, and a landmark's value never used. Cost: the products
of causal attention; a result needs one float32 per query and head besides the outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import _landmark as kernels
from zoo.kernels import refuse
from zoo.kernels._operator import refuse_second, spread, wanted
from zoo.kernels.common import (
    INTERPRET,
    LEAST,
    LOG2_E,
    Inputs,
    Results,
    block_d,
    head,
    like,
    rows,
    strides,
)

LONGEST = 128  # ordinary tokens of a group, which have to fit one tile of keys
WIDEST = 128  # head dim


class Options(NamedTuple):
    """The other arguments of `landmark_attention`."""

    block: int
    scale: float
    cu_seqlens: Tensor | None


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal self-attention over groups of `block` ordinary tokens and a landmark.

    Token i is a landmark if i % (block + 1) == block, counted from the start of its sequence; the
    last group may be short. Differentiable once in q, k and v, without atomics.

    Args:
        q: Queries, (B, H, N, D), in float16, bfloat16 or float32, D at most 128.
        k: Keys, (B, G, N, D), where G divides H: query head h meets key head h // (H // G).
        v: Values, (B, G, N, E), E at most 128.
        block: Ordinary tokens of a group, 1 to 128.
        scale: Factor on dot products.
        cu_seqlens: Where packed sequences begin and end, (S + 1,) int32 or int64 from 0 to N, not
            decreasing; the batch is 1 then. Groups start anew with each sequence.

    Returns:
        Outputs of the heads, (B, H, N, E).

    Raises:
        ZooError: If a shape, a type or `block` is none of these, or nothing here runs the kernel.
    """
    _check(q, k, v, block, cu_seqlens)
    return _landmark_fwd(q, k, v, block, scale, cu_seqlens)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, block: int, cu_seqlens: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ZooError(f"q, k and v need 4 axes, got {q.ndim}, {k.ndim} and {v.ndim}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ZooError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}: wanted "
            "(B, G, N, D) and (B, G, N, E) beside (B, H, N, D)"
        )
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ZooError(f"q has {q.shape[1]} heads, which {k.shape[1]} of k do not divide")
    if not 1 <= block <= LONGEST:
        raise ZooError(f"block={block} is out of range: the kernel takes 1 to {LONGEST}")
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise ZooError(f"head dim {max(q.shape[3], v.shape[3])} is above {WIDEST}")
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ZooError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, wanted (S + 1,) in int32 "
            "or int64"
        )
    if q.shape[0] != 1 or cu_seqlens.shape[0] < 2:
        raise ZooError(
            f"cu_seqlens of {cu_seqlens.shape[0]} entries with a batch of {q.shape[0]}: wanted at "
            "least 2 and a batch of 1"
        )


def _sequences(cu_seqlens: Tensor | None, size: int, q: Tensor) -> tuple[Tensor | None, int]:
    """Where tiles of `size` tokens lie: (first token, length, index of the tile), and how many.

    There are more rows than tiles, so that their number needs no look at the device; those left
    over lie behind the end of the last sequence.
    """
    length = q.shape[2]
    if cu_seqlens is None:
        return None, triton.cdiv(length, size)
    lengths = cu_seqlens.diff()
    tiles = (lengths + size - 1) // size
    ends = tiles.cumsum(0)
    rank = torch.arange(length // size + len(lengths), device=q.device)
    which = torch.searchsorted(ends, rank, right=True).clamp(max=len(lengths) - 1)
    table = (cu_seqlens[which], lengths[which], rank - (ends - tiles)[which])
    return torch.stack(table, 1).to(torch.int32), len(rank)


def _constants(x: Inputs, options: Options) -> dict[str, Any]:
    """What all three kernels are compiled for."""
    return {
        "BLOCK": options.block,
        "HEAD": head(x.q, x.v),
        "BN": block_d(options.block),
        "MARKS": LEAST,
        "VARLEN": options.cu_seqlens is not None,
    }


def _tiling(
    q: Tensor, v: Tensor, block: int, over_keys: bool = False, backward: bool = False
) -> dict[str, int]:
    """Rows of a tile of queries, warps and stages, as an H200 likes them at D = 128."""
    area = block_d(block) * max(block_d(q.shape[-1]), block_d(v.shape[-1]))
    large = area > 64 * 64
    if INTERPRET:
        return {"BM": 64}
    if q.element_size() == 4:  # products without tensor cores hold whole rows in registers
        return {"BM": 16 if large else 32, "num_warps": 8, "num_stages": 1}
    if over_keys:
        return {"BM": 64, "num_warps": 8 if area > 64 * 128 else 4, "num_stages": 2}
    if area > 64 * 128:
        return {"BM": 64, "num_warps": 8, "num_stages": 2}
    if backward:
        return {"BM": 64, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "num_warps": 8, "num_stages": 3}


def _check_able(x: Inputs) -> None:
    """Raise if the kernels cannot take these tensors; it is too late for another route here."""
    reason = refuse(*x, head_dim=WIDEST, by_name=True)
    if reason:
        raise ZooError(f"the Triton kernel of Landmark attention cannot run: {reason}")


@torch.library.custom_op("zoo::landmark_fwd", mutates_args=())
@spread
def _landmark_fwd(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Attend; what comes out are `Results`."""
    _check_able(x)
    out, lse = _outputs(x)
    if out.numel() == 0:
        return out, lse
    q, k, v = (rows(each) for each in x)
    block, scale, cu_seqlens = options
    heads = q.shape[1]
    tiling = _tiling(q, v, block)
    with torch.cuda.device_of(q):
        places, tiles = _sequences(cu_seqlens, tiling["BM"], q)
        kernels.forward[(q.shape[0] * tiles, heads)](
            q, strides(q), k, strides(k), v, strides(v), out, strides(out), lse, places, tiles,
            q.shape[2], heads // k.shape[1], scale * LOG2_E, **_constants(x, options), **tiling,
        )  # fmt: skip
    return out, lse


def _outputs(x: Inputs) -> tuple[Tensor, Tensor]:
    """Room for `Results`."""
    return like(x.q, x.v.shape[3]), x.q.new_empty(x.q.shape[:3], dtype=torch.float32)


@_landmark_fwd.register_fake
@spread
def _(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("zoo::landmark_bwd", mutates_args=())
@spread
def _landmark_bwd(
    grad: Tensor, x: Inputs, results: Results, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their types."""
    _check_able(x)
    dq, dk, dv = (like(each) for each in x)
    if x.q.numel() == 0:
        return dq, dk, dv
    q, k, v, grad = rows(x.q), rows(x.k), rows(x.v), rows(grad)
    out, lse = results
    block, scale, cu_seqlens = options
    batch, heads, length = q.shape[:3]
    rep = heads // k.shape[1]
    delta = torch.empty_like(lse)
    constants, tiling = _constants(x, options), _tiling(q, v, block, backward=True)
    numbers = (length, rep, scale * LOG2_E, scale)
    with torch.cuda.device_of(q):
        places, tiles = _sequences(cu_seqlens, tiling["BM"], q)
        kernels.backward_q[(batch * tiles, heads)](
            q, strides(q), k, strides(k), v, strides(v), out, strides(out), grad, strides(grad),
            dq, strides(dq), lse, delta, places, tiles, *numbers, **constants, **tiling,
        )  # fmt: skip
        # This one needs the delta that the other has written.
        tiling = _tiling(q, v, block, over_keys=True)
        places, tiles = _sequences(cu_seqlens, block + 1, q)
        kernels.backward_k[(batch * tiles, heads // rep)](
            q, strides(q), k, strides(k), v, strides(v), grad, strides(grad), dk, strides(dk),
            dv, strides(dv), lse, delta, places, tiles, *numbers, **constants, **tiling,
        )  # fmt: skip
    return dq, dk, dv


@_landmark_bwd.register_fake
@spread
def _(grad: Tensor, x: Inputs, results: Results, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    return like(x.q), like(x.k), like(x.v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.block, ctx.scale, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = _landmark_bwd(grad, *tensors, ctx.block, ctx.scale, cu_seqlens)
    return (*wanted(ctx, grads), None, None, None)


_landmark_fwd.register_autograd(_backward, setup_context=_save)
refuse_second(
    _landmark_bwd, "zoo::landmark is differentiable once only; take the reference for more"
)


def _pairs(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Pairs of a query and a key not after it, over all samples and heads."""
    batch, heads, length = q.shape[:3]
    if cu_seqlens is None or cu_seqlens.is_meta:
        return batch * heads * length * (length + 1) // 2
    return heads * sum(n * (n + 1) // 2 for n in cu_seqlens.diff().tolist())


@register_flop_formula(torch.ops.zoo.landmark_fwd, get_raw=True)
def _fwd_flops(q: Tensor, k: Tensor, v: Tensor, *options: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q, options[-1]) * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.zoo.landmark_bwd, get_raw=True)
def _bwd_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> int:
    return 2 * _pairs(q, rest[-1]) * (3 * q.shape[3] + 2 * v.shape[3])
