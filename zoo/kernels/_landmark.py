"""The Triton kernels of Landmark attention; `zoo.kernels.landmark` says what they compute.

A tile of keys is the ordinary tokens of one group, so the inner softmax is complete within a tile;
nothing of it is stored, the backward passes compute it again. With w = p_i,landmark(t),
d_j = do_i . v_j and c = sum_j r_j d_j, the gradient of an inner score is w r_j (d_j - c) and that
of the landmark's score is w (c - do_i . o_i). Scores and their logarithms are to base 2.
"""

# Without `from __future__ import annotations`: Triton reads the annotations of constants.
import triton
import triton.language as tl


@triton.jit
def _place(places, tiles, length, VARLEN: tl.constexpr):
    """Sample, first token and length of the sequence, and this program's tile within it."""
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    start = b * 0
    count = length
    if VARLEN:
        row = places + 3 * tile
        start = tl.load(row).to(tl.int64)
        count = tl.load(row + 1)
        tile = tl.load(row + 2)
    return b, start, count, tile


@triton.jit
def _base(x, step, b, h, start):
    return x + b * step[0] + h * step[1] + start * step[2]


@triton.jit
def _load(x, i, step, ok, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows i of a matrix, zeros where they are not ok."""
    column = tl.arange(0, PADDED)
    place = x + i.to(tl.int64)[:, None] * step + column[None, :]
    tile = tl.load(place, mask=ok[:, None] & (column < WIDTH)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _keys(x, i, step, ok, HEAD: tl.constexpr):
    """Rows as wide as queries and keys."""
    return _load(x, i, step, ok, HEAD.d, HEAD.block_d, HEAD.upcast)


@triton.jit
def _values(x, i, step, ok, HEAD: tl.constexpr):
    """Rows as wide as values and outputs."""
    return _load(x, i, step, ok, HEAD.e, HEAD.block_e, HEAD.upcast)


@triton.jit
def _marks(k, t, end, step, BLOCK: tl.constexpr, MARKS: tl.constexpr, HEAD: tl.constexpr):
    """Keys of the landmarks of the groups t, ..., t + MARKS - 1, zeros from group `end` on."""
    group = t + tl.arange(0, MARKS)
    return _keys(k, group * (BLOCK + 1) + BLOCK, step, group < end, HEAD)


@triton.jit
def _store(tile, x, i, step, ok, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    place = x + i.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(place, tile.to(x.dtype.element_ty), mask=ok[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _product(a, b, PREC: tl.constexpr):
    zeros = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    return tl.dot(a, b, zeros, input_precision=PREC)


@triton.jit
def _seen(i, n, t, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rows after group t, and which of its ordinary tokens each row sees."""
    past = i // GROUP > t
    own = (i // GROUP == t)[:, None] & (n[None, :] <= (i % GROUP)[:, None])
    exists = (n < BLOCK) & (t * GROUP + n < count)
    return past, (past[:, None] | own) & exists[None, :]


@triton.jit
def _queries(Q, q_step, K, k_step, V, v_step, b, h, rep, start, i, count, HEAD: tl.constexpr):
    """Some queries of a head, and the addresses of the keys and values that they meet."""
    k_at = _base(K, k_step, b, h // rep, start)
    v_at = _base(V, v_step, b, h // rep, start)
    q = _keys(_base(Q, q_step, b, h, start), i, q_step[2], i < count, HEAD)
    return q, k_at, v_at


@triton.jit
def _own(
    q, k, k_at, k_row, seen, past, t, count, scale,
    BLOCK: tl.constexpr, MARKS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Group t for rows in it and after it: exponentials, their sums, the landmark, its scores.

    Rows within the group have no landmark: the largest of their scores stands in its place.
    """
    PREC: tl.constexpr = HEAD.precision
    s = tl.where(seen, _product(q, tl.trans(k), PREC) * scale, float("-inf"))
    inner = tl.maximum(tl.max(s, 1), -1e30)
    e = tl.exp2(s - inner[:, None])
    mass = tl.sum(e, 1)
    end = tl.minimum(t + 1, count // (BLOCK + 1))
    mark = _marks(k_at, t, end, k_row, BLOCK, MARKS, HEAD)
    score = tl.sum(_product(q, tl.trans(mark), PREC), 1) * scale
    return e, mass, mark, tl.where(past, score, inner)


@triton.jit
def forward(
    Q, q_step, K, k_step, V, v_step, OUT, o_step, LSE, places, tiles, length, rep, scale,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MARKS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Outputs of BM queries and the log2-sum-exp2 of their outer softmax; scale has log2(e)."""
    GROUP: tl.constexpr = BLOCK + 1
    PREC: tl.constexpr = HEAD.precision
    b, start, count, tile = _place(places, tiles, length, VARLEN)
    if not VARLEN:
        tile = tiles - 1 - tile  # the longest rows first
    if tile * BM >= count:
        return
    h = tl.program_id(1).to(tl.int64)
    i = tile * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    column = tl.arange(0, MARKS)
    q, k_at, v_at = _queries(Q, q_step, K, k_step, V, v_step, b, h, rep, start, i, count, HEAD)
    lowest = tile * BM // GROUP
    highest = (tl.minimum(tile * BM + BM, count) - 1) // GROUP

    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, HEAD.block_e], tl.float32)
    # Groups before the first row's: all rows see their landmarks, MARKS of which make one product.
    for first in range(0, lowest, MARKS):
        marks = _marks(k_at, first, lowest, k_step[2], BLOCK, MARKS, HEAD)
        scores = _product(q, tl.trans(marks), PREC) * scale
        scores = tl.where((first + column < lowest)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new)
        outer = tl.exp2(scores - new[:, None])
        total = total * shrink + tl.sum(outer, 1)
        acc = acc * shrink[:, None]
        top = new
        for t in range(first, tl.minimum(first + MARKS, lowest)):
            k = _keys(k_at, t * GROUP + n, k_step[2], n < BLOCK, HEAD)
            s = _product(q, tl.trans(k), PREC) * scale
            s = tl.where((n < BLOCK)[None, :], s, float("-inf"))
            e = tl.exp2(s - tl.max(s, 1)[:, None])
            w = tl.sum(tl.where((column == t - first)[None, :], outer, 0.0), 1) / tl.sum(e, 1)
            v = _values(v_at, t * GROUP + n, v_step[2], n < BLOCK, HEAD)
            acc = tl.dot((e * w[:, None]).to(v.dtype), v, acc, input_precision=PREC)
    # The rows' own groups: later rows see only the landmark, earlier ones nothing.
    for t in range(lowest, highest + 1):
        j = t * GROUP + n
        past, seen = _seen(i, n, t, count, GROUP, BLOCK)
        there = (n < BLOCK) & (j < count)
        k = _keys(k_at, j, k_step[2], there, HEAD)
        e, mass, _, score = _own(
            q, k, k_at, k_step[2], seen, past, t, count, scale, BLOCK, MARKS, HEAD
        )
        new = tl.maximum(top, score)
        shrink = tl.exp2(top - new)
        outer = tl.exp2(score - new)
        total = total * shrink + outer * tl.where(past, 1.0, mass)
        w = outer / tl.where(past, mass, 1.0)
        v = _values(v_at, j, v_step[2], there, HEAD)
        acc = acc * shrink[:, None]
        acc = tl.dot((e * w[:, None]).to(v.dtype), v, acc, input_precision=PREC)
        top = new
    out_at = _base(OUT, o_step, b, h, start)
    _store(acc / total[:, None], out_at, i, o_step[2], i < count, HEAD.e, HEAD.block_e)
    line = LSE + (b * tl.num_programs(1) + h) * length + start
    tl.store(line + i, top + tl.log2(total), mask=i < count)


@triton.jit
def _earlier(s, dp, mark, lse, delta):
    """Weights of an earlier group's tokens, gradients of their scores and of the landmark's."""
    e = tl.exp2(s - tl.max(s, 1)[:, None])
    r = e / tl.sum(e, 1)[:, None]
    met = tl.sum(r * dp, 1)
    w = tl.exp2(mark - lse)
    p = r * w[:, None]
    return p, p * (dp - met[:, None]), w * (met - delta)


@triton.jit
def backward_q(
    Q, q_step, K, k_step, V, v_step, OUT, o_step, GRAD, g_step, DQ, dq_step, LSE, DELTA,
    places, tiles, length, rep, scale, natural,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MARKS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Gradients of BM queries, and their rows' sums of output times gradient for backward_k."""
    GROUP: tl.constexpr = BLOCK + 1
    PREC: tl.constexpr = HEAD.precision
    b, start, count, tile = _place(places, tiles, length, VARLEN)
    if not VARLEN:
        tile = tiles - 1 - tile
    if tile * BM >= count:
        return
    h = tl.program_id(1).to(tl.int64)
    i = tile * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    column = tl.arange(0, MARKS)
    q, k_at, v_at = _queries(Q, q_step, K, k_step, V, v_step, b, h, rep, start, i, count, HEAD)
    do = _values(_base(GRAD, g_step, b, h, start), i, g_step[2], i < count, HEAD)
    out = _values(_base(OUT, o_step, b, h, start), i, o_step[2], i < count, HEAD)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    line = (b * tl.num_programs(1) + h) * length + start
    tl.store(DELTA + line + i, delta, mask=i < count)
    lse = tl.load(LSE + line + i, mask=i < count, other=0.0)
    lowest = tile * BM // GROUP
    highest = (tl.minimum(tile * BM + BM, count) - 1) // GROUP

    dq = tl.zeros([BM, HEAD.block_d], tl.float32)
    for first in range(0, lowest, MARKS):
        marks = _marks(k_at, first, lowest, k_step[2], BLOCK, MARKS, HEAD)
        scores = _product(q, tl.trans(marks), PREC) * scale
        dscores = tl.zeros([BM, MARKS], tl.float32)
        for t in range(first, tl.minimum(first + MARKS, lowest)):
            k = _keys(k_at, t * GROUP + n, k_step[2], n < BLOCK, HEAD)
            v = _values(v_at, t * GROUP + n, v_step[2], n < BLOCK, HEAD)
            s = _product(q, tl.trans(k), PREC) * scale
            s = tl.where((n < BLOCK)[None, :], s, float("-inf"))
            here = (column == t - first)[None, :]
            mark = tl.sum(tl.where(here, scores, 0.0), 1)
            _, ds, dscore = _earlier(s, _product(do, tl.trans(v), PREC), mark, lse, delta)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)
            dscores = tl.where(here, dscore[:, None], dscores)
        dq = tl.dot(dscores.to(marks.dtype), marks, dq, input_precision=PREC)
    for t in range(lowest, highest + 1):
        j = t * GROUP + n
        past, seen = _seen(i, n, t, count, GROUP, BLOCK)
        there = (n < BLOCK) & (j < count)
        k = _keys(k_at, j, k_step[2], there, HEAD)
        v = _values(v_at, j, v_step[2], there, HEAD)
        e, mass, mark, score = _own(
            q, k, k_at, k_step[2], seen, past, t, count, scale, BLOCK, MARKS, HEAD
        )
        mass = tl.where(past, mass, 1.0)
        w = tl.exp2(score - lse)
        dp = _product(do, tl.trans(v), PREC)
        met = tl.sum(e * dp, 1) / mass
        ds = e * (w / mass)[:, None] * (dp - tl.where(past, met, delta)[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PREC)
        dscore = tl.where(past, w * (met - delta), 0.0)
        dscores = tl.where((column == 0)[None, :], dscore[:, None], 0.0)
        dq = tl.dot(dscores.to(mark.dtype), mark, dq, input_precision=PREC)
    dq_at = _base(DQ, dq_step, b, h, start)
    _store(dq * natural, dq_at, i, dq_step[2], i < count, HEAD.d, HEAD.block_d)


@triton.jit
def _later(q_at, g_at, lse_at, delta_at, q_row, g_row, i, ok, HEAD: tl.constexpr):
    """Some queries of a head, the gradients of their outputs, and two numbers for each."""
    q = _keys(q_at, i, q_row, ok, HEAD)
    do = _values(g_at, i, g_row, ok, HEAD)
    lse = tl.load(lse_at + i, mask=ok, other=0.0)
    delta = tl.load(delta_at + i, mask=ok, other=0.0)
    return q, do, lse, delta


@triton.jit
def backward_k(
    Q, q_step, K, k_step, V, v_step, GRAD, g_step, DK, dk_step, DV, dv_step, LSE, DELTA,
    places, tiles, length, rep, scale, natural,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MARKS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one group, from all query heads that share them."""
    GROUP: tl.constexpr = BLOCK + 1
    PREC: tl.constexpr = HEAD.precision
    b, start, count, t = _place(places, tiles, length, VARLEN)
    if t * GROUP >= count:
        return
    shared = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    j = t * GROUP + n
    there = (n < BLOCK) & (j < count)
    k_at = _base(K, k_step, b, shared, start)
    k = _keys(k_at, j, k_step[2], there, HEAD)
    v = _values(_base(V, v_step, b, shared, start), j, v_step[2], there, HEAD)
    # The landmark is the first row of a tile that is else zero, for the sake of tensor cores.
    end = tl.minimum(t + 1, count // GROUP)
    mark = _marks(k_at, t, end, k_step[2], BLOCK, MARKS, HEAD)
    column = tl.arange(0, MARKS)
    last = t * GROUP + BLOCK
    after = tl.minimum(last + 1, count)

    dk = tl.zeros([BN, HEAD.block_d], tl.float32)
    dv = tl.zeros([BN, HEAD.block_e], tl.float32)
    dmark = tl.zeros([HEAD.block_d, MARKS], tl.float32)
    for member in range(0, rep):
        h = shared * rep + member
        q_at = _base(Q, q_step, b, h, start)
        g_at = _base(GRAD, g_step, b, h, start)
        line = (b * tl.num_programs(1) * rep + h) * length + start
        for first in range(t * GROUP, after, BM):  # the group itself
            i = first + m
            q, do, lse, delta = _later(
                q_at, g_at, LSE + line, DELTA + line, q_step[2], g_step[2], i, i < after, HEAD
            )
            seen = (j[None, :] <= i[:, None]) & there[None, :]
            s = tl.where(seen, _product(q, tl.trans(k), PREC) * scale, float("-inf"))
            p = tl.exp2(s - lse[:, None])
            ds = p * (_product(do, tl.trans(v), PREC) - delta[:, None])
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PREC)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PREC)
        for first in range(after, count, BM):  # what comes after it
            i = first + m
            q, do, lse, delta = _later(
                q_at, g_at, LSE + line, DELTA + line, q_step[2], g_step[2], i, i < count, HEAD
            )
            s = _product(q, tl.trans(k), PREC) * scale
            s = tl.where((n < BLOCK)[None, :], s, float("-inf"))
            score = tl.sum(_product(q, tl.trans(mark), PREC), 1) * scale
            p, ds, dscore = _earlier(s, _product(do, tl.trans(v), PREC), score, lse, delta)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PREC)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PREC)
            dscores = tl.where((column == 0)[None, :], dscore[:, None], 0.0).to(q.dtype)
            dmark = tl.dot(tl.trans(q), dscores, dmark, input_precision=PREC)
    dk_at = _base(DK, dk_step, b, shared, start)
    dv_at = _base(DV, dv_step, b, shared, start)
    _store(dk * natural, dk_at, j, dk_step[2], there, HEAD.d, HEAD.block_d)
    _store(dv, dv_at, j, dv_step[2], there, HEAD.e, HEAD.block_e)
    # The landmark itself, whose value is never used.
    is_last = (n == 0) & (last < count)
    own = tl.sum(dmark, 1)[None, :] + tl.zeros([BN, HEAD.block_d], tl.float32)
    none = tl.zeros([BN, HEAD.block_e], tl.float32)
    _store(own * natural, dk_at, last + n, dk_step[2], is_last, HEAD.d, HEAD.block_d)
    _store(none, dv_at, last + n, dv_step[2], is_last, HEAD.e, HEAD.block_e)
