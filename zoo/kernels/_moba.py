"""The Triton kernels of MoBA; `zoo.kernels.moba` builds their lists and launches them.

Rows are queries, columns are keys. Scores are counted in base 2: ``factor = scale * log2(e)``, and
every log-sum-exp is one of base 2. A slot is one choice of one row, ``row * P + rank``; what a row
gets from a chosen block waits in its slot until the row's own pass takes it up, so that no two
programs ever add to the same number. The strides of a tensor come as a tuple: of sample, head, row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from call to call should not make new versions of a kernel.
_ANY = ("N", "T", "NB", "PIECES")


@triton.jit
def _of(x, step, b, h):
    """Address of the rows of one head."""
    return x + b * step[0] + h * step[1]


@triton.jit
def _tile(
    base, rows, stride, live,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some rows of a matrix (rows, WIDTH), zeros where not live and from WIDTH to WIDE."""
    columns = tl.arange(0, WIDE)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if WIDTH == WIDE:
        x = tl.load(at, mask=live[:, None], other=0.0) if MASKED else tl.load(at)
    else:
        keep = (columns < WIDTH)[None, :]
        if MASKED:
            keep = keep & live[:, None]
        x = tl.load(at, mask=keep, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _put(base, rows, stride, live, x, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Store the live rows of a tile."""
    columns = tl.arange(0, WIDE)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    keep = live[:, None] & (columns < WIDTH)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=keep)


@triton.jit
def _pair(k, v, key, k_row, v_row, live, MASKED: tl.constexpr, HEAD: tl.constexpr):
    """A tile of keys and that of their values."""
    keys = _tile(k, key, k_row, live, HEAD.d, HEAD.block_d, MASKED, HEAD.upcast)
    values = _tile(v, key, v_row, live, HEAD.e, HEAD.block_e, MASKED, HEAD.upcast)
    return keys, values


@triton.jit
def _meeting(
    q, k, v, q_step, k_step, v_step, bh, row, live,
    H: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Some rows of a head, and the addresses of the keys and values that they may meet."""
    b, h = bh // H, bh % H
    k_base = _of(k, k_step, b, h // GROUP)
    v_base = _of(v, v_step, b, h // GROUP)
    q_base = _of(q, q_step, b, h)
    rows = _tile(q_base, row, q_step[2], live, HEAD.d, HEAD.block_d, True, HEAD.upcast)
    return rows, k_base, v_base


@triton.jit
def _cotangents(grad, lse, delta, row, stride, live, HEAD: tl.constexpr):
    """Gradients of some rows of a head, their log-sum-exps, their products with the outputs."""
    grads = _tile(grad, row, stride, live, HEAD.e, HEAD.block_e, True, HEAD.upcast)
    logs = tl.load(lse + row, mask=live, other=float("inf"))  # 2^(s - inf) weighs nothing
    products = tl.load(delta + row, mask=live, other=0.0)
    return grads, logs, products


@triton.jit
def _nothing(BM: tl.constexpr, HEAD: tl.constexpr):
    """The running softmax of rows that have seen no key: finite maxima, sums, outputs."""
    top = tl.full([BM], -1e30, tl.float32)
    return top, tl.zeros([BM], tl.float32), tl.zeros([BM, HEAD.block_e], tl.float32)


@triton.jit
def _attend(q, k, v, seen, top, total, acc, factor, MASKED: tl.constexpr, PREC: tl.constexpr):
    """One step of the running softmax: more keys for the same rows."""
    s = tl.dot(q, tl.trans(k), input_precision=PREC, out_dtype=tl.float32) * factor
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    keep = tl.exp2(top - new)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PREC, out_dtype=tl.float32)
    return new, total, acc


@triton.jit
def _weigh(q, k, v, grad, lse, delta, seen, factor, MASKED: tl.constexpr, PREC: tl.constexpr):
    """Weights of the pairs of a tile and the gradients of their scores (without the scale)."""
    s = tl.dot(q, tl.trans(k), input_precision=PREC, out_dtype=tl.float32) * factor
    s = s - lse[:, None]
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    p = tl.exp2(s)
    dp = tl.dot(grad, tl.trans(v), input_precision=PREC, out_dtype=tl.float32)
    return p, p * (dp - delta[:, None])


@triton.jit
def _gathered(slots, ends, tile_block, tile_end, pid, bh, T, NB, P: tl.constexpr, BM: tl.constexpr):
    """The block of a tile of gathered rows (NB if there is no such tile), its slots, their rows."""
    block = tl.load(tile_block + bh * T + pid)
    inside = tl.minimum(block, NB - 1)
    last = tl.load(ends + bh * (NB + 1) + inside + 1)
    first = tl.load(ends + bh * (NB + 1) + inside)
    # Tiles are counted through all blocks of a head; this is how many the earlier blocks have.
    before = tl.load(tile_end + bh * NB + inside - 1, mask=inside > 0, other=0)
    at = first + (pid - before) * BM + tl.arange(0, BM)
    live = at < last
    slot = tl.load(slots + at, mask=live, other=0)
    return block, slot, slot // P, live


@triton.jit
def _own(begins, N, T, BM: tl.constexpr):
    """The neighbouring rows of a program: first, head, all, which exist, where blocks begin."""
    r0 = (tl.program_id(0) % T) * BM
    bh = (tl.program_id(0) // T).to(tl.int64)
    row = r0 + tl.arange(0, BM)
    live = row < N
    return r0, bh, row, live, tl.load(begins + row, mask=live, other=N)


@triton.jit
def _slot(chosen, bh, row, live, own, rank, N, P: tl.constexpr):
    """The slots of one choice of some rows, and which of them chose a past block."""
    slot = bh * N * P + row.to(tl.int64) * P + rank
    past = tl.load(chosen + slot, mask=live, other=-1)
    return slot, (past >= 0) & (past < own)


@triton.jit(do_not_specialize=_ANY)
def chosen_forward(
    q, k, v, part, part_lse, slots, ends, tile_block, tile_end, starts,
    q_step, k_step, v_step, factor, N, T, NB,
    P: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some rows that chose a block, gathered, meet all of its keys: a partial result per slot."""
    MASKED: tl.constexpr = BLOCK % BN != 0
    pid = tl.program_id(0) % T
    bh = (tl.program_id(0) // T).to(tl.int64)
    block, slot, row, live = _gathered(slots, ends, tile_block, tile_end, pid, bh, T, NB, P, BM)
    if block >= NB:
        return
    start = tl.load(starts + block)
    rows, k_base, v_base = _meeting(q, k, v, q_step, k_step, v_step, bh, row, live, H, GROUP, HEAD)
    top, total, acc = _nothing(BM, HEAD)
    for j in range(0, BLOCK, BN):  # a block that could be chosen is a whole one
        key = j + tl.arange(0, BN)
        inside = key < BLOCK
        keys, values = _pair(
            k_base, v_base, start + key, k_step[2], v_step[2], inside, MASKED, HEAD
        )
        top, total, acc = _attend(
            rows, keys, values, inside[None, :], top, total, acc, factor, MASKED, HEAD.precision
        )
    out = bh * N * P
    _put(part + out * HEAD.e, slot, HEAD.e, live, acc / total[:, None], HEAD.e, HEAD.block_e)
    tl.store(part_lse + out + slot, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=_ANY)
def own_forward(
    q, k, v, part, part_lse, chosen, begins, index, out, lse,
    q_step, k_step, v_step, factor, N, T,
    P: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some neighbouring rows meet the earlier keys of their own blocks, then what is in slots."""
    PREC: tl.constexpr = HEAD.precision
    r0, bh, row, live, begin = _own(begins, N, T, BM)
    first = tl.load(begins + r0)
    last = tl.load(begins + tl.minimum(r0 + BM, N) - 1)
    rows, k_base, v_base = _meeting(q, k, v, q_step, k_step, v_step, bh, row, live, H, GROUP, HEAD)
    top, total, acc = _nothing(BM, HEAD)
    # Where all rows are of one block, every one of them sees all of its keys before the tile.
    middle = first + tl.where(first == last, (r0 - first) // BN, 0) * BN
    for j in range(first, middle, BN):
        key = j + tl.arange(0, BN)
        keys, values = _pair(k_base, v_base, key, k_step[2], v_step[2], live, False, HEAD)
        top, total, acc = _attend(rows, keys, values, live, top, total, acc, factor, False, PREC)
    for j in range(middle, tl.minimum(r0 + BM, N), BN):
        key = j + tl.arange(0, BN)
        keys, values = _pair(k_base, v_base, key, k_step[2], v_step[2], key < N, True, HEAD)
        seen = (key[None, :] <= row[:, None]) & (key[None, :] >= begin[:, None])
        top, total, acc = _attend(rows, keys, values, seen, top, total, acc, factor, True, PREC)
    if P > 0:
        own = tl.load(index + row, mask=live, other=0)
        for rank in range(P):
            slot, full = _slot(chosen, bh, row, live, own, rank, N, P)
            weight = tl.load(part_lse + slot, mask=full, other=-float("inf"))
            found = _tile(part, slot, HEAD.e, full, HEAD.e, HEAD.block_e, True, HEAD.upcast)
            new = tl.maximum(top, weight)
            keep = tl.exp2(top - new)
            weight = tl.exp2(weight - new)
            total = total * keep + weight
            acc = acc * keep[:, None] + found.to(tl.float32) * weight[:, None]
            top = new
    total = tl.where(live, total, 1.0)
    out += bh * N * HEAD.e
    _put(out, row, HEAD.e, live, acc / total[:, None], HEAD.e, HEAD.block_e)
    tl.store(lse + bh * N + row, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=_ANY)
def row_products(
    grad, out, delta, g_step, N, T, H: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr
):
    """Product of each row's output and its gradient."""
    row = (tl.program_id(0) % T) * BM + tl.arange(0, BM)
    bh = (tl.program_id(0) // T).to(tl.int64)
    live = row < N
    grad = _of(grad, g_step, bh // H, bh % H)
    out += bh * N * HEAD.e
    a = _tile(grad, row, g_step[2], live, HEAD.e, HEAD.block_e, True, HEAD.upcast)
    b = _tile(out, row, HEAD.e, live, HEAD.e, HEAD.block_e, True, HEAD.upcast)
    tl.store(delta + bh * N + row, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=live)


@triton.jit
def _add_rows(
    q, grad, lse, delta, q_row, g_row, row, live, seen, keys, values, dk, dv, factor,
    HEAD: tl.constexpr,
):  # fmt: skip
    """What some rows of a head add to the gradients of a tile of keys and values."""
    PREC: tl.constexpr = HEAD.precision
    rows = _tile(q, row, q_row, live, HEAD.d, HEAD.block_d, True, HEAD.upcast)
    grads, logs, products = _cotangents(grad, lse, delta, row, g_row, live, HEAD)
    p, ds = _weigh(rows, keys, values, grads, logs, products, seen, factor, True, PREC)
    p = tl.trans(p.to(grads.dtype))
    dv = tl.dot(p, grads, dv, input_precision=PREC, out_dtype=tl.float32)
    ds = tl.trans(ds.to(rows.dtype))
    dk = tl.dot(ds, rows, dk, input_precision=PREC, out_dtype=tl.float32)
    return dk, dv


@triton.jit(do_not_specialize=_ANY)
def key_backward(
    grad, q, k, v, lse, delta, slots, ends, starts, stops, dk, dv,
    g_step, q_step, k_step, v_step, factor, scale, N, NB, PIECES,
    P: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a piece of a block, from its own rows and from those that chose the block."""
    piece = tl.program_id(0) % PIECES
    block = tl.program_id(0) // PIECES % NB
    bg = (tl.program_id(0) // PIECES // NB).to(tl.int64)
    stop = tl.load(stops + block)
    first = tl.load(starts + block) + piece * BN
    if first >= stop:
        return
    b, g = bg // G, bg % G
    key = first + tl.arange(0, BN)
    inside = key < stop
    k_base = _of(k, k_step, b, g)
    v_base = _of(v, v_step, b, g)
    keys, values = _pair(k_base, v_base, key, k_step[2], v_step[2], inside, True, HEAD)
    dk_acc = tl.zeros([BN, HEAD.block_d], tl.float32)
    dv_acc = tl.zeros([BN, HEAD.block_e], tl.float32)
    for member in range(GROUP):
        h = g * GROUP + member
        bh = b * G * GROUP + h
        q_base = _of(q, q_step, b, h)
        g_base = _of(grad, g_step, b, h)
        for r in range(first, stop, BM):
            row = r + tl.arange(0, BM)
            seen = (row[:, None] >= key[None, :]) & inside[None, :]
            dk_acc, dv_acc = _add_rows(
                q_base, g_base, lse + bh * N, delta + bh * N, q_step[2], g_step[2], row,
                row < stop, seen, keys, values, dk_acc, dv_acc, factor, HEAD,
            )  # fmt: skip
        if P > 0:
            low = tl.load(ends + bh * (NB + 1) + block)
            count = (tl.load(ends + bh * (NB + 1) + block + 1) - low).to(tl.int32)
            for r in range(0, count, BM):
                at = r + tl.arange(0, BM)
                live = at < count
                row = tl.load(slots + low + at, mask=live, other=0) // P
                dk_acc, dv_acc = _add_rows(
                    q_base, g_base, lse + bh * N, delta + bh * N, q_step[2], g_step[2], row,
                    live, inside[None, :], keys, values, dk_acc, dv_acc, factor, HEAD,
                )  # fmt: skip
    _put(dk + bg * N * HEAD.d, key, HEAD.d, inside, dk_acc * scale, HEAD.d, HEAD.block_d)
    _put(dv + bg * N * HEAD.e, key, HEAD.e, inside, dv_acc, HEAD.e, HEAD.block_e)


@triton.jit(do_not_specialize=_ANY)
def chosen_backward(
    grad, q, k, v, lse, delta, part, slots, ends, tile_block, tile_end, starts,
    g_step, q_step, k_step, v_step, factor, scale, N, T, NB,
    P: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of some gathered rows through the block they chose: a partial one per slot."""
    MASKED: tl.constexpr = BLOCK % BN != 0
    PREC: tl.constexpr = HEAD.precision
    pid = tl.program_id(0) % T
    bh = (tl.program_id(0) // T).to(tl.int64)
    block, slot, row, live = _gathered(slots, ends, tile_block, tile_end, pid, bh, T, NB, P, BM)
    if block >= NB:
        return
    start = tl.load(starts + block)
    rows, k_base, v_base = _meeting(q, k, v, q_step, k_step, v_step, bh, row, live, H, GROUP, HEAD)
    grads, logs, products = _cotangents(
        _of(grad, g_step, bh // H, bh % H), lse + bh * N, delta + bh * N, row, g_step[2], live, HEAD
    )
    acc = tl.zeros([BM, HEAD.block_d], tl.float32)
    for j in range(0, BLOCK, BN):
        key = j + tl.arange(0, BN)
        inside = key < BLOCK
        keys, values = _pair(
            k_base, v_base, start + key, k_step[2], v_step[2], inside, MASKED, HEAD
        )
        _, ds = _weigh(
            rows, keys, values, grads, logs, products, inside[None, :], factor, MASKED, PREC
        )
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PREC, out_dtype=tl.float32)
    _put(part + bh * N * P * HEAD.d, slot, HEAD.d, live, acc * scale, HEAD.d, HEAD.block_d)


@triton.jit(do_not_specialize=_ANY)
def own_backward(
    grad, q, k, v, lse, delta, part, chosen, begins, index, dq,
    g_step, q_step, k_step, v_step, factor, scale, N, T,
    P: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of some neighbouring rows through their own blocks, and those in their slots."""
    PREC: tl.constexpr = HEAD.precision
    r0, bh, row, live, begin = _own(begins, N, T, BM)
    rows, k_base, v_base = _meeting(q, k, v, q_step, k_step, v_step, bh, row, live, H, GROUP, HEAD)
    grads, logs, products = _cotangents(
        _of(grad, g_step, bh // H, bh % H), lse + bh * N, delta + bh * N, row, g_step[2], live, HEAD
    )
    acc = tl.zeros([BM, HEAD.block_d], tl.float32)
    for j in range(tl.load(begins + r0), tl.minimum(r0 + BM, N), BN):
        key = j + tl.arange(0, BN)
        keys, values = _pair(k_base, v_base, key, k_step[2], v_step[2], key < N, True, HEAD)
        seen = (key[None, :] <= row[:, None]) & (key[None, :] >= begin[:, None])
        _, ds = _weigh(rows, keys, values, grads, logs, products, seen, factor, True, PREC)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PREC, out_dtype=tl.float32)
    acc = acc * scale
    if P > 0:
        own = tl.load(index + row, mask=live, other=0)
        for rank in range(P):
            slot, full = _slot(chosen, bh, row, live, own, rank, N, P)
            found = _tile(part, slot, HEAD.d, full, HEAD.d, HEAD.block_d, True, HEAD.upcast)
            acc += found.to(tl.float32)
    _put(dq + bh * N * HEAD.d, row, HEAD.d, live, acc, HEAD.d, HEAD.block_d)
