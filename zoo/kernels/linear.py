"""Causal linear attention with a constant decay per head, in chunks (the family of Lightning).

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T           S (B, H, D, E), float32
    o_t = q_t S_t                                      q (B, H, N, D), v (B, G, N, E)

All of it, backward pass included, is one walk over chunks of C tokens with a state in registers:

    o_i = sum_j w_ij (a_i . b_j) c_j                   w_ij = exp(log_decay |i - j|)

    what   a    b    c    pairs      states between chunks
    o      q    k    v    j <= i     S    of the tokens before
    dq     do   v    k    j <= i     S^T
    dv     k    q    do   j >= i     R    R_t = exp(log_decay) R_{t+1} + q_t do_t^T, tokens after
    dk     v    do   q    j >= i     R^T

Pairs inside a chunk go through (C, C) scores, all others through the state. Only exponentials of
numbers up to 0 are taken, of differences of positions within a chunk, so that no decay overflows.

A program walks the tokens for one head and one tile of the columns of c. There are two shapes:

- Whole: every program walks a whole sequence. Each tensor is read once, and no state is written
  but the last. Taken where sequences, heads and tiles make enough programs to fill the device.
- Pieces: sequences are cut into as many pieces as fill it, none shorter than `SHORTEST`. The sums
  k v^T of all pieces come first, in parallel; a scan over the pieces turns them into the states
  before each; then all pieces are walked in parallel. k and v are read twice, and D x E numbers for
  each piece go out and in twice.

The op is bound by memory: 2 C D + 4 D^2 operations are some 80 for each byte at D = 128.
The gradients of all three inputs come from one launch, in which the programs that read the same
tokens run side by side, so that most of their reads meet in the L2 cache.

float16 is multiplied as TF32: the same 10 bits of mantissa, but states and scores, which nothing
normalises, may outgrow its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.kernels.common import INTERPRET, LEAST, block_d, precision, rows, strides, upcast

# Largest width of a head of q and k, and of v.
WIDEST = 256
# Tokens of a chunk.
CHUNK = 64
# Numbers of the state that a program holds, and columns of a tile.
STATE = 8192
TILE = 128
# Tokens of a piece, at least: a piece costs four passes over a D x E state.
SHORTEST = 256
# Programs for each multiprocessor that fill a card, and for all of the interpreter.
RESIDENT = 2
INTERPRETED = 1


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
        a, b, c, o: Addresses and strides of rows, (N, X), (N, X), (N, Y), (N, Y); without a no
            outputs are made.
        before, after: States (X, Y) to start from and to write: address and two strides, or None.
        rate: Base-2 logarithm of the decay, or None.
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
        at, held = _tile_of(before, tile, X, Y, BX, BY)
        state = tl.load(at, mask=held, other=0.0)
    else:
        state = tl.zeros((BX, BY), dtype=tl.float32)
    gap = row[:, None] - row[None, :]
    if REVERSE:
        gap = -gap
    if rate is not None:
        pairs = tl.where(gap >= 0, tl.exp2(tl.abs(gap).to(tl.float32) * rate), 0.0)
    chunks = tl.cdiv(stop - start, CHUNK)
    for i in range(0, chunks):
        if REVERSE:
            first = start + (chunks - 1 - i) * CHUNK
        else:
            first = start + i * CHUNK
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
        at, held = _tile_of(after, tile, X, Y, BX, BY)
        tl.store(at, state, mask=held)


@triton.jit
def _rows(x, sample, h):
    """Address of one head's rows, and their stride."""
    return x[0] + sample * x[1] + h * x[2], x[3]


