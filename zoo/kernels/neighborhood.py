"""Neighborhood attention in one, two and three dimensions as Triton kernels.

Every token of a grid attends to a window of near tokens (Hassani et al. 2024, "Faster Neighborhood
Attention"). A box of queries visits the boxes of keys that its windows meet; scores live in
registers, windows are told from coordinates, and a box of keys that lies in the windows of all its
queries needs no mask. The sliding window of language models is the case of one axis.

    s_ij = scale q_i . k_j                                      j in the window of i
    o_i  = sum_j p_ij v_j,    p_ij = exp(s_ij - lse_i)
    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - do_i . o_i)
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

q, k, v, o and a number per row are kept. The gradients of a box of keys belong to one program that
walks the queries which see it in all heads of its group: no atomics, the same numbers in every run.
Sums are float32. Tokens stay in the grid's order: the row of a head is one piece of memory anyway,
so that residue classes of a dilation are only steps between rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.kernels._neighborhood_tiles import (
    Rule,
    box,
    count_pairs,
    count_tiles,
    full_tile,
    keys_of,
    load,
    locate,
    meet,
    other_tile,
    queries_of,
    store,
    tokens,
    widths,
    with_boxes,
)
from zoo.kernels.common import INTERPRET, LEAST, block_d, precision, rows, strides, upcast

HEAD_DIM = 128
LOG2_E = math.log2(math.e)
# Queries and keys of a box; along one axis, windows of at least WIDE tokens take WIDE_ROWS queries.
ROWS, KEYS = 64, 64
WIDE, WIDE_ROWS = 512, 128
# Both, where float32 products have to be exact: these keep their factors in registers.
EXACT = 32


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


@triton.jit
def _forward_step(
    state, q, row, k, v, place, k_row, v_row, scale, length,
    FULL: tl.constexpr, RULE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Take a box of keys into the running maxima, sums and outputs of a box of queries."""
    top, total, acc = state
    key, token, exist = place
    k = load(k, token, k_row, exist, FULL, HEAD.d, HEAD.block_d, HEAD.upcast)
    s = tl.dot(q, tl.trans(k), input_precision=HEAD.precision, out_dtype=tl.float32) * scale
    if not FULL:
        s = tl.where(meet(row, key, length, False, RULE), s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(top - higher)
    v = load(v, token, v_row, exist, FULL, HEAD.e, HEAD.block_e, HEAD.upcast)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=HEAD.precision)
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _forward(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, heads, group, shape, scale,
    RULE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """A program has a box of queries of one head; lse is kept in base 2."""
    ROWS: tl.constexpr = RULE.rows
    KEYS: tl.constexpr = RULE.keys
    number, classes, length, corner, inside = locate(tl.program_id(0), shape, ROWS, RULE)
    if not inside:
        return
    number = number.to(tl.int64)
    b, h = number // heads, number % heads
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + h // group * k_strides[1]
    v += b * v_strides[0] + h // group * v_strides[1]
    out += b * out_strides[0] + h * out_strides[1]
    lse += number * (shape[0] * shape[1] * shape[2])

    row, token, exist = tokens(corner, classes, shape, length, ROWS, RULE)
    q = load(q, token, q_strides[2], exist, False, HEAD.d, HEAD.block_d, HEAD.upcast)
    # Finite, so that rows that have seen nothing yet stay free of NaN.
    top = tl.full([q.shape[0]], -1e30, tl.float32)
    state = top, top * 0, tl.full([q.shape[0], HEAD.block_e], 0.0, tl.float32)
    x = keys_of(corner, length, RULE, 0)
    y = keys_of(corner, length, RULE, 1)
    z = keys_of(corner, length, RULE, 2)
    first = x[0], y[0], z[0]
    log_scale = scale * 1.4426950408889634
    left = x[1] * y[1] * z[1]
    if RULE.full:
        full = x[3] * y[3] * z[3]
        left -= full
        for t in range(0, full):
            place = box(full_tile(t, x, y, z, RULE), first, classes, shape, length, KEYS, RULE)
            state = _forward_step(
                state, q, row, k, v, place, k_strides[2], v_strides[2], log_scale, length,
                True, RULE, HEAD,
            )  # fmt: skip
    for t in range(0, left):
        place = box(other_tile(t, x, y, z, RULE), first, classes, shape, length, KEYS, RULE)
        state = _forward_step(
            state, q, row, k, v, place, k_strides[2], v_strides[2], log_scale, length,
            False, RULE, HEAD,
        )  # fmt: skip
    top, total, acc = state
    total = tl.where(exist, total, 1.0)  # rows past the end may have seen nothing
    store(out, token, out_strides[2], exist, acc / total[:, None], HEAD.e, HEAD.block_e)
    tl.store(lse + token, top + tl.log2(total), mask=exist)


@triton.jit
def _query_step(
    dq, q, grad, lse, delta, row, k, v, place, k_row, v_row, scale, length,
    FULL: tl.constexpr, RULE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Add what a box of keys gives to the gradients of a box of queries."""
    key, token, exist = place
    k = load(k, token, k_row, exist, FULL, HEAD.d, HEAD.block_d, HEAD.upcast)
    v = load(v, token, v_row, exist, FULL, HEAD.e, HEAD.block_e, HEAD.upcast)
    s = tl.dot(q, tl.trans(k), input_precision=HEAD.precision, out_dtype=tl.float32)
    s = s * scale - lse[:, None]
    if not FULL:
        s = tl.where(meet(row, key, length, False, RULE), s, float("-inf"))
    p = tl.exp2(s)
    dp = tl.dot(grad, tl.trans(v), input_precision=HEAD.precision, out_dtype=tl.float32)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=HEAD.precision)


@triton.jit
def _backward_queries(
    grad, q, k, v, out, lse, delta, dq, grad_strides, q_strides, k_strides, v_strides, out_strides,
    dq_strides, heads, group, shape, scale, RULE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """A program has a box of queries of one head; it also stores delta = do . o of its rows."""
    ROWS: tl.constexpr = RULE.rows
    KEYS: tl.constexpr = RULE.keys
    number, classes, length, corner, inside = locate(tl.program_id(0), shape, ROWS, RULE)
    if not inside:
        return
    number = number.to(tl.int64)
    b, h = number // heads, number % heads
    grad += b * grad_strides[0] + h * grad_strides[1]
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + h // group * k_strides[1]
    v += b * v_strides[0] + h // group * v_strides[1]
    out += b * out_strides[0] + h * out_strides[1]
    dq += b * dq_strides[0] + h * dq_strides[1]
    lse += number * (shape[0] * shape[1] * shape[2])
    delta += number * (shape[0] * shape[1] * shape[2])

    row, token, exist = tokens(corner, classes, shape, length, ROWS, RULE)
    q = load(q, token, q_strides[2], exist, False, HEAD.d, HEAD.block_d, HEAD.upcast)
    grad = load(grad, token, grad_strides[2], exist, False, HEAD.e, HEAD.block_e, HEAD.upcast)
    out = load(out, token, out_strides[2], exist, False, HEAD.e, HEAD.block_e, HEAD.upcast)
    sums = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + token, sums, mask=exist)
    logs = tl.load(lse + token, mask=exist, other=0.0)
    acc = tl.full([q.shape[0], HEAD.block_d], 0.0, tl.float32)
    x = keys_of(corner, length, RULE, 0)
    y = keys_of(corner, length, RULE, 1)
    z = keys_of(corner, length, RULE, 2)
    first = x[0], y[0], z[0]
    log_scale = scale * 1.4426950408889634
    left = x[1] * y[1] * z[1]
    if RULE.full:
        full = x[3] * y[3] * z[3]
        left -= full
        for t in range(0, full):
            place = box(full_tile(t, x, y, z, RULE), first, classes, shape, length, KEYS, RULE)
            acc = _query_step(
                acc, q, grad, logs, sums, row, k, v, place, k_strides[2], v_strides[2], log_scale,
                length, True, RULE, HEAD,
            )  # fmt: skip
    for t in range(0, left):
        place = box(other_tile(t, x, y, z, RULE), first, classes, shape, length, KEYS, RULE)
        acc = _query_step(
            acc, q, grad, logs, sums, row, k, v, place, k_strides[2], v_strides[2], log_scale,
            length, False, RULE, HEAD,
        )  # fmt: skip
    store(dq, token, dq_strides[2], exist, acc * scale, HEAD.d, HEAD.block_d)


@triton.jit
def _key_step(
    state, k, v, key, grad, q, lse, delta, place, grad_row, q_row, scale, length,
    FULL: tl.constexpr, RULE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Add what a box of queries gives to the gradients of a box of keys and values."""
    dk, dv = state
    row, token, exist = place
    q = load(q, token, q_row, exist, FULL, HEAD.d, HEAD.block_d, HEAD.upcast)
    grad = load(grad, token, grad_row, exist, FULL, HEAD.e, HEAD.block_e, HEAD.upcast)
    logs = tl.load(lse + token, mask=exist, other=0.0)
    sums = tl.load(delta + token, mask=exist, other=0.0)
    # Keys by queries, so that no tile of weights has to be turned.
    s = tl.dot(k, tl.trans(q), input_precision=HEAD.precision, out_dtype=tl.float32)
    s = s * scale - logs[None, :]
    if not FULL:
        s = tl.where(meet(row, key, length, True, RULE), s, float("-inf"))
    p = tl.exp2(s)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=HEAD.precision)
    dp = tl.dot(v, tl.trans(grad), input_precision=HEAD.precision, out_dtype=tl.float32)
    ds = p * (dp - sums[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=HEAD.precision), dv


@triton.jit
def _backward_keys(
    grad, q, k, v, lse, delta, dk, dv, grad_strides, q_strides, k_strides, v_strides, dk_strides,
    dv_strides, heads, group, shape, scale, RULE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """A program has a box of keys of one head, and takes the query heads of its group in turn."""
    ROWS: tl.constexpr = RULE.rows
    KEYS: tl.constexpr = RULE.keys
    number, classes, length, corner, inside = locate(tl.program_id(0), shape, KEYS, RULE)
    if not inside:
        return
    number = number.to(tl.int64)
    b, h = number // heads, number % heads
    grad += b * grad_strides[0] + h * group * grad_strides[1]
    q += b * q_strides[0] + h * group * q_strides[1]
    k += b * k_strides[0] + h * k_strides[1]
    v += b * v_strides[0] + h * v_strides[1]
    dk += b * dk_strides[0] + h * dk_strides[1]
    dv += b * dv_strides[0] + h * dv_strides[1]
    size = shape[0] * shape[1] * shape[2]
    lse += number * group * size
    delta += number * group * size

    key, token, exist = tokens(corner, classes, shape, length, KEYS, RULE)
    k = load(k, token, k_strides[2], exist, False, HEAD.d, HEAD.block_d, HEAD.upcast)
    v = load(v, token, v_strides[2], exist, False, HEAD.e, HEAD.block_e, HEAD.upcast)
    state = (
        tl.full([k.shape[0], HEAD.block_d], 0.0, tl.float32),
        tl.full([k.shape[0], HEAD.block_e], 0.0, tl.float32),
    )
    x = queries_of(corner, length, RULE, 0)
    y = queries_of(corner, length, RULE, 1)
    z = queries_of(corner, length, RULE, 2)
    first = x[0], y[0], z[0]
    log_scale = scale * 1.4426950408889634
    left = x[1] * y[1] * z[1]
    if RULE.full:
        left -= x[3] * y[3] * z[3]
    for _ in range(0, group):
        if RULE.full:
            for t in range(0, x[3] * y[3] * z[3]):
                at = full_tile(t, x, y, z, RULE)
                place = box(at, first, classes, shape, length, ROWS, RULE)
                state = _key_step(
                    state, k, v, key, grad, q, lse, delta, place, grad_strides[2], q_strides[2],
                    log_scale, length, True, RULE, HEAD,
                )  # fmt: skip
        for t in range(0, left):
            at = other_tile(t, x, y, z, RULE)
            place = box(at, first, classes, shape, length, ROWS, RULE)
            state = _key_step(
                state, k, v, key, grad, q, lse, delta, place, grad_strides[2], q_strides[2],
                log_scale, length, False, RULE, HEAD,
            )  # fmt: skip
        grad += grad_strides[1]
        q += q_strides[1]
        lse += size
        delta += size
    store(dk, token, dk_strides[2], exist, state[0] * scale, HEAD.d, HEAD.block_d)
    store(dv, token, dv_strides[2], exist, state[1], HEAD.e, HEAD.block_e)


def _three(values: Sequence[Any], fill: Any) -> Any:
    """One to three entries as three, for a grid with leading axes of one token."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _rule(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    clip: bool,
) -> tuple[tuple[int, ...], Rule]:
    """Three axes of the grid, and its rule without boxes."""
    grid = _three(shape, 1)
    axes = next((3 - a for a in range(2) if grid[a] != 1), 1)
    w, d, s = (_three(x, 1) for x in (kernel_size, dilation, stride))
    return grid, Rule(w, d, s, _three(causal, False), clip, axes)


class _Launch(NamedTuple):
    """What all kernels of one pass are started with."""

    grid: tuple[int, ...]
    rule: Rule
    head: Head
    warps: int
    stages: int

    def programs(self, box: tuple[int, int, int], heads: int) -> tuple[int]:
        """Programs for boxes of this shape in so many heads of so many samples."""
        count = count_tiles(self.grid, self.rule, box) * heads
        if count >= 2**31:
            raise ZooError(f"{count} boxes of tokens over all heads and samples; allowed: 2^31 - 1")
        return (count,)


def _launch(q: Tensor, v: Tensor, grid: tuple[int, ...], rule: Rule, backward: bool) -> _Launch:
    """Choose boxes, warps and stages; starting points by the room a tile takes, not measured."""
    if not INTERPRET and q.device.type != "cuda":
        raise ZooError(f"q is on {q.device}; allowed: CUDA devices, or TRITON_INTERPRET=1")
    d, e = q.shape[-1], v.shape[-1]
    head = Head(d, e, block_d(d), block_d(e), upcast(q), precision(q))
    width = max(head.block_d, head.block_e)
    half = q.element_size() < 4
    band = rule.axes == 1 and min(widths(rule)[2], grid[2]) >= WIDE
    if not half and head.precision == "ieee":
        queries, keys = EXACT, EXACT
    else:
        queries, keys = WIDE_ROWS if band and half and not backward else ROWS, KEYS
    assert min(queries, keys) >= LEAST
    warps = 8 if width > 64 and keys > EXACT else 4
    stages = 3 if half and not backward else 2
    return _Launch(grid, with_boxes(grid, rule, queries, keys), head, warps, stages)


def _new(q: Tensor, heads: int, width: int) -> Tensor:
    """(B, heads, N, width), stored with the tokens outside the heads, as projections have it."""
    return q.new_empty(q.shape[0], q.shape[2], heads, width).transpose(1, 2)


@custom_op("zoo::neighborhood_fwd", mutates_args=())
def _neighborhood_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    clip: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, E) and base-2 log-sum-exps (B, H, N)."""
    grid, rule = _rule(shape, kernel_size, dilation, stride, causal, clip)
    start = _launch(q, v, grid, rule, backward=False)
    q, k, v = rows(q), rows(k), rows(v)
    heads, groups = q.shape[1], k.shape[1]
    out = _new(q, heads, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(q):
            _forward[start.programs(start.rule.rows, q.shape[0] * heads)](
                q, k, v, out, lse, strides(q), strides(k), strides(v), strides(out),
                heads, heads // groups, grid, scale, start.rule, start.head,
                num_warps=start.warps, num_stages=start.stages,
            )  # fmt: skip
    return out, lse


@custom_op("zoo::neighborhood_bwd", mutates_args=())
def _neighborhood_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    clip: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B, H, N, D), k (B, G, N, D) and v (B, G, N, E)."""
    grid, rule = _rule(shape, kernel_size, dilation, stride, causal, clip)
    start = _launch(q, v, grid, rule, backward=True)
    grad, q, k, v, out, lse = rows(grad), rows(q), rows(k), rows(v), rows(out), lse.contiguous()
    heads, groups = q.shape[1], k.shape[1]
    dq, dk, dv = (_new(x, x.shape[1], x.shape[3]) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if q.numel():
        common = (heads // groups, grid, scale, start.rule, start.head)
        options = {"num_warps": start.warps, "num_stages": start.stages}
        with torch.cuda.device_of(q):
            _backward_queries[start.programs(start.rule.rows, q.shape[0] * heads)](
                grad, q, k, v, out, lse, delta, dq, strides(grad), strides(q), strides(k),
                strides(v), strides(out), strides(dq), heads, *common, **options,
            )  # fmt: skip
            _backward_keys[start.programs(start.rule.keys, q.shape[0] * groups)](
                grad, q, k, v, lse, delta, dk, dv, strides(grad), strides(q), strides(k),
                strides(v), strides(dk), strides(dv), groups, *common, **options,
            )  # fmt: skip
    return dq, dk, dv


@_neighborhood_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    return _new(q, q.shape[1], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_neighborhood_bwd.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_new(x, x.shape[1], x.shape[3]) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * len(ctx.rule)
    if grad is None:
        return None, None, None, *rest
    found = _neighborhood_bwd(grad, *ctx.saved_tensors, *ctx.rule)
    wanted = zip(found, ctx.needs_input_grad[:3], strict=True)
    return *(x if needed else None for x, needed in wanted), *rest


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise ZooError(
        "the Triton kernel of neighborhood attention has no second derivative; "
        "take backend='torch' or backend='reference'"
    )


_neighborhood_fwd.register_autograd(_backward, setup_context=_keep)
_neighborhood_bwd.register_autograd(_no_second)


@register_flop_formula(torch.ops.zoo.neighborhood_fwd)
def _forward_flops(q: Any, k: Any, v: Any, *rule: Any, **kwargs: Any) -> int:
    """Two products of the pairs that meet; what tiles hold besides is not counted."""
    return 2 * q[0] * q[1] * count_pairs(*_rule(*rule[:6])) * (q[3] + v[3])


@register_flop_formula(torch.ops.zoo.neighborhood_bwd)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rule: Any, **kwargs: Any
) -> int:
    """Five products of the pairs that meet: the scores once more, and four for the gradients."""
    return 2 * q[0] * q[1] * count_pairs(*_rule(*rule[:6])) * (3 * q[3] + 2 * v[3])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    per_axis: dict[str, Sequence[Any]],
    clip: bool,
) -> None:
    if not all(x.ndim == 4 for x in (q, k, v)):
        raise ZooError(f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes; allowed: 4, (B, H, N, D)")
    if not 1 <= len(shape) <= 3 or any(x < 0 for x in shape):
        raise ZooError(f"shape={tuple(shape)!r}; allowed: one to three sizes")
    for name, values in per_axis.items():
        if len(values) != len(shape):
            raise ZooError(
                f"{name}={tuple(values)!r} has {len(values)} entries; allowed: {len(shape)}, one "
                f"for each axis of shape={tuple(shape)!r}"
            )
    fits = q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3] and q.shape[2] == k.shape[2]
    if not fits or q.shape[0] != k.shape[0]:
        raise ZooError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; allowed: "
            "(B, H, N, D), (B, G, N, D), (B, G, N, E)"
        )
    if q.shape[2] != math.prod(shape):
        raise ZooError(f"q has {q.shape[2]} tokens; allowed: {math.prod(shape)}, shape={shape!r}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ZooError(f"k has {k.shape[1]} heads; allowed: divisors of the {q.shape[1]} of q")
    for axis, (x, w, d, s, c) in enumerate(zip(shape, *per_axis.values(), strict=True)):
        if w < 1 or d < 1 or not 1 <= s <= w:
            raise ZooError(
                f"kernel_size={w}, dilation={d}, stride={s} on axis {axis}; allowed: at least 1 "
                "each, and stride up to kernel_size"
            )
        if clip and not c and s > 1:
            raise ZooError(f"stride={s} on axis {axis} with clip=True; allowed: 1, or causal")
        if not (clip or c) and 0 < x < w * d:
            raise ZooError(
                f"kernel_size={w} times dilation={d} on axis {axis}; allowed: up to its {x} tokens"
            )


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    clip: bool = False,
) -> Tensor:
    """Softmax attention of every token of a grid to a window of its neighbors.

    On an axis with dilation d, coordinate i belongs to residue class i mod d, of which it is number
    i div d; all that follows counts within the class. The leader of i is i where stride is 1, else
    the token s // 2 (causal: s - 1) after the first of its run of s, at most the last one.

        shifted  the W keys from c - W // 2 on, c the leader, moved so that the window fits
        causal   keys up to i, less than W before its leader
        clip     keys with |i - j| <= W // 2, or causal as above with no limit on W

    A window is the product of its axes. Second derivatives raise.

    Args:
        q: (B, H, N, D), the tokens of the grid row by row; half precision or float32.
        k: (B, G, N, D), G dividing H; query head h meets key head h // (H / G).
        v: (B, G, N, E).
        shape: One to three sizes X whose product is N.
        kernel_size: W on each axis.
        dilation: d on each axis.
        stride: s on each axis.
        causal: Whether an axis is causal.
        scale: Factor on the dot products.
        clip: Windows of axes that are not causal are cut at the border instead of shifted.

    Returns:
        (B, H, N, E), in memory with the tokens outside the heads.

    Raises:
        ZooError: Sizes that do not fit, or tensors that the kernel cannot take.
    """
    per_axis = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    _check(q, k, v, shape, {**per_axis, "causal": causal}, clip)
    if torch.is_autocast_enabled(q.device.type):
        half = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(half), k.to(half), v.to(half)
    reason = refuse(q, k, v, head_dim=HEAD_DIM, by_name=True)
    if reason is not None:
        raise ZooError(f"the Triton kernel cannot run: {reason}")
    rule = (list(shape), list(kernel_size), list(dilation), list(stride), list(causal), clip)
    return _neighborhood_fwd(q, k, v, *rule, scale)[0]
