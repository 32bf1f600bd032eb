"""Softmax attention within windows on a grid, by blocks of queries and the halo of their keys.

A window is a product of intervals, one for each axis of the grid, and the bounds of an interval
never move backwards from one query to the next. So the queries of a block see no key outside one
box, the halo: a product with all keys of the box wastes some pairs and saves everything else.

The first axis is cut into blocks whose keys are slices: nothing is copied for it. Each further axis
is cut into tiles, and the keys are laid out once as strips, the tile's share of the axis with its
halo; a block of a strip is a slice again. Scores live in two buffers that stay in the cache. Saved
for the backward pass: q, k, v, the outputs and one number a query.

Used by `zoo.select.neighborhood` and `zoo.select.sliding_window`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import full_precision, repeat_heads
from zoo.select import _halo_plan
from zoo.select._halo_plan import Block, Plan, Window, make_plan

LOG2_E = math.log2(math.e)


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
        self.lot = max(1, min(len(q), _halo_plan.BUDGET // (self.pairs * strips)))
        # Strips of a single head at a time where even those are too many.
        self.many = (
            self.lot * strips
            if self.lot > 1
            else max(1, min(strips, _halo_plan.BUDGET // self.pairs))
        )
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

    def start(self, tile: Tensor, mask: Tensor, hidden: Tensor | None, logs: Tensor | None) -> None:
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
        pairs = zip(outs, grads, strict=True)
        chosen = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
        wanted = [x for x, want in zip((q, k, v), needed, strict=True) if want]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in chosen],
                wanted,
                [g for _, g in chosen],
                create_graph=True,
                materialize_grads=True,
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
    plan = make_plan(tuple(shape), tuple(windows), samples * heads, wide, q.device, sizes)
    out, lse = _Halo.apply(*flat, hidden, plan, scale, dropout)
    return out.unflatten(0, (samples, heads)).to(dtype), lse.view(samples, heads, length)
