"""The Triton kernels of MoBA's gate; `zoo.kernels.moba_gate` launches them.

Ranking has to be as float32 ranks, and tensor cores multiply bfloat16 fastest: so every number is
cut into parts of bfloat16 that add up to it, three for the 24 bits of float32, and products of
parts too small to be seen in float32 are left out.
"""

# Triton's compiler knows no starred items.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels._moba import _tile

_ANY = ("N", "NB", "BH", "SHIFT", "BLOCK")
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _first_part(x, UPCAST: tl.constexpr):
    """The nearest bfloat16 numbers, and what they lack."""
    part = x.to(tl.bfloat16)
    wide = part.to(tl.float32)
    return (wide if UPCAST else part), x - wide


@triton.jit(do_not_specialize=_ANY)
def block_means(
    k, means, starts, stops, k_b, k_g, k_n, NB, BLOCK,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mean key of a block in its three parts, (B, G, NB, 3, D) bfloat16."""
    block = tl.program_id(0) % NB
    bg = (tl.program_id(0) // NB).to(tl.int64)
    if PACKED:
        start = tl.load(starts + block)
        stop = tl.load(stops + block)
    else:
        start = block * BLOCK
        stop = start + BLOCK
    base = k + bg // G * k_b + bg % G * k_g
    sums = tl.zeros([BT, BD], tl.float32)
    for j in range(start, stop, BT):
        token = j + tl.arange(0, BT)
        sums += _tile(base, token, k_n, token < stop, D, BD, True, UPCAST).to(tl.float32)
    # Blocks that are short, or not there, cannot be chosen; they only must not divide by zero.
    mean = tl.div_rn(tl.sum(sums, 0), tl.maximum(stop - start, 1).to(tl.float32))
    column = tl.arange(0, BD)
    out = means + (bg * NB + block) * 3 * D + column
    for _ in tl.static_range(3):
        part, mean = _first_part(mean, False)
        tl.store(out, part, mask=column < D)
        out += D


@triton.jit
def _insert(values, picks, value, pick, P: tl.constexpr):
    """Put a number into each row's list, best first, behind its equals; the last one falls out."""
    new_values = ()
    new_picks = ()
    for p in tl.static_range(P):
        better = value > values[p]
        if p == 0:
            new_value, new_pick = value, pick
        else:
            moves = value > values[p - 1]  # then its neighbour moves here
            new_value = tl.where(moves, values[p - 1], value)
            new_pick = tl.where(moves, picks[p - 1], pick)
        new_values = new_values + (tl.where(better, new_value, values[p]),)
        new_picks = new_picks + (tl.where(better, new_pick, picks[p]),)
    return new_values, new_picks


@triton.jit
def _scores(q, means, block, inside, D: tl.constexpr, BD: tl.constexpr,
            TERMS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Products of the parts of rows with those of some mean keys, smallest first."""
    third = tl.trans(_tile(means + 2 * D, block, 3 * D, inside, D, BD, True, UPCAST))
    second = tl.trans(_tile(means + D, block, 3 * D, inside, D, BD, True, UPCAST))
    first = tl.trans(_tile(means, block, 3 * D, inside, D, BD, True, UPCAST))
    s = tl.dot(q[0], third, out_dtype=tl.float32)
    if TERMS > 1:
        s = tl.dot(q[1], second, s, out_dtype=tl.float32)
    if TERMS > 2:
        s = tl.dot(q[2], first, s, out_dtype=tl.float32)
    s = tl.dot(q[0], second, s, out_dtype=tl.float32)
    if TERMS > 1:
        s = tl.dot(q[1], first, s, out_dtype=tl.float32)
    return tl.dot(q[0], first, s, out_dtype=tl.float32)


@triton.jit(do_not_specialize=_ANY)
def choose(
    q, means, numbers, base, out, q_b, q_h, q_n, N, NB, BH, SHIFT, BLOCK,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The best P past blocks of some neighbouring rows of a head."""
    # Later rows have more to look at, so they go first.
    r0 = (tl.num_programs(0) // BH - 1 - tl.program_id(0) // BH) * BM
    bh = (tl.program_id(0) % BH).to(tl.int64)
    b, h = bh // H, bh % H
    row = r0 + tl.arange(0, BM)
    live = row < N
    last = tl.minimum(r0 + BM, N) - 1
    if PACKED:
        start = tl.load(base + row, mask=live, other=0)
        stop = start + tl.load(numbers + row, mask=live, other=0)
        low = tl.load(base + r0)
        high = tl.load(base + last) + tl.load(numbers + last)
    else:
        start = tl.zeros([BM], tl.int32)
        stop = (row + SHIFT) // BLOCK
        low = 0
        high = (last + SHIFT) // BLOCK
    means += (b * (H // GROUP) + h // GROUP) * NB * 3 * D
    rest = _tile(q + b * q_b + h * q_h, row, q_n, live, D, BD, True, False).to(tl.float32)
    parts = ()
    for _ in tl.static_range(TERMS):
        part, rest = _first_part(rest, UPCAST)
        parts = parts + (part,)
    values = ()
    picks = ()
    for _ in tl.static_range(P):
        values = values + (tl.full([BM], -float("inf"), tl.float32),)
        picks = picks + (tl.full([BM], -1, tl.int32),)
    for j in range(low, high, BN):
        block = j + tl.arange(0, BN)
        s = _scores(parts, means, block, block < high, D, BD, TERMS, UPCAST)
        past = (block[None, :] >= start[:, None]) & (block[None, :] < stop[:, None])
        s = tl.where(past, s, -float("inf"))
        top = tl.max(s, 1)
        # At most P rounds, and few where the best ones have been seen.
        while tl.max((top > values[P - 1]).to(tl.int32), 0) > 0:
            at = tl.min(tl.where(s == top[:, None], block[None, :], NONE), 1)
            values, picks = _insert(values, picks, top, at, P)
            s = tl.where(block[None, :] == at[:, None], -float("inf"), s)
            top = tl.max(s, 1)
    out += (bh * N + row) * P
    for p in tl.static_range(P):
        tl.store(out + p, tl.where(picks[p] < 0, -1, picks[p] - start), mask=live)
