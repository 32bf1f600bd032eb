"""Softmax attention within windows on a grid, by blocks of queries and the halo of their keys.

A window is a product of intervals, one for each axis of the grid, and the bounds of an interval
never move backwards from one query to the next. So the queries of a block see no key outside one
box, the halo: a matrix product with all keys of the box wastes some pairs and saves everything else.

The first axis is cut into blocks whose keys are slices: nothing is copied for it. Each further axis
is cut into tiles, and the keys are laid out once as strips, the tile's share of the axis with its
halo; a block of a strip is a slice again. Scores live in two buffers that stay in the cache. Saved
for the backward pass: q, k, v, the outputs and one number a query.

Used by `zoo.select.neighborhood` and `zoo.select.sliding_window`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import full_precision, repeat_heads

LOG2_E = math.log2(math.e)
# Pairs whose scores are computed at once, in elements of a buffer: two of them stay in the cache.
BUDGET = 2**19
# What a block of queries is chosen by, in units of the time of one pair of D = 64: a step of the
# loop, a copied key, and the rows below which matrix products get slow.
STEP, COPIED, SLIM = 15_000, 12, 24
FIRST, FURTHER = (4, 8, 16, 32, 64, 128, 256), (4, 8, 16, 32)


@dataclass(frozen=True)
class Window:
    """Keys that a query sees along one axis: an interval around its leader.

    Queries of a group of `stride` share a leader: the last one where the axis is causal, the middle
    one otherwise.

    Args:
        back: Keys before the leader.
        ahead: Keys behind it.
        stride: Queries of a group.
        causal: No key behind the query itself.
        shift: Near a border the interval is moved inwards, so that it keeps its length; otherwise
            it is cut off.
    """

    back: int
    ahead: int
    stride: int = 1
    causal: bool = False
    shift: bool = True

    @property
    def width(self) -> int:
        """Keys of a whole window."""
        return self.back + self.ahead + 1

    def bounds(self, index: Tensor, size: Tensor | int) -> tuple[Tensor, Tensor]:
        """First key seen and first key no more seen, by the queries at `index`.

        Args:
            index: Coordinates, int64 of any shape.
            size: Length of the axis, or lengths that broadcast to `index`.
        """
        lead = index
        if self.stride > 1:
            middle = self.stride - 1 if self.causal else self.stride // 2
            lead = torch.clamp(index // self.stride * self.stride + middle, max=size - 1)
        first = lead - self.back
        if self.shift:
            first = torch.clamp(first, max=size - self.width)
        first = torch.clamp(first, min=0)
        stop = first + self.width if self.shift else lead + self.ahead + 1
        stop = torch.clamp(stop, max=size)
        return first, torch.minimum(stop, index + 1) if self.causal else stop

    def allowed(self, index: Tensor, keys: Tensor, size: Tensor | int) -> Tensor:
        """Whether queries at `index` see `keys`, which broadcast against each other."""
        first, stop = self.bounds(index, size)
        return (first <= keys) & (keys < stop)


class Block(NamedTuple):
    """Some rows of a strip and the keys of their halo.

    Args:
        rows: Queries of the strip.
        keys: Keys of the strip.
        mask: 0 where a pair may meet and -inf where not, (1 or strips, R, K).
    """

    rows: slice
    keys: slice
    mask: Tensor


class Tile(NamedTuple):
    """A tile of a further axis: its queries, and its halo of keys."""

    rows: slice
    keys: slice


class Plan(NamedTuple):
    """How a grid is cut.

    Args:
        shape: The grid.
        strips: A tile of each further axis, for each strip.
        rows: Queries of a tile along each further axis; the last tile may be shorter.
        keys: Keys of a halo along each further axis.
        blocks: Blocks of the first axis.
    """

    shape: tuple[int, ...]
    strips: tuple[tuple[Tile, ...], ...]
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def copies(self) -> bool:
        """The grid has more than one axis: strips have to be laid out."""
        return len(self.shape) > 1


def _cost(
    shape: tuple[int, ...], windows: tuple[Window, ...], sizes: tuple[int, ...], batch: int
) -> float:
    """Rough time of a pass whose blocks have these sizes."""
    tiles = [-(-n // t) for n, t in zip(shape, sizes, strict=True)]
    halos = [min(n, t + w.width - 1) for n, t, w in zip(shape, sizes, windows, strict=True)]
    rows, keys = math.prod(sizes), math.prod(halos)
    copied = batch * shape[0] * math.prod(tiles[1:]) * math.prod(halos[1:]) if shape[1:] else 0
    pairs = batch * math.prod(tiles) * rows * keys
    steps = max(tiles[0], pairs / BUDGET)
    return pairs * (1 + SLIM / rows) + copied * COPIED + steps * STEP


def _axis(size: int, tile: int, window: Window) -> tuple[list[Tile], int, Tensor]:
    """Cut a further axis: its tiles, their keys, and who sees whom, (tiles, rows, keys)."""
    index = torch.arange(size)
    first, stop = window.bounds(index, size)
    starts = range(0, size, tile)
    ends = [min(s + tile, size) for s in starts]
    wide = max(int(stop[e - 1] - first[s]) for s, e in zip(starts, ends, strict=True))
    tiles, seen = [], torch.ones(len(ends), tile, wide, dtype=torch.bool)
    for n, (s, e) in enumerate(zip(starts, ends, strict=True)):
        left = min(int(first[s]), size - wide)
        tiles.append(Tile(slice(s, e), slice(left, left + wide)))
        # Rows that fill up the last tile see everything, and nothing comes of it.
        seen[n, : e - s] = window.allowed(index[s:e, None], index[left : left + wide], size)
    return tiles, wide, seen


@lru_cache(maxsize=32)
def make_plan(
    shape: tuple[int, ...],
    windows: tuple[Window, ...],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...] | None = None,
) -> Plan:
    """Cut a grid into blocks.

    Args:
        shape: Lengths of its axes, at least 1.
        windows: The window of each axis.
        batch: Heads of all samples.
        dtype: Of the scores.
        device: Where the masks go.
        sizes: Queries of a block along each axis; default by a rough estimate of the time.
    """
    with torch.no_grad():
        if sizes is None:
            choices = [[t for t in FURTHER if t == FURTHER[0] or t < 2 * n] for n in shape[1:]]
            every = itertools.product(FIRST, *choices)
            sizes = min(every, key=lambda one: _cost(shape, windows, one, batch))
        axes = [
            _axis(n, min(n, t), w)
            for n, t, w in zip(shape[1:], sizes[1:], windows[1:], strict=True)
        ]
        strips = tuple(itertools.product(*(tiles for tiles, _, _ in axes)))
        # Pairs along the further axes, (strips, rows, keys).
        across = torch.ones(1, 1, 1, dtype=torch.bool)
        for _, _, seen in axes:
            across = across[:, None, :, None, :, None] & seen[None, :, None, :, None, :]
            across = across.flatten(0, 1).flatten(1, 2).flatten(2, 3)
        if bool((across == across[:1]).all()):
            across = across[:1]
        high, wide = across.shape[1:]
        blocks, known = [], dict[tuple[Any, ...], Tensor]()
        index = torch.arange(shape[0])
        first, stop = windows[0].bounds(index, shape[0])
        for s in range(0, shape[0], sizes[0]):
            e = min(s + sizes[0], shape[0])
            left, right = int(first[s]), int(stop[e - 1])
            # Blocks that see the same relative to themselves share a mask.
            key = (e - s, right - left, *(first[s:e] - left).tolist(), *(stop[s:e] - left).tolist())
            if key not in known:
                along = windows[0].allowed(index[s:e, None], index[left:right], shape[0])
                seen = along[:, None, :, None] & across[:, None, :, None]
                seen = seen.flatten(1, 2).flatten(2, 3)
                mask = torch.zeros(seen.shape, dtype=dtype)
                known[key] = mask.masked_fill_(~seen, -torch.inf).to(device)
            rows, keys = slice(s * high, e * high), slice(left * wide, right * wide)
            blocks.append(Block(rows, keys, known[key]))
        tile_rows = tuple(seen.shape[1] for _, _, seen in axes)
        tile_keys = tuple(wide for _, wide, _ in axes)
    return Plan(shape, strips, tile_rows, tile_keys, tuple(blocks))


class _Room:
    """Memory for strips, used again for one lot of heads after the other.

    A grid of one axis needs none: its strips are the tensors themselves.

    Args:
        plan: How the grid is cut.
        keys: Strips of keys, not of queries.
        like: What is laid out, (P, S, D); P heads at a time at most.
        lot: Heads at a time.
    """

    def __init__(self, plan: Plan, keys: bool, like: Tensor, lot: int) -> None:
        self.plan, self.keys = plan, keys
        self.sizes = plan.keys if keys else plan.rows
        if plan.copies:
            shape = (lot, len(plan.strips), plan.shape[0], *self.sizes, like.shape[2])
            # Rows that fill up a last tile are zeros, so that nothing comes of them.
            self.memory = like.new_zeros(shape)

    def _pairs(self, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A tile of the grid (P, S, D) and its place in the memory, for each strip."""
        x = grid.unflatten(1, self.plan.shape)
        for n, strip in enumerate(self.plan.strips):
            tile = x[:, :, *(cut.keys if self.keys else cut.rows for cut in strip)]
            room = self.memory[: len(x), n]
            yield tile, room[:, :, *(slice(0, size) for size in tile.shape[2:-1])]

    def flat(self, heads: int) -> Tensor:
        """Strips of so many heads, (heads strips, rows or keys of a strip, D)."""
        return self.memory[:heads].flatten(2, -2).flatten(0, 1)

    def load(self, x: Tensor) -> Tensor:
        """Lay (P, S, D) out as strips."""
        if not self.plan.copies:
            return x
        for tile, room in self._pairs(x):
            room.copy_(tile)
        return self.flat(len(x))

    def blank(self, target: Tensor) -> Tensor:
        """Strips to add to or to fill in, for `target` (P, S, D), which is zero."""
        if not self.plan.copies:
            return target
        if self.keys:
            self.memory[: len(target)].zero_()
        return self.flat(len(target))

    def store(self, target: Tensor) -> None:
        """Bring what `blank` gave back to `target`: several strips may add to one key."""
        if not self.plan.copies:
            return
        for tile, room in self._pairs(target):
            if self.keys:
                tile += room
            else:
                tile.copy_(room)