@triton.jit
def _walk_kernel(
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
def _scan_kernel(
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
        if REVERSE:
            p = end - 1 - i
        else:
            p = begin + i
        place = sums + (p * heads + h) * SIZE + at
        own = tl.load(place, mask=there, other=0.0)
        tl.store(place, state, mask=there)
        if log_decay is not None:
            sample, start, stop = _span(cut, p)
            state = state * tl.exp2((stop - start).to(tl.float32) * _rate(log_decay, h))
        state += own
    tl.store(after + (s * heads + h) * SIZE + at, state, mask=there)


@triton.jit
def _grad_kernel(
    q, k, v, do, dq, dk, dv, past, future, after, log_decay, cut, groups,
    OVER_E: tl.constexpr, OVER_D: tl.constexpr, GROUP: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """One piece, group and tile of dv or dk, or one tile of dq for one of the group's heads.

    Args:
        past, future: States before the pieces, and gradients of the states after them, or None.
        after: Where the gradient of the state before goes, or None.
        OVER_E: WIDTHS of a walk whose tiles are columns of v.
        OVER_D: WIDTHS of a walk whose tiles are columns of q and k.
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


@dataclass(frozen=True)
class _Cut:
    """How the sequences are cut into pieces.

    Args:
        sequences: Sequences.
        count: Pieces of all of them, those without tokens included.
        whole: Every sequence is one piece.
        length: Tokens of a sequence (of all of them, where they are packed).
        pieces: Pieces of a sequence.
        piece: Tokens of a piece.
        bounds: First token and end of each piece, (count, 2), where sequences are packed.
        firsts: First piece of each sequence, and the end, (sequences + 1,), where they are packed.
    """

    sequences: int
    count: int
    whole: bool
    length: int
    pieces: int
    piece: int
    bounds: Tensor | None = None
    firsts: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What `_span` needs."""
        return self.bounds, self.length, self.pieces, self.piece


def _fill(device: torch.device) -> int:
    """Programs that fill a device."""
    if device.type == "cpu":
        return INTERPRETED
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def _cut(q: Tensor, cu_seqlens: Tensor | None, programs: int) -> _Cut:
    """Cut sequences into pieces where whole ones would leave much of the device idle.

    Args:
        q: (B, H, N, D).
        cu_seqlens: (S + 1,) or None. How long its sequences are is not known without waiting for
            the device, so pieces are as long as if there were only one.
        programs: Programs for each piece.
    """
    samples, length = q.shape[0], q.shape[2]
    pieces = min(_fill(q.device) // (samples * programs), length // SHORTEST)
    whole = pieces <= 1
    piece = length if whole else triton.cdiv(triton.cdiv(length, pieces), CHUNK) * CHUNK
    pieces = triton.cdiv(length, piece)
    if cu_seqlens is None:
        return _Cut(samples, samples * pieces, whole, length, pieces, piece)
    cu = cu_seqlens.long()
    sequences = cu.shape[0] - 1
    if whole:
        bounds = torch.stack([cu[:-1], cu[1:]], 1)
        return _Cut(sequences, sequences, whole, length, 1, piece, bounds)
    firsts = torch.zeros_like(cu)
    torch.cumsum((cu.diff() + piece - 1) // piece, 0, out=firsts[1:])
    # There cannot be more pieces than this; the spare ones start at or after their end.
    count = length // piece + sequences
    p = torch.arange(count, device=cu.device)
    s = torch.searchsorted(firsts[1:], p, right=True).clamp_(max=sequences - 1)
    start = cu[s] + (p - firsts[s]) * piece
    bounds = torch.stack([start, torch.minimum(start + piece, cu[s + 1])], 1)
    return _Cut(sequences, count, whole, length, pieces, piece, bounds, firsts)


def _how(q: Tensor, width: int) -> tuple[int, bool, str]:
    """Tokens of a chunk, whether to upcast, and the precision of products."""
    half = q.dtype == torch.float16
    prec = "tf32" if half else precision(q)
    exact = prec == "ieee" and q.dtype == torch.float32
    # Wide rows in chunks as long do not fit into shared memory; products in full float32 do not run
    # on tensor cores, and long ones drown in registers.
    chunk = CHUNK // 2 if width > 128 or exact else CHUNK
    chunk = min(chunk, max(LEAST, triton.next_power_of_2(q.shape[2])))
    return chunk, half or upcast(q), prec


def _widths(q: Tensor, x: int, y: int) -> tuple[int, int, int, int]:
    """WIDTHS of a walk with states (x, y)."""
    block = block_d(x)
    state = STATE if q.dtype == torch.bfloat16 else STATE // 2  # others are multiplied as float32
    return x, y, block, min(block_d(y), max(LEAST, min(TILE, state // block)))


def _tiles(widths: tuple[int, ...]) -> int:
    return triton.cdiv(widths[1], widths[3])


def _options(q: Tensor, d: int, e: int) -> dict[str, int]:
    """Warps and stages of a launch, by what fits into registers and shared memory."""
    half = q.element_size() == 2
    narrow = half and max(d, e) <= 64 and d % 8 == e % 8 == 0
    return {"num_warps": 4 if narrow else 8, "num_stages": 2 if half else 1}


def _given(x: Tensor) -> tuple[Any, ...]:
    """A tensor (B, H, N, D) as kernels take it."""
    return (x, *strides(x))


def _states(
    b: Tensor,
    c: Tensor,
    before: Tensor | None,
    log_decay: Tensor | None,
    heads: int,
    cut: _Cut,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States that the pieces start from, (pieces, H, D, E), and those at the end."""
    d, e = b.shape[3], c.shape[3]
    widths = _widths(b, d, e)
    states = b.new_empty(cut.count, heads, d, e, dtype=torch.float32)
    after = b.new_empty(cut.sequences, heads, d, e, dtype=torch.float32)
    _walk_kernel[(cut.count * heads * _tiles(widths),)](
        None, _given(b), _given(c), None, None, states, log_decay, cut.arguments, heads,
        widths, heads // b.shape[1], reverse, _how(b, max(d, e)), **_options(b, d, e),
    )  # fmt: skip
    block = 1024
    _scan_kernel[(cut.sequences * heads * triton.cdiv(d * e, block),)](
        states, before, after, log_decay, cut.arguments, cut.firsts, heads, d * e, block, reverse
    )
    return states, after


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    heads, d, e = q.shape[1], q.shape[3], v.shape[3]
    widths = _widths(q, d, e)
    out = q.new_empty(*q.shape[:3], e)
    cut = _cut(q, cu_seqlens, heads * _tiles(widths))
    before, end = initial_state, None
    if cut.whole:
        end = after = q.new_empty(cut.sequences, heads, d, e, dtype=torch.float32)
    else:
        before, after = _states(k, v, initial_state, log_decay, heads, cut, reverse=False)
    _walk_kernel[(cut.count * heads * _tiles(widths),)](
        _given(q), _given(k), _given(v), _given(out), before, end, log_decay, cut.arguments, heads,
        widths, heads // k.shape[1], False, _how(q, max(d, e)), **_options(q, d, e),
    )  # fmt: skip
    return out, after


def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, groups, d, e = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    group = heads // groups
    over_e, over_d = _widths(q, d, e), _widths(q, e, d)
    units = _tiles(over_e) + (1 + group) * _tiles(over_d)
    cut = _cut(q, cu_seqlens, groups * units)
    past, future, end = initial_state, dstate, None
    if cut.whole:
        end = start = q.new_empty(cut.sequences, heads, d, e, dtype=torch.float32)
    else:
        past, _ = _states(k, v, initial_state, log_decay, heads, cut, reverse=False)
        future, start = _states(q, do, dstate, log_decay, heads, cut, reverse=True)
    dq = q.new_empty(q.shape)
    # Where heads share a group, they add to it one after another, in float32.
    dtype = torch.float32 if group > 1 else q.dtype
    dk, dv = (x.new_empty(x.shape, dtype=dtype) for x in (k, v))
    _grad_kernel[(cut.count * groups * units,)](
        *(_given(x) for x in (q, k, v, do, dq, dk, dv)), past, future, end, log_decay,
        cut.arguments, groups, over_e, over_d, group, _how(q, max(d, e)),
        **_options(q, d, e),
    )  # fmt: skip
    return dq, dk.to(q.dtype), dv.to(q.dtype), start


def _prepare(tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> list[Tensor]:
    """The tensors with contiguous rows.

    Raises:
        ZooError: No kernel can take them, or packed sequences do not cover the tokens.
    """
    reason = refuse(*tensors, head_dim=WIDEST, by_name=True)
    if reason is None and tensors[0].device.type == "cpu" and not INTERPRET:
        reason = "TRITON_INTERPRET was set after the kernels were imported"
    if reason is not None:
        raise ZooError(f"the linear attention kernel cannot run: {reason}")
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":  # elsewhere it would wait
        bounds, length = cu_seqlens.tolist(), tensors[0].shape[2]
        if bounds != sorted(bounds) or bounds[:1] != [0] or bounds[-1] != length:
            raise ZooError(f"cu_seqlens={bounds} must go from 0 to {length} and never fall")
    return [rows(x) for x in tensors]


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _unchanged(state: Tensor | None, q: Tensor, v: Tensor, sequences: int) -> Tensor:
    """A copy of the state (or zeros), which no token has changed."""
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    shape = (sequences, q.shape[1], q.shape[3], v.shape[3])
    return q.new_zeros(shape, dtype=torch.float32)


@torch.library.custom_op("zoo::linear_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _prepare((q, k, v), cu_seqlens)
    if not q.numel():
        state = _unchanged(initial_state, q, v, _sequences(q, cu_seqlens))
        return v.new_empty(*q.shape[:3], v.shape[3]), state
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    with torch.cuda.device_of(q):
        return _forward(q, k, v, log_decay, initial_state, cu_seqlens)


@_linear_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (_sequences(q, cu_seqlens), q.shape[1], q.shape[3], v.shape[3])
    return v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("zoo::linear_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_bwd(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, grad = _prepare((q, k, v, grad), cu_seqlens)
    if not q.numel():
        start = _unchanged(grad_state, q, v, _sequences(q, cu_seqlens))
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), start
    if grad_state is not None:
        grad_state = grad_state.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    with torch.cuda.device_of(q):
        return _backward(grad, grad_state, q, k, v, log_decay, initial_state, cu_seqlens)


@_linear_bwd.register_fake
def _(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (_sequences(q, cu_seqlens), q.shape[1], q.shape[3], v.shape[3])
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, v.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if grad is None:
        grad = v.new_zeros(*q.shape[:3], v.shape[3])
    dq, dk, dv, start = torch.ops.zoo.linear_bwd(
        grad, grad_state, q, k, v, log_decay, initial_state, cu_seqlens
    )
    return dq, dk, dv, None, None if initial_state is None else start, None


def _refuse_second(ctx: Any, *grads: Tensor | None) -> None:
    raise ZooError(
        "the linear attention kernel has no second derivative; backend='reference' or 'torch' has"
    )


_linear_fwd.register_autograd(_differentiate, setup_context=_save)
_linear_bwd.register_autograd(_refuse_second)


def _linear_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Products with states, and the half of each chunk that is seen."""
    tokens, d, e = q[0] * q[1] * q[2], q[3], v[3]
    return tokens * (CHUNK * (d + e) + 4 * d * e)


@register_flop_formula(torch.ops.zoo.linear_fwd)
def _forward_flops(*args: Any, **kwargs: Any) -> int:
    return _linear_flops(*args[:3])


@register_flop_formula(torch.ops.zoo.linear_bwd)
def _backward_flops(grad: Any, state: Any, *args: Any, **kwargs: Any) -> int:
    """Five products in place of two, none of them counted twice."""
    return _linear_flops(*args[:3]) * 5 // 2


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention, ``o_t = q_t S_t`` with ``S_t = exp(log_decay) S_{t-1} + k_t v_t^T``.

    Neither scaled nor normalised; sums are float32. Differentiable once, with respect to q, k, v
    and the initial state, through the outputs and the final state. The same numbers in every run.

    Args:
        q: (B, H, N, D), float16, bfloat16 or float32; D at most 256.
        k: (B, G, N, D), G dividing H; query head h meets key head ``h // (H // G)``.
        v: (B, G, N, E), E at most 256. Rows that start at multiples of 16 bytes are read fastest.
        log_decay: Logarithm of each head's decay, (H,), float32, at most 0; None for no decay.
        initial_state: State before the first token, (B, H, D, E), float32; None for zeros.
        cu_seqlens: Bounds of packed sequences, (S + 1,), int32 or int64, from 0 to N and not
            falling; B is 1 then, and states are (S, H, D, E).

    Returns:
        Outputs (B, H, N, E) of the type of q, and the states after the last tokens, float32.

    Raises:
        ZooError: Shapes or types that do not fit, a decay that wants a gradient, or tensors that a
            Triton kernel cannot take.
    """
    _check(q, k, v, log_decay, initial_state, cu_seqlens)
    return torch.ops.zoo.linear_fwd(q, k, v, log_decay, initial_state, cu_seqlens)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ZooError(f"{name} of shape {tuple(x.shape)} must be (B, heads, N, width)")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or k.shape[:3] != v.shape[:3]:
        raise ZooError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit; "
            "allowed: (B, H, N, D), (B, G, N, D), (B, G, N, E)"
        )
    heads, groups = q.shape[1], k.shape[1]
    if heads % max(groups, 1) or bool(groups) != bool(heads):
        raise ZooError(f"{groups} heads of k must divide the {heads} heads of q")
    if log_decay is not None:
        if log_decay.dtype != torch.float32 or log_decay.shape != (heads,):
            raise ZooError(
                f"log_decay of {log_decay.dtype} and shape {tuple(log_decay.shape)}; allowed: "
                f"torch.float32 and ({heads},)"
            )
        if log_decay.requires_grad and torch.is_grad_enabled():
            raise ZooError("log_decay requires a gradient, which the kernel does not compute")
    if cu_seqlens is not None and (
        cu_seqlens.ndim != 1
        or not cu_seqlens.shape[0]
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or q.shape[0] != 1
    ):
        raise ZooError(
            f"cu_seqlens of {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)} with "
            f"{q.shape[0]} samples; allowed: int32 or int64, (S + 1,), and one sample"
        )
    if initial_state is not None:
        shape = (_sequences(q, cu_seqlens), heads, q.shape[3], v.shape[3])
        if initial_state.dtype != torch.float32 or initial_state.shape != shape:
            raise ZooError(
                f"initial_state of {initial_state.dtype} and shape {tuple(initial_state.shape)}; "
                f"allowed: torch.float32 and {shape}"
            )
    for name, x in (
        ("log_decay", log_decay),
        ("initial_state", initial_state),
        ("cu_seqlens", cu_seqlens),
    ):
        if x is not None and x.device != q.device:
            raise ZooError(f"{name} is on {x.device}, q on {q.device}")
