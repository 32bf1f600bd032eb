"""The Triton kernels of MoBA; `zoo.kernels.moba` builds their lists and launches them.

Rows are queries, columns are keys. Scores are counted in base 2: ``factor = scale * log2(e)``, and
every log-sum-exp is one of base 2. A slot is one choice of one row, ``row * P + rank``; what a row
gets from a chosen block waits in its slot until the row's own pass takes it up, so that no two
programs ever add to the same number.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from call to call should not make new versions of a kernel.
_ANY = ("N", "T", "NB", "PIECES")


@triton.jit
def _tile(
    base,
    rows,
    stride,
    live,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
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


@triton.jit(do_not_specialize=_ANY)
def chosen_forward(
    q, k, v, part, part_lse, slots, ends, tile_block, tile_end, starts,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    factor, N, T, NB,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Some rows that chose a block, gathered, meet all of its keys: a partial result per slot."""
    pid = tl.program_id(0) % T
    bh = (tl.program_id(0) // T).to(tl.int64)
    block, slot, row, live = _gathered(slots, ends, tile_block, tile_end, pid, bh, T, NB, P, BM)
    if block >= NB:
        return
    b, h = bh // H, bh % H
    g = h // GROUP
    start = tl.load(starts + block)
    k_base = k + b * k_b + g * k_h
    v_base = v + b * v_b + g * v_h
    rows = _tile(q + b * q_b + h * q_h, row, q_n, live, D, BD, True, UPCAST)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    for j in range(0, BLOCK, BN):  # a block that could be chosen is a whole one
        key = j + tl.arange(0, BN)
        inside = key < BLOCK
        keys = _tile(k_base, start + key, k_n, inside, D, BD, BLOCK % BN != 0, UPCAST)
        values = _tile(v_base, start + key, v_n, inside, E, BE, BLOCK % BN != 0, UPCAST)
        top, total, acc = _attend(
            rows, keys, values, inside[None, :], top, total, acc, factor, BLOCK % BN != 0, PREC
        )
    out = bh * N * P
    _put(part + out * E, slot, E, live, acc / total[:, None], E, BE)
    tl.store(part_lse + out + slot, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=_ANY)
def own_forward(
    q, k, v, part, part_lse, chosen, begins, index, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    factor, N, T,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Some neighbouring rows meet the earlier keys of their own blocks, then what is in slots."""
    r0 = (tl.program_id(0) % T) * BM
    bh = (tl.program_id(0) // T).to(tl.int64)
    b, h = bh // H, bh % H
    g = h // GROUP
    row = r0 + tl.arange(0, BM)
    live = row < N
    begin = tl.load(begins + row, mask=live, other=N)
    first = tl.load(begins + r0)
    last = tl.load(begins + tl.minimum(r0 + BM, N) - 1)
    k_base = k + b * k_b + g * k_h
    v_base = v + b * v_b + g * v_h
    rows = _tile(q + b * q_b + h * q_h, row, q_n, live, D, BD, True, UPCAST)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BE], tl.float32)
    # Where all rows are of one block, every one of them sees all of its keys before the tile.
    middle = first + tl.where(first == last, (r0 - first) // BN, 0) * BN
    for j in range(first, middle, BN):
        key = j + tl.arange(0, BN)
        keys = _tile(k_base, key, k_n, live, D, BD, False, UPCAST)
        values = _tile(v_base, key, v_n, live, E, BE, False, UPCAST)
        top, total, acc = _attend(rows, keys, values, live, top, total, acc, factor, False, PREC)
    for j in range(middle, tl.minimum(r0 + BM, N), BN):
        key = j + tl.arange(0, BN)
        keys = _tile(k_base, key, k_n, key < N, D, BD, True, UPCAST)
        values = _tile(v_base, key, v_n, key < N, E, BE, True, UPCAST)
        seen = (key[None, :] <= row[:, None]) & (key[None, :] >= begin[:, None])
        top, total, acc = _attend(rows, keys, values, seen, top, total, acc, factor, True, PREC)
    if P > 0:
        own = tl.load(index + row, mask=live, other=0)
        for rank in range(P):
            slot = bh * N * P + row.to(tl.int64) * P + rank
            past = tl.load(chosen + slot, mask=live, other=-1)
            full = (past >= 0) & (past < own)
            weight = tl.load(part_lse + slot, mask=full, other=-float("inf"))
            found = _tile(part, slot, E, full, E, BE, True, UPCAST).to(tl.float32)
            new = tl.maximum(top, weight)
            keep = tl.exp2(top - new)
            weight = tl.exp2(weight - new)
            total = total * keep + weight
            acc = acc * keep[:, None] + found * weight[:, None]
            top = new
    total = tl.where(live, total, 1.0)
    _put(out + bh * N * E, row, E, live, acc / total[:, None], E, BE)
    tl.store(lse + bh * N + row, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=_ANY)
def row_products(
    grad, out, delta, g_b, g_h, g_n, N, T,
    H: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Product of each row's output and its gradient."""
    row = (tl.program_id(0) % T) * BM + tl.arange(0, BM)
    bh = (tl.program_id(0) // T).to(tl.int64)
    live = row < N
    a = _tile(grad + bh // H * g_b + bh % H * g_h, row, g_n, live, E, BE, True, UPCAST)
    b = _tile(out + bh * N * E, row, E, live, E, BE, True, UPCAST)
    tl.store(delta + bh * N + row, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=live)


@triton.jit
def _add_rows(
    q_base, g_base, q_n, g_n, lse, delta, row, live, seen, keys, values, dk, dv, factor,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    UPCAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What some rows add to the gradients of a tile of keys and values."""
    rows = _tile(q_base, row, q_n, live, D, BD, True, UPCAST)
    grad = _tile(g_base, row, g_n, live, E, BE, True, UPCAST)
    logs = tl.load(lse + row, mask=live, other=float("inf"))  # 2^(s - inf) weighs nothing
    product = tl.load(delta + row, mask=live, other=0.0)
    p, ds = _weigh(rows, keys, values, grad, logs, product, seen, factor, True, PREC)
    p = tl.trans(p.to(grad.dtype))
    dv = tl.dot(p, grad, dv, input_precision=PREC, out_dtype=tl.float32)
    ds = tl.trans(ds.to(rows.dtype))
    dk = tl.dot(ds, rows, dk, input_precision=PREC, out_dtype=tl.float32)
    return dk, dv


@triton.jit(do_not_specialize=_ANY)
def key_backward(
    grad, q, k, v, lse, delta, slots, ends, starts, stops, dk, dv,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    factor, scale, N, NB, PIECES,
    G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PREC: tl.constexpr,
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
    keys = _tile(k + b * k_b + g * k_h, key, k_n, inside, D, BD, True, UPCAST)
    values = _tile(v + b * v_b + g * v_h, key, v_n, inside, E, BE, True, UPCAST)
    dk_acc = tl.zeros([BN, BD], tl.float32)
    dv_acc = tl.zeros([BN, BE], tl.float32)
    for member in range(GROUP):
        h = g * GROUP + member
        bh = b * G * GROUP + h
        q_base = q + b * q_b + h * q_h
        g_base = grad + b * g_b + h * g_h
        for r in range(first, stop, BM):
            row = r + tl.arange(0, BM)
            seen = (row[:, None] >= key[None, :]) & inside[None, :]
            dk_acc, dv_acc = _add_rows(
                q_base, g_base, q_n, g_n, lse + bh * N, delta + bh * N, row, row < stop, seen,
                keys, values, dk_acc, dv_acc, factor, D, E, BD, BE, UPCAST, PREC,
            )  # fmt: skip
        if P > 0:
            low = tl.load(ends + bh * (NB + 1) + block)
            count = (tl.load(ends + bh * (NB + 1) + block + 1) - low).to(tl.int32)
            for r in range(0, count, BM):
                at = r + tl.arange(0, BM)
                live = at < count
                row = tl.load(slots + low + at, mask=live, other=0) // P
                dk_acc, dv_acc = _add_rows(
                    q_base, g_base, q_n, g_n, lse + bh * N, delta + bh * N, row, live,
                    inside[None, :],
                    keys, values, dk_acc, dv_acc, factor, D, E, BD, BE, UPCAST, PREC,
                )  # fmt: skip
    _put(dk + bg * N * D, key, D, inside, dk_acc * scale, D, BD)
    _put(dv + bg * N * E, key, E, inside, dv_acc, E, BE)


@triton.jit(do_not_specialize=_ANY)
def chosen_backward(
    grad, q, k, v, lse, delta, part, slots, ends, tile_block, tile_end, starts,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    factor, scale, N, T, NB,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of some gathered rows through the block they chose: a partial one per slot."""
    pid = tl.program_id(0) % T
    bh = (tl.program_id(0) // T).to(tl.int64)
    block, slot, row, live = _gathered(slots, ends, tile_block, tile_end, pid, bh, T, NB, P, BM)
    if block >= NB:
        return
    b, h = bh // H, bh % H
    g = h // GROUP
    start = tl.load(starts + block)
    k_base = k + b * k_b + g * k_h
    v_base = v + b * v_b + g * v_h
    rows = _tile(q + b * q_b + h * q_h, row, q_n, live, D, BD, True, UPCAST)
    grads = _tile(grad + b * g_b + h * g_h, row, g_n, live, E, BE, True, UPCAST)
    logs = tl.load(lse + bh * N + row, mask=live, other=float("inf"))
    products = tl.load(delta + bh * N + row, mask=live, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    for j in range(0, BLOCK, BN):
        key = j + tl.arange(0, BN)
        inside = key < BLOCK
        keys = _tile(k_base, start + key, k_n, inside, D, BD, BLOCK % BN != 0, UPCAST)
        values = _tile(v_base, start + key, v_n, inside, E, BE, BLOCK % BN != 0, UPCAST)
        _, ds = _weigh(
            rows, keys, values, grads, logs, products, inside[None, :], factor,
            BLOCK % BN != 0, PREC,
        )  # fmt: skip
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PREC, out_dtype=tl.float32)
    _put(part + bh * N * P * D, slot, D, live, acc * scale, D, BD)


@triton.jit(do_not_specialize=_ANY)
def own_backward(
    grad, q, k, v, lse, delta, part, chosen, begins, index, dq,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    factor, scale, N, T,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of some neighbouring rows through their own blocks, and those in their slots."""
    r0 = (tl.program_id(0) % T) * BM
    bh = (tl.program_id(0) // T).to(tl.int64)
    b, h = bh // H, bh % H
    g = h // GROUP
    row = r0 + tl.arange(0, BM)
    live = row < N
    begin = tl.load(begins + row, mask=live, other=N)
    k_base = k + b * k_b + g * k_h
    v_base = v + b * v_b + g * v_h
    rows = _tile(q + b * q_b + h * q_h, row, q_n, live, D, BD, True, UPCAST)
    grads = _tile(grad + b * g_b + h * g_h, row, g_n, live, E, BE, True, UPCAST)
    logs = tl.load(lse + bh * N + row, mask=live, other=float("inf"))
    products = tl.load(delta + bh * N + row, mask=live, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    for j in range(tl.load(begins + r0), tl.minimum(r0 + BM, N), BN):
        key = j + tl.arange(0, BN)
        keys = _tile(k_base, key, k_n, key < N, D, BD, True, UPCAST)
        values = _tile(v_base, key, v_n, key < N, E, BE, True, UPCAST)
        seen = (key[None, :] <= row[:, None]) & (key[None, :] >= begin[:, None])
        _, ds = _weigh(rows, keys, values, grads, logs, products, seen, factor, True, PREC)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PREC, out_dtype=tl.float32)
    acc = acc * scale
    if P > 0:
        own = tl.load(index + row, mask=live, other=0)
        for rank in range(P):
            slot = bh * N * P + row.to(tl.int64) * P + rank
            past = tl.load(chosen + slot, mask=live, other=-1)
            full = (past >= 0) & (past < own)
            acc += _tile(part, slot, D, full, D, BD, True, UPCAST).to(tl.float32)
    _put(dq + bh * N * D, row, D, live, acc, D, BD)
