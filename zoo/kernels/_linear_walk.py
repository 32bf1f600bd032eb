"""The walk over chunks that all of linear attention comes down to; see `zoo.kernels.linear`.

Arguments of kernels and of their helpers come in tuples:

    rows                 (address, strides of sample, head and token); inside, (address, stride)
    state                (address, strides of its two axes)
    cut                  (bounds of pieces or None, tokens, pieces, tokens of a piece)
    WIDTHS               (X, Y, powers of two that hold X and a tile of Y), for states (X, Y)
    HOW                  (tokens of a chunk, whether to upcast, precision of products)

A piece is the part of a sequence that a program walks. Rows are counted within it; what lies beyond
its last token is loaded as zeros and never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(x, first, count, column, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """Addresses of a tile from row `first` and `column` on, and which of them exist.

    The 64-bit part of an address is one number for the tile, which spares registers.
    """
    base, stride = x
    row = tl.arange(0, SHAPE[0])
    columns = column + tl.arange(0, SHAPE[1])
    at = base + first * stride + (row[:, None] * stride + columns[None, :])
    return at, (row < count)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _load(x, first, count, column, WIDTH: tl.constexpr, SHAPE: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of `count` rows, zeros beyond them and beyond WIDTH columns."""
    at, there = _place(x, first, count, column, WIDTH, SHAPE)
    tile = tl.load(at, mask=there, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _dot(x, y, acc, PREC: tl.constexpr):
    return tl.dot(x, y, acc=acc, input_precision=PREC, out_dtype=tl.float32)


@triton.jit
def _tile_of(state, tile, X: tl.constexpr, Y: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr):
    """Addresses of a tile of a state, (BX, BY), and which of them exist."""
    base, stride_x, stride_y = state
    x = tl.arange(0, BX)
    y = tile * BY + tl.arange(0, BY)
    at = base + x[:, None] * stride_x + y[None, :] * stride_y
    return at, (x < X)[:, None] & (y < Y)[None, :]


@triton.jit
def _rate(log_decay, h):
    """Base-2 logarithm of a head's decay, finite so that no token times it is 0 and not NaN."""
    return tl.maximum(tl.load(log_decay + h) * 1.4426950408889634, -1e6)


@triton.jit
def _span(cut, p):
    """Sample, first token and end of piece p."""
    bounds, length, pieces, piece = cut
    if bounds is not None:
        sample = p * 0
        start = tl.load(bounds + 2 * p)
        stop = tl.load(bounds + 2 * p + 1)
    else:
        sample = p // pieces
        start = p % pieces * piece
        stop = tl.minimum(start + piece, length)
    return sample, start, stop


@triton.jit
def _walk(
    a, b, c, o, before, after, start, stop, rate, tile, add,
    WIDTHS: tl.constexpr, REVERSE: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Walk tokens start .. stop of one head for one tile of the columns of c and o.

    Args:
        a: Rows, (N, X); None makes no outputs.
        b: Rows, (N, X).
        c: Rows, (N, Y).
        o: Rows that outputs go to, (N, Y), or None.
        before: State to start from, or None for zeros.
        after: Where the state at the end goes, or None.
        start: First token.
        stop: End of the tokens.
        rate: Base-2 logarithm of the decay, or None.
        tile: Tile of the columns of c and o.
        add: Whether outputs are added to what o holds, or None for never.
        WIDTHS: X, Y and the powers of two that hold X and a tile of Y.
        REVERSE: Row i sees rows j >= i, from the last chunk to the first.
        HOW: Tokens of a chunk, whether to upcast, precision of products.
    """
    X: tl.constexpr = WIDTHS[0]
    Y: tl.constexpr = WIDTHS[1]
    BX: tl.constexpr = WIDTHS[2]
    BY: tl.constexpr = WIDTHS[3]
    CHUNK: tl.constexpr = HOW[0]
    UPCAST: tl.constexpr = HOW[1]
    PREC: tl.constexpr = HOW[2]
    row = tl.arange(0, CHUNK)
    if before is not None:
        slot, held = _tile_of(before, tile, X, Y, BX, BY)
        state = tl.load(slot, mask=held, other=0.0)
    else:
        state = tl.zeros((BX, BY), dtype=tl.float32)
    gap = row[:, None] - row[None, :]
    if REVERSE:
        gap = -gap
    if rate is not None:
        pairs = tl.where(gap >= 0, tl.exp2(tl.abs(gap).to(tl.float32) * rate), 0.0)
    chunks = tl.cdiv(stop - start, CHUNK)
    for i in range(0, chunks):
        first = start + (chunks - 1 - i if REVERSE else i) * CHUNK
        count = tl.minimum(stop - first, CHUNK).to(tl.int32)
        b_tile = _load(b, first, count, 0, X, (CHUNK, BX), UPCAST)
        c_tile = _load(c, first, count, tile * BY, Y, (CHUNK, BY), UPCAST)
        if rate is not None:
            # How far rows are from the state before the chunk, and from the one after it; rows
            # beyond the last token are zeros, whose weight only must not overflow.
            since = (row + 1).to(tl.float32)
            until = tl.maximum(count - 1 - row, 0).to(tl.float32)
        if a is not None:
            a_tile = _load(a, first, count, 0, X, (CHUNK, BX), UPCAST)
            y = tl.zeros((CHUNK, BY), dtype=tl.float32)
            y = _dot(a_tile, state.to(a_tile.dtype), y, PREC)
            scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
            scores = _dot(a_tile, tl.trans(b_tile), scores, PREC)
            if rate is not None:
                y = y * tl.exp2((until if REVERSE else since) * rate)[:, None]
                scores = scores * pairs
            else:
                scores = tl.where(gap >= 0, scores, 0.0)
            y = _dot(scores.to(c_tile.dtype), c_tile, y, PREC)
            at, there = _place(o, first, count, tile * BY, Y, (CHUNK, BY))
            if add is not None:
                y += tl.load(at, mask=there & add, other=0.0)
            tl.store(at, y, mask=there)
        if rate is not None:
            weight = tl.exp2((since if REVERSE else until) * rate)
            b_tile = (b_tile.to(tl.float32) * weight[:, None]).to(c_tile.dtype)
            state = state * tl.exp2(count.to(tl.float32) * rate)
        state = _dot(tl.trans(b_tile), c_tile, state, PREC)
    if after is not None:
        slot, held = _tile_of(after, tile, X, Y, BX, BY)
        tl.store(slot, state, mask=held)


@triton.jit
def _rows(x, sample, h):
    """Address of one head's rows, and their stride."""
    return x[0] + sample * x[1] + h * x[2], x[3]


@triton.jit
def walk_kernel(
    a, b, c, o, before, after, log_decay, cut, heads,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, REVERSE: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Outputs of one piece, head and tile; without a and o only the sum of the piece."""
    X: tl.constexpr = WIDTHS[0]
    Y: tl.constexpr = WIDTHS[1]
    tiles: tl.constexpr = (Y + WIDTHS[3] - 1) // WIDTHS[3]
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % tiles).to(tl.int32)
    h = pid // tiles % heads
    p = pid // tiles // heads
    sample, start, stop = _span(cut, p)
    rate = None
    if log_decay is not None:
        rate = _rate(log_decay, h)
    if a is not None:
        a = _rows(a, sample, h)
        o = _rows(o, sample, h)
    at = (p * heads + h) * X * Y
    if before is not None:
        before = (before + at, Y, 1)
    if after is not None:
        after = (after + at, Y, 1)
    b = _rows(b, sample, h // GROUP)
    c = _rows(c, sample, h // GROUP)
    _walk(a, b, c, o, before, after, start, stop, rate, tile, None, WIDTHS, REVERSE, HOW)


@triton.jit
def scan_kernel(
    sums, before, after, log_decay, cut, firsts, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace the sum of each piece of a sequence by the state that the piece starts from."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    there = at < SIZE
    h = pid // blocks % heads
    s = pid // blocks // heads
    if firsts is not None:
        begin = tl.load(firsts + s)
        end = tl.load(firsts + s + 1)
    else:
        begin = s * cut[2]
        end = begin + cut[2]
    if before is not None:
        state = tl.load(before + (s * heads + h) * SIZE + at, mask=there, other=0.0)
    else:
        state = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, end - begin):
        p = end - 1 - i if REVERSE else begin + i
        place = sums + (p * heads + h) * SIZE + at
        own = tl.load(place, mask=there, other=0.0)
        tl.store(place, state, mask=there)
        if log_decay is not None:
            _, start, stop = _span(cut, p)
            state = state * tl.exp2((stop - start).to(tl.float32) * _rate(log_decay, h))
        state += own
    tl.store(after + (s * heads + h) * SIZE + at, state, mask=there)


@triton.jit
def grad_kernel(
    q, k, v, do, dq, dk, dv, past, future, after, log_decay, cut, groups,
    OVER_E: tl.constexpr, OVER_D: tl.constexpr, GROUP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """One piece, group and tile of dv or dk, or one tile of dq for one of the group's heads.

    `past` are the states before the pieces, `future` the gradients of the states after them, and
    the gradients of the former go to `after`; each may be None. OVER_E are the WIDTHS of a walk
    whose tiles are columns of v, OVER_D those of one whose tiles are columns of q and k.
    """
    D: tl.constexpr = OVER_E[0]
    E: tl.constexpr = OVER_E[1]
    e_tiles: tl.constexpr = (E + OVER_E[3] - 1) // OVER_E[3]
    d_tiles: tl.constexpr = (D + OVER_D[3] - 1) // OVER_D[3]
    # Programs of the same tokens and of the heads of a group are neighbours: they share reads.
    units: tl.constexpr = e_tiles + d_tiles + GROUP * d_tiles
    pid = tl.program_id(0).to(tl.int64)
    unit = (pid % units).to(tl.int32)
    g = pid // units % groups
    p = pid // units // groups
    sample, start, stop = _span(cut, p)
    k_g = _rows(k, sample, g)
    v_g = _rows(v, sample, g)
    if unit < e_tiles + d_tiles:
        for i in range(0, GROUP):
            h = g * GROUP + i
            at = (p * groups * GROUP + h) * D * E
            q_h = _rows(q, sample, h)
            do_h = _rows(do, sample, h)
            rate = None
            if log_decay is not None:
                rate = _rate(log_decay, h)
            add = None
            if GROUP > 1:
                add = i > 0
            later = None
            earlier = None
            # The state of a head is (D, E) in memory; dk, and dq, walk with its transpose.
            if unit < e_tiles:
                if future is not None:
                    later = (future + at, E, 1)
                if after is not None:
                    earlier = (after + at, E, 1)
                dv_g = _rows(dv, sample, g)
                _walk(
                    k_g, q_h, do_h, dv_g, later, earlier, start, stop, rate, unit, add,
                    OVER_E, True, HOW,
                )  # fmt: skip
            else:
                if future is not None:
                    later = (future + at, 1, E)
                dk_g = _rows(dk, sample, g)
                _walk(
                    v_g, do_h, q_h, dk_g, later, None, start, stop, rate, unit - e_tiles, add,
                    OVER_D, True, HOW,
                )  # fmt: skip
            if GROUP > 1:
                tl.debug_barrier()  # the next head adds to what other threads have stored
    else:
        rest = unit - e_tiles - d_tiles
        h = g * GROUP + rest // d_tiles
        rate = None
        if log_decay is not None:
            rate = _rate(log_decay, h)
        earlier = None
        if past is not None:
            earlier = (past + (p * groups * GROUP + h) * D * E, 1, E)
        do_h = _rows(do, sample, h)
        dq_h = _rows(dq, sample, h)
        _walk(
            do_h, v_g, k_g, dq_h, earlier, None, start, stop, rate, rest % d_tiles, None,
            OVER_D, False, HOW,
        )  # fmt: skip
