"""Boxes of tokens for neighborhood attention: windows, their inverse, tiles that cover them.

Everything is counted in coordinates of a residue class: on an axis of X tokens with dilation d the
tokens g, g + d, g + 2 d, .. form class g, of length ceil((X - g) / d), and tokens of different
classes never meet. First and last key of a window never fall as the query's coordinate rises, on
every axis and by every rule. So the keys that a box of queries sees, the keys that each of them
sees, and the queries that see a box of keys are boxes too, and two corners tell them.

Inside kernels, places are tuples of three; shorter grids have leading axes of one token.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

Three = tuple[int, int, int]


class Rule(NamedTuple):
    """Who meets whom, and the boxes that are visited; compiled into the kernels.

    Args:
        kernel: Keys W of a window on each axis.
        dilation: Distance of neighbors.
        stride: Queries that share a window.
        causal: Axes on which no query sees ahead.
        clip: Windows are cut at the border instead of shifted.
        axes: Axes that have more than one token; the last ones.
        rows: Sides of a box of queries, powers of two.
        keys: Sides of a box of keys.
        full: Whether a box of keys can lie inside the windows of all queries of a box.
    """

    kernel: Three
    dilation: Three
    stride: Three
    causal: tuple[bool, bool, bool]
    clip: bool
    axes: int
    rows: Three = (1, 1, 1)
    keys: Three = (1, 1, 1)
    full: bool = True


@triton.jit
def window(i, length, RULE: tl.constexpr, A: tl.constexpr):
    """First and last key that query i sees on axis A."""
    W: tl.constexpr = RULE.kernel[A]
    S: tl.constexpr = RULE.stride[A]
    leader = i
    if RULE.causal[A]:
        if S > 1:
            leader = tl.minimum(i // S * S + S - 1, length - 1)
        first = tl.maximum(leader - (W - 1), 0)
        last = i
    elif RULE.clip:
        first = tl.maximum(i - W // 2, 0)
        last = tl.minimum(i + W // 2, length - 1)
    else:
        if S > 1:
            leader = tl.minimum(i // S * S + S // 2, length - 1)
        # An even window reaches one key further back than ahead.
        centre = tl.minimum(tl.maximum(leader, W // 2), length - 1 - (W - 1) // 2)
        first = centre - W // 2
        last = centre + (W - 1) // 2
    return first, last


@triton.jit
def first_query(j, length, RULE: tl.constexpr, A: tl.constexpr):
    """First query on axis A whose window reaches key j or beyond."""
    W: tl.constexpr = RULE.kernel[A]
    S: tl.constexpr = RULE.stride[A]
    if RULE.causal[A]:
        i = j
    elif RULE.clip:
        i = tl.maximum(j - W // 2, 0)
    else:
        leader = j - (W - 1) // 2  # the least one that sees j
        i = tl.maximum(leader, 0)
        if S > 1:
            i = tl.maximum(leader - S // 2 + S - 1, 0) // S * S
        i = tl.where(leader <= W // 2, 0, i)  # windows at the border are shifted
    return i


@triton.jit
def last_query(j, length, RULE: tl.constexpr, A: tl.constexpr):
    """Last query on axis A whose window begins at key j or before."""
    W: tl.constexpr = RULE.kernel[A]
    S: tl.constexpr = RULE.stride[A]
    if RULE.causal[A]:
        i = j + W - 1
        if S > 1:
            i = tl.where(i >= length - 1, i, (j + W) // S * S - 1)
    elif RULE.clip:
        i = j + W // 2
    else:
        leader = j + W // 2  # the greatest one that sees j
        i = leader
        if S > 1:
            i = (leader - S // 2) // S * S + S - 1
        i = tl.where(leader >= length - 1 - (W - 1) // 2, length - 1, i)
    return tl.minimum(i, length - 1)


@triton.jit
def cover(first, last, inner_first, inner_last, SIDE: tl.constexpr):
    """Tiles from `first` to `last`: (`first`, how many, the first full one, how many are full).

    Full tiles lie between `inner_first` and `inner_last`.
    """
    count = tl.maximum(last - first + SIDE, 0) // SIDE
    skip = tl.maximum(inner_first - first + SIDE - 1, 0) // SIDE
    full = tl.maximum(tl.maximum(inner_last - first + 1, 0) // SIDE - skip, 0)
    return first, count, skip, full


@triton.jit
def keys_of(corner, length, RULE: tl.constexpr, A: tl.constexpr):
    """Tiles of keys that are seen by a box of queries, on axis A, as in `cover`."""
    if A + RULE.axes < 3:
        return 0, 1, 0, 1
    last = tl.minimum(corner[A] + RULE.rows[A], length[A]) - 1
    outer_first, inner_last = window(corner[A], length[A], RULE, A)
    inner_first, outer_last = window(last, length[A], RULE, A)
    return cover(outer_first, outer_last, inner_first, inner_last, RULE.keys[A])


@triton.jit
def queries_of(corner, length, RULE: tl.constexpr, A: tl.constexpr):
    """Tiles of queries that see into a box of keys, on axis A, as in `cover`."""
    if A + RULE.axes < 3:
        return 0, 1, 0, 1
    first, last = corner[A], tl.minimum(corner[A] + RULE.keys[A], length[A]) - 1
    outer_first = first_query(first, length[A], RULE, A)
    outer_last = last_query(last, length[A], RULE, A)
    inner_first = first_query(last, length[A], RULE, A)
    inner_last = last_query(first, length[A], RULE, A)
    return cover(outer_first, outer_last, inner_first, inner_last, RULE.rows[A])


@triton.jit
def full_tile(t, a, b, c, RULE: tl.constexpr):
    """Number of tile t among the full ones, on each axis; a, b, c as in `cover`."""
    if RULE.axes == 1:
        return 0, 0, c[2] + t
    return a[2] + t // (b[3] * c[3]), b[2] + t // c[3] % b[3], c[2] + t % c[3]


@triton.jit
def other_tile(t, a, b, c, RULE: tl.constexpr):
    """Number of tile t among the ones that are not full, on each axis; a, b, c as in `cover`.

    First come the planes that miss the box of full tiles, then of the other planes the lines that
    miss it, then the ends of the lines that cross it.
    """
    if RULE.axes == 1:
        p, q, r = 0, 0, t
        if RULE.full:
            r = t + tl.where(t >= c[2], c[3], 0)
    elif not RULE.full:
        p, q, r = t // (b[1] * c[1]), t // c[1] % b[1], t % c[1]
    else:
        planes = (a[1] - a[3]) * b[1] * c[1]
        lines = a[3] * (b[1] - b[3]) * c[1]
        p0, q0, r0 = t // (b[1] * c[1]), t // c[1] % b[1], t % c[1]
        p0 += tl.where(p0 >= a[2], a[3], 0)
        # A part may be empty where t is in another one, so divisors are at least one.
        t1 = t - planes
        across = tl.maximum(b[1] - b[3], 1)
        p1, q1, r1 = a[2] + t1 // (across * c[1]), t1 // c[1] % across, t1 % c[1]
        q1 += tl.where(q1 >= b[2], b[3], 0)
        t2 = t1 - lines
        ends = tl.maximum(c[1] - c[3], 1)
        inside = tl.maximum(b[3], 1)
        p2, q2, r2 = a[2] + t2 // (ends * inside), b[2] + t2 // ends % inside, t2 % ends
        r2 += tl.where(r2 >= c[2], c[3], 0)
        p = tl.where(t < planes, p0, tl.where(t1 < lines, p1, p2))
        q = tl.where(t < planes, q0, tl.where(t1 < lines, q1, q2))
        r = tl.where(t < planes, r0, tl.where(t1 < lines, r1, r2))
    return p, q, r


@triton.jit
def pop_axis(number, size, BOX: tl.constexpr, RULE: tl.constexpr, A: tl.constexpr):
    """Take the box on axis A from its number: (what remains, class, its length, corner)."""
    if A + RULE.axes < 3:
        return number, 0, 1, 0
    D: tl.constexpr = RULE.dilation[A]
    SIDE: tl.constexpr = BOX[A]
    boxes = ((size + D - 1) // D + SIDE - 1) // SIDE
    u = number % (boxes * D)
    g = u // boxes
    return number // (boxes * D), g, (size - g + D - 1) // D, u % boxes * SIDE


@triton.jit
def locate(number, shape, BOX: tl.constexpr, RULE: tl.constexpr):
    """The box of a program: (number of sample and head, classes, lengths, corner, inside).

    Classes are of unequal length where a dilation does not divide an axis: `inside` is False for
    the boxes that only longer classes have.
    """
    number, g2, l2, c2 = pop_axis(number, shape[2], BOX, RULE, 2)
    number, g1, l1, c1 = pop_axis(number, shape[1], BOX, RULE, 1)
    number, g0, l0, c0 = pop_axis(number, shape[0], BOX, RULE, 0)
    inside = c2 < l2
    if RULE.axes > 1:
        inside = inside & (c1 < l1)
    if RULE.axes > 2:
        inside = inside & (c0 < l0)
    return number, (g0, g1, g2), (l0, l1, l2), (c0, c1, c2), inside


@triton.jit
def tokens(corner, classes, shape, length, BOX: tl.constexpr, RULE: tl.constexpr):
    """Tokens of a box, last axis fastest: (coordinates, numbers in the grid, which ones exist).

    The numbers are int64, since they are multiplied by strides.
    """
    r = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    x, y, z = corner
    z += r % BOX[2]
    token = (z * RULE.dilation[2] + classes[2]).to(tl.int64)
    exist = z < length[2]
    if RULE.axes > 1:
        y += r // BOX[2] % BOX[1]
        token += (y * RULE.dilation[1] + classes[1]).to(tl.int64) * shape[2]
        exist = exist & (y < length[1])
    if RULE.axes > 2:
        x += r // (BOX[1] * BOX[2])
        token += (x * RULE.dilation[0] + classes[0]).to(tl.int64) * shape[1] * shape[2]
        exist = exist & (x < length[0])
    return (x, y, z), token, exist


@triton.jit
def box(number, first, classes, shape, length, BOX: tl.constexpr, RULE: tl.constexpr):
    """`tokens` of the box that stands so many boxes after `first` on each axis."""
    x, y, z = number
    corner = first[0] + x * BOX[0], first[1] + y * BOX[1], first[2] + z * BOX[2]
    return tokens(corner, classes, shape, length, BOX, RULE)


@triton.jit
def meet(row, key, length, TURNED: tl.constexpr, RULE: tl.constexpr):
    """Which queries see which keys, (queries, keys), TURNED (keys, queries)."""
    for A in tl.static_range(2, 2 - RULE.axes, -1):
        first, last = window(row[A], length[A], RULE, A)
        if TURNED:
            near = (key[A][:, None] >= first[None, :]) & (key[A][:, None] <= last[None, :])
        else:
            near = (key[A][None, :] >= first[:, None]) & (key[A][None, :] <= last[:, None])
        if A == 2:  # noqa: SIM108 (there is no mask yet for the other branch to name)
            mask = near
        else:
            mask = mask & near
    return mask


@triton.jit
def load(
    x, token, stride, exist, FULL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of tokens, (tokens, BLOCK), zeros where they do not exist; FULL says that all do."""
    column = tl.arange(0, BLOCK)[None, :]
    where = x + token[:, None] * stride + column
    if FULL and WIDTH == BLOCK:
        tile = tl.load(where)
    elif FULL:
        tile = tl.load(where, mask=column < WIDTH, other=0.0)
    else:
        tile = tl.load(where, mask=exist[:, None] & (column < WIDTH), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store(x, token, stride, exist, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the rows that exist of a tile, (tokens, BLOCK)."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = exist[:, None] & (column < WIDTH)
    tl.store(x + token[:, None] * stride + column, tile.to(x.dtype.element_ty), mask=mask)


def widths(rule: Rule) -> list[int]:
    """Most keys of a window on each axis."""
    centred = (rule.clip and not causal for causal in rule.causal)
    return [w // 2 * 2 + 1 if c else w for w, c in zip(rule.kernel, centred, strict=True)]


def count_tiles(shape: tuple[int, ...], rule: Rule, box: Three) -> int:
    """Boxes that cover the grid, in every residue class."""
    each = zip(shape, rule.dilation, box, strict=True)
    return math.prod(triton.cdiv(triton.cdiv(x, d), side) * d for x, d, side in each)


@lru_cache
def count_pairs(shape: tuple[int, ...], rule: Rule) -> int:
    """Pairs of a query and a key that meet."""

    def one_axis(a: int) -> int:
        w, d, s, total = rule.kernel[a], rule.dilation[a], rule.stride[a], 0
        for g in range(min(d, shape[a])):
            length = triton.cdiv(shape[a] - g, d)
            if rule.causal[a]:
                leaders = [min(i // s * s + s - 1, length - 1) for i in range(length)]
                total += sum(i - max(0, e - w + 1) + 1 for i, e in enumerate(leaders))
            elif rule.clip:
                ends = (min(i + w // 2, length - 1) for i in range(length))
                total += sum(e - max(0, i - w // 2) + 1 for i, e in enumerate(ends))
            else:
                total += length * w
        return total

    return math.prod(one_axis(a) for a in range(3))


@lru_cache
def with_boxes(shape: tuple[int, ...], rule: Rule, rows: int, keys: int) -> Rule:
    """The rule with those boxes of so many queries and keys that visit the fewest pairs.

    Args:
        shape: Tokens of the grid, three numbers.
        rule: Its boxes are ignored.
        rows: Queries of a box, a power of two.
        keys: Keys of a box, a power of two.
    """
    width = widths(rule)

    def cost(a: int, side: int, other: int) -> int:
        length = triton.cdiv(shape[a], rule.dilation[a])
        shared = rule.stride[a] if side % rule.stride[a] == 0 else 1
        seen = min(width[a] + side - shared, length)
        return triton.cdiv(length, side) * side * triton.cdiv(seen, other) * other

    def boxes(volume: int) -> list[Three]:
        powers = [1 << e for e in range(volume.bit_length())]
        every = [(a, b, volume // (a * b)) for a in powers for b in powers if a * b <= volume]
        return [box for box in every if all(side == 1 for side in box[: 3 - rule.axes])]

    def order(choice: tuple[Three, Three]) -> tuple[int, int, int]:
        pairs = math.prod(cost(a, choice[0][a], choice[1][a]) for a in range(3))
        return pairs, -choice[1][2], -choice[0][2]  # of equals, lines that are long in memory

    best = min(((r, k) for r in boxes(rows) for k in boxes(keys)), key=order)
    full = all(side <= most for side, most in zip(best[1], width, strict=True))
    return rule._replace(rows=best[0], keys=best[1], full=full)
