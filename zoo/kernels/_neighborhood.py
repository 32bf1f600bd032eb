"""The kernels of neighborhood attention: a program for each box of queries, or of keys.

Each walks first the boxes of the other side that need no mask, then those that do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels._neighborhood_tiles import (
    box,
    full_tile,
    keys_of,
    load,
    locate,
    meet,
    other_tile,
    queries_of,
    store,
    tokens,
)


@triton.jit
def _rows(q, k, v, q_strides, k_strides, v_strides, number, heads, group):
    """Where a head's queries are, and the keys and values that they meet."""
    b, h = number // heads, number % heads
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + h // group * k_strides[1]
    v += b * v_strides[0] + h // group * v_strides[1]
    return q, k, v


@triton.jit
def _keys_seen(corner, length, RULE: tl.constexpr):
    """What `cover` says of the keys of a box of queries, on each axis."""
    x = keys_of(corner, length, RULE, 0)
    y = keys_of(corner, length, RULE, 1)
    z = keys_of(corner, length, RULE, 2)
    return x, y, z


@triton.jit
def _boxes(x, y, z, RULE: tl.constexpr):
    """Of the boxes in `cover`: the first, how many need no mask, how many do."""
    first = x[0], y[0], z[0]
    if RULE.full:
        full = x[3] * y[3] * z[3]
        left = x[1] * y[1] * z[1] - full
    else:
        full = 0
        left = x[1] * y[1] * z[1]
    return first, full, left


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
    q, k, v = _rows(q, k, v, q_strides, k_strides, v_strides, number, heads, group)
    out += number // heads * out_strides[0] + number % heads * out_strides[1]
    lse += number * (shape[0] * shape[1] * shape[2])

    row, token, exist = tokens(corner, classes, shape, length, ROWS, RULE)
    q = load(q, token, q_strides[2], exist, False, HEAD.d, HEAD.block_d, HEAD.upcast)
    # Finite, so that rows that have seen nothing yet stay free of NaN.
    top = tl.full([q.shape[0]], -1e30, tl.float32)
    state = top, top * 0, tl.full([q.shape[0], HEAD.block_e], 0.0, tl.float32)
    x, y, z = _keys_seen(corner, length, RULE)
    first, full, left = _boxes(x, y, z, RULE)
    log_scale = scale * 1.4426950408889634
    if RULE.full:
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
    q, k, v = _rows(q, k, v, q_strides, k_strides, v_strides, number, heads, group)
    grad += b * grad_strides[0] + h * grad_strides[1]
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
    x, y, z = _keys_seen(corner, length, RULE)
    first, full, left = _boxes(x, y, z, RULE)
    log_scale = scale * 1.4426950408889634
    if RULE.full:
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
    first, full, left = _boxes(x, y, z, RULE)
    log_scale = scale * 1.4426950408889634
    for _ in range(0, group):
        if RULE.full:
            for t in range(0, full):
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