class _Pass:
    """What the forward and the backward pass over the blocks have in common.

    Args:
        plan: How the grid is cut.
        q: Queries, (P, S, D).
        scale: Factor on the scores.
        hidden: -inf at hidden keys and 0 elsewhere, (P, S), or None.
        dropout: On the weights.
        seed: Of the numbers for dropout.
    """

    def __init__(
        self,
        plan: Plan,
        q: Tensor,
        scale: float,
        hidden: Tensor | None,
        dropout: float,
        seed: int,
    ) -> None:
        self.plan, self.q, self.hidden, self.dropout = plan, q, hidden, dropout
        # 2^x is faster than e^x on a CPU, so scores are counted in base 2.
        self.factor = scale * LOG2_E
        self.generator = torch.Generator(q.device)
        self.generator.manual_seed(seed)
        self.pairs = max(math.prod(block.mask.shape[1:]) for block in plan.blocks)
        strips = len(plan.strips)
        self.lot = max(1, min(len(q), BUDGET // (self.pairs * strips)))
        # Strips of a single head at a time where even those are too many.
        self.many = self.lot * strips if self.lot > 1 else max(1, min(strips, BUDGET // self.pairs))
        self.spare: dict[int, Tensor] = {}

    def room(self, like: Tensor, keys: bool) -> _Room:
        """Memory for a lot of strips."""
        return _Room(self.plan, keys, like, self.lot)

    def lots(self) -> Iterator[slice]:
        """Some heads at a time."""
        for p in range(0, len(self.q), self.lot):
            yield slice(p, min(p + self.lot, len(self.q)))

    def shares(self, total: int) -> Iterator[tuple[slice, Block, Tensor]]:
        """Some of `total` strips, a block, and its mask for these strips."""
        strips = len(self.plan.strips)
        for block in self.plan.blocks:
            for c in range(0, total, self.many):
                share = slice(c, min(c + self.many, total))
                whole = block.mask.shape[0] == 1 or self.many >= strips
                yield share, block, block.mask if whole else block.mask[share]

    def buffer(self, index: int, *shape: int) -> Tensor:
        """Memory of this number in this shape, with anything in it."""
        size = math.prod(shape)
        held = self.spare.get(index)
        if held is None or held.numel() < size:
            held = self.spare[index] = self.q.new_empty(size)
        return held[:size].view(shape)

    def product(self, index: int, a: Tensor, b: Tensor) -> Tensor:
        """Batched matrix product in the memory of this number."""
        return torch.bmm(a, b, out=self.buffer(index, a.shape[0], a.shape[1], b.shape[2]))

    def start(
        self, tile: Tensor, mask: Tensor, hidden: Tensor | None, logs: Tensor | None
    ) -> None:
        """Fill a tile with -inf at hidden pairs, elsewhere with minus the logarithms of the sums.

        Args:
            tile: (strips, R, K).
            mask: (1 or strips of a head, R, K).
            hidden: Of the keys, (strips, K), or None.
            logs: Of the rows, (strips, R, 1), or None.
        """
        view = tile.view(-1, *mask.shape)
        if logs is None:
            view.copy_(mask)
        else:
            torch.sub(mask, logs.unflatten(0, (-1, mask.shape[0])), out=view)
        if hidden is not None:
            tile.add_(hidden[:, None])

    def kept(self, index: int, tile: Tensor) -> Tensor:
        """Weights that dropout leaves, with their factor, the same in both passes."""
        keep = self.buffer(index, *tile.shape).bernoulli_(
            1 - self.dropout, generator=self.generator
        )
        return keep.div_(1 - self.dropout)


def _forward(work: _Pass, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (P, S, E) and base-2 logarithms of the sums (P, S, 1), +inf for rows without keys."""
    q = work.q
    out, logs = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(*q.shape[:2], 1)
    rooms = [work.room(x, keys) for x, keys in ((q, False), (k, True), (v, True))]
    places = [work.room(x, False) for x in (out, logs)]
    masks = None if work.hidden is None else work.room(work.hidden[..., None], True)
    # A score is at most |q| |k|. While that is small, its power needs no maximum subtracted first;
    # half of the exponent's range stays free for the sums.
    longest = abs(work.factor) * q.norm(dim=-1).amax() * k.norm(dim=-1).amax()
    safe = bool(longest <= math.log2(torch.finfo(q.dtype).max) / 2)
    for lot in work.lots():
        rows, keys, values = (room.load(x[lot]) for room, x in zip(rooms, (q, k, v), strict=True))
        y, sums = (place.blank(x[lot]) for place, x in zip(places, (out, logs), strict=True))
        far = None
        if masks is not None and work.hidden is not None:
            far = masks.load(work.hidden[lot, :, None])[..., 0]
        for share, block, mask in work.shares(len(rows)):
            s = work.buffer(0, share.stop - share.start, *mask.shape[1:])
            work.start(s, mask, None if far is None else far[share, block.keys], None)
            s.baddbmm_(rows[share, block.rows], keys[share, block.keys].mT, alpha=work.factor)
            top = None
            if not safe:
                top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
                s.sub_(top)
            total = s.exp2_().sum(-1, keepdim=True)
            empty = None
            if far is not None:
                empty = total == 0
                total.masked_fill_(empty, 1.0)
            if work.dropout:
                s.mul_(work.kept(1, s))
            sums_here, part = sums[share, block.rows], y[share, block.rows]
            torch.div(work.product(2, s, values[share, block.keys]), total, out=part)
            torch.log2(total, out=sums_here)
            if top is not None:
                sums_here += top
            if empty is not None:
                sums_here.masked_fill_(empty, torch.inf)
        for place, x in zip(places, (out, logs), strict=True):
            place.store(x[lot])
    return out, logs


def _backward(
    work: _Pass, k: Tensor, v: Tensor, logs: Tensor, delta: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q = work.q
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    given = ((q, False), (k, True), (v, True), (grad, False), (logs, False), (delta, False))
    rooms = [(work.room(x, keys), x) for x, keys in given]
    made = [(work.room(x, keys), x) for x, keys in ((dq, False), (dk, True), (dv, True))]
    masks = None if work.hidden is None else work.room(work.hidden[..., None], True)
    for lot in work.lots():
        rows, keys, values, g, sums, means = (room.load(x[lot]) for room, x in rooms)
        drows, dkeys, dvalues = (room.blank(x[lot]) for room, x in made)
        far = None
        if masks is not None and work.hidden is not None:
            far = masks.load(work.hidden[lot, :, None])[..., 0]
        for share, block, mask in work.shares(len(rows)):
            shape = (share.stop - share.start, *mask.shape[1:])
            p, ds = work.buffer(0, *shape), work.buffer(1, *shape)
            here, there = (share, block.rows), (share, block.keys)
            work.start(p, mask, None if far is None else far[there], sums[here])
            p.baddbmm_(rows[here], keys[there].mT, alpha=work.factor).exp2_()
            torch.bmm(g[here], values[there].mT, out=ds)
            weights = p
            if work.dropout:
                kept = work.kept(2, p)
                ds.mul_(kept)
                weights = kept.mul_(p)
            dvalues[there] += work.product(3, weights.mT, g[here])
            ds.sub_(means[here]).mul_(p)
            dkeys[there] += work.product(3, ds.mT, rows[here])
            drows[here] = work.product(3, ds, keys[there])
        for room, x in made:
            room.store(x[lot])
    return dq.mul_(scale), dk.mul_(scale), dv


def _plain(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in operations that can be differentiated any number of times."""
    q, k, v = _cut_plain(q, plan, False), _cut_plain(k, plan, True), _cut_plain(v, plan, True)
    outs, logs = [], []
    for block in plan.blocks:
        s = (q[:, block.rows] @ k[:, block.keys].mT) * scale
        s = (s.unflatten(0, (-1, block.mask.shape[0])) + block.mask).flatten(0, 1)
        if hidden is not None:
            far = _cut_plain(hidden[..., None], plan, True)
            s = s + far[:, None, block.keys, 0]
        empty = (s == -torch.inf).all(-1, keepdim=True)
        lse = s.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
        outs.append((s - lse).exp().masked_fill(empty, 0.0) @ v[:, block.keys])
        logs.append(lse.masked_fill(empty, -torch.inf))
    return _join_plain(torch.cat(outs, 1), plan), _join_plain(torch.cat(logs, 1), plan)


def _cut_plain(x: Tensor, plan: Plan, keys: bool) -> Tensor:
    """As `_cut`, out of place."""
    if not plan.copies:
        return x
    grid = x.unflatten(1, plan.shape)
    sizes = plan.keys if keys else plan.rows
    parts = []
    for strip in plan.strips:
        part = grid[:, :, *(tile.keys if keys else tile.rows for tile in strip)]
        room: list[int] = [0, 0]
        for size, have in zip(reversed(sizes), reversed(part.shape[2:-1]), strict=True):
            room += [0, size - have]
        parts.append(torch.nn.functional.pad(part, room).flatten(1, -2))
    return torch.stack(parts, 1).flatten(0, 1)


def _join_plain(strips: Tensor, plan: Plan) -> Tensor:
    """As `_join` for queries, out of place."""
    if not plan.copies:
        return strips
    parts = strips.view(-1, len(plan.strips), plan.shape[0], *plan.rows, strips.shape[-1])
    index = torch.arange(1, 1 + math.prod(plan.shape)).view(1, -1, 1)
    order = _Room(plan, False, index, 1).load(index).view(-1)  # 0 in rows that fill up a tile
    place = torch.zeros(len(order) + 1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    return parts.flatten(1, -2).index_select(1, place[1 : index.numel() + 1].to(strips.device))


class _Halo(torch.autograd.Function):
    """Attention within windows with its own backward; nothing of size N x window is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        plan: Plan,
        scale: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (P, S, E) and natural logarithms of the sums (P, S, 1), -inf without keys."""
        seed = int(torch.randint(2**62, ())) if dropout else 0
        with full_precision(q):
            out, logs = _forward(_Pass(plan, q, scale, hidden, dropout, seed), k, v)
        ctx.save_for_backward(q, k, v, hidden, out, logs)
        ctx.plan, ctx.scale, ctx.dropout, ctx.seed = plan, scale, dropout, seed
        ctx.set_materialize_grads(False)
        lse = (logs / LOG2_E).masked_fill_(logs == torch.inf, -torch.inf)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, from those of both outputs."""
        q, k, v, hidden, out, logs = ctx.saved_tensors
        plan, nothing = ctx.plan, (None,) * 4
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            return (*_Halo._again(ctx, grads), *nothing)
        grad, of_lse = grads
        if grad is None:
            grad = torch.zeros_like(out)
        with full_precision(q):
            delta = (grad * out).sum(-1, keepdim=True)
            if of_lse is not None:
                delta = delta - of_lse
            work = _Pass(plan, q, ctx.scale, hidden, ctx.dropout, ctx.seed)
            back = _backward(work, k, v, logs, delta, grad.contiguous(), ctx.scale)
        needed = ctx.needs_input_grad
        return (*(d if want else None for d, want in zip(back, needed, strict=False)), *nothing)

    @staticmethod
    def _again(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients that can be differentiated once more."""
        if ctx.dropout:
            raise ZooError("a second derivative through windows with dropout is not possible")
        q, k, v, hidden, _, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with full_precision(q):
            outs = _plain(q, k, v, hidden, ctx.plan, ctx.scale)
        chosen = [(y, g) for y, g in zip(outs, grads, strict=True) if g is not None]
        wanted = [x for x, want in zip((q, k, v), needed, strict=True) if want]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in chosen], wanted, [g for _, g in chosen], create_graph=True
            )
        )
        return [next(found) if want else None for want in needed]


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    windows: Sequence[Window],
    *,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    sizes: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax self-attention within windows on a grid.

    Args:
        q: (B, H, S, D), the grid flattened row by row.
        k: (B, G, S, D), G dividing H.
        v: (B, G, S, E).
        shape: Lengths of the axes, whose product is S.
        windows: The window of each axis.
        scale: Factor on dot products.
        mask: Keys not hidden, (B|1, S) boolean, or None.
        dropout: On the weights.
        sizes: Queries of a block along each axis; default by size.

    Returns:
        Outputs (B, H, S, E) in the type of v, zero for rows without keys, and the natural
        logarithms of the rows' sums (B, H, S), at least float32, -inf for rows without keys.
    """
    samples, heads, length = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    if not q.numel() or not v.numel():
        nothing = (q.sum() + k.sum() + v.sum()).to(wide)  # an empty sum that hangs on all three
        out = nothing.to(v.dtype).expand(*q.shape[:3], v.shape[3])
        return out, nothing.expand(q.shape[:3])
    dtype = v.dtype
    flat = [x.to(wide).flatten(0, 1).contiguous() for x in (q, k, v)]
    hidden = None
    if mask is not None:
        hidden = q.new_zeros(samples, length, dtype=wide)
        hidden = hidden.masked_fill(~mask, -torch.inf).repeat_interleave(heads, 0)
    plan = make_plan(
        tuple(shape), tuple(windows), samples * heads, wide, q.device, sizes
    )
    out, lse = _Halo.apply(*flat, hidden, plan, scale, dropout)
    return out.unflatten(0, (samples, heads)).to(dtype), lse.view(samples, heads, length)
