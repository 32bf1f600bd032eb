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
from zoo.ops.again import differentiate_again
from zoo.parts import full_precision, repeat_heads
from zoo.select import _halo_plan
from zoo.select._halo_plan import Block, Plan, Window, make_plan
from zoo.select._halo_strips import Room, plain
from zoo.select._halo_table import Table

LOG2_E = math.log2(math.e)
# Matrix products of fewer columns are up to four times as fast the other way round on a CPU, where
# their number is no multiple of 16.
NARROW = 32


class _Pass:
    """What the forward and the backward pass over the blocks have in common.

    Args:
        plan: How the grid is cut.
        q: Queries, (P, S, D).
        scale: Factor on the scores.
        hidden: Added to the scores of keys, -inf at hidden ones, (P, S), or None.
        rpb: Table of relative positions, (H, T), or None; with it the samples of a head follow one
            another among the P.
        dropout: On the weights.
        seed: Of the numbers for dropout.
    """

    def __init__(
        self,
        plan: Plan,
        q: Tensor,
        scale: float,
        hidden: Tensor | None,
        rpb: Tensor | None,
        dropout: float,
        seed: int,
    ) -> None:
        self.plan, self.q, self.dropout = plan, q, dropout
        # 2^x is faster than e^x on a CPU, so scores are counted in base 2.
        self.factor = scale * LOG2_E
        self.hidden = None if hidden is None else hidden * LOG2_E
        self.table = None
        if rpb is not None:
            self.table = Table(rpb * LOG2_E, q.dtype, len(q) // len(rpb))
        self.generator = torch.Generator(q.device)
        self.generator.manual_seed(seed)
        self.pairs = max(math.prod(block.mask.shape[1:]) for block in plan.blocks)
        strips = len(plan.strips)
        most = len(q) if self.table is None else self.table.samples
        self.lot = max(1, min(most, _halo_plan.BUDGET // (self.pairs * strips)))
        # Strips of a single head at a time where even those are too many.
        self.many = (
            self.lot * strips
            if self.lot > 1
            else max(1, min(strips, _halo_plan.BUDGET // self.pairs))
        )
        self.spare: dict[int, Tensor] = {}

    def room(self, like: Tensor, keys: bool) -> Room:
        """Memory for a lot of strips."""
        return Room(self.plan, keys, like, self.lot)

    def lots(self) -> Iterator[slice]:
        """Some heads at a time, with a table samples of one head."""
        most = len(self.q) if self.table is None else self.table.samples
        for first in range(0, len(self.q), most):
            if self.table is not None:
                self.table.turn_to(first // most)
            for p in range(first, first + most, self.lot):
                yield slice(p, min(p + self.lot, first + most))

    def shares(self, total: int) -> Iterator[tuple[slice, Block, Tensor]]:
        """Some of `total` strips, a block, and its mask (with a table its bias) for these."""
        strips = len(self.plan.strips)
        for block in self.plan.blocks:
            mask = block.mask if self.table is None else self.table.bias(block)
            whole = mask.shape[0] == 1 or self.many >= strips
            for c in range(0, total, self.many):
                share = slice(c, min(c + self.many, total))
                yield share, block, mask if whole else mask[share]

    def small(self, k: Tensor) -> bool:
        """Whether powers of all scores are safe without a maximum subtracted first.

        A score is at most |q| |k|, and what is added to it. Half of the exponent's range stays free
        for the sums.
        """
        longest = abs(self.factor) * self.q.norm(dim=-1).amax() * k.norm(dim=-1).amax()
        if self.hidden is not None:
            longest = longest + self.hidden.masked_fill(self.hidden == -torch.inf, 0.0).abs().amax()
        if self.table is not None:
            longest = longest + self.table.entries[:, :-1].abs().amax()
        return bool(longest <= math.log2(torch.finfo(k.dtype).max) / 2)

    def buffer(self, index: int, *shape: int) -> Tensor:
        """Memory of this number in this shape, with anything in it."""
        size = math.prod(shape)
        held = self.spare.get(index)
        if held is None or held.numel() < size:
            held = self.spare[index] = self.q.new_empty(size)
        return held[:size].view(shape)

    def product(self, index: int, a: Tensor, b: Tensor) -> Tensor:
        """Batched matrix product in the memory of this number."""
        if b.shape[2] < NARROW and b.shape[2] % 16:
            out = self.buffer(index, a.shape[0], b.shape[2], a.shape[1])
            return torch.bmm(b.mT, a.mT, out=out).mT
        return torch.bmm(a, b, out=self.buffer(index, a.shape[0], a.shape[1], b.shape[2]))

    def start(self, tile: Tensor, mask: Tensor, hidden: Tensor | None, logs: Tensor | None) -> None:
        """Fill a tile with the mask or bias, minus the logarithms of the sums.

        Args:
            tile: (strips, R, K).
            mask: (1 or strips of a head, R, K), -inf at hidden pairs.
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
    safe = work.small(k)
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
            if work.table is not None:
                work.table.collect(block, share, ds)
            dkeys[there] += work.product(3, ds.mT, rows[here])
            drows[here] = work.product(3, ds, keys[there])
        for room, x in made:
            room.store(x[lot])
    return dq.mul_(scale), dk.mul_(scale), dv


class _Halo(torch.autograd.Function):
    """Attention within windows with its own backward; nothing of size N x window is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        rpb: Tensor | None,
        plan: Plan,
        scale: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (P, S, E) and natural logarithms of the sums (P, S, 1), -inf without keys."""
        seed = int(torch.randint(2**62, ())) if dropout else 0
        with full_precision(q):
            out, logs = _forward(_Pass(plan, q, scale, hidden, rpb, dropout, seed), k, v)
        ctx.save_for_backward(q, k, v, hidden, rpb, out, logs)
        ctx.plan, ctx.scale, ctx.dropout, ctx.seed = plan, scale, dropout, seed
        ctx.set_materialize_grads(False)
        lse = (logs / LOG2_E).masked_fill_(logs == torch.inf, -torch.inf)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the table, from those of both outputs."""
        q, k, v, hidden, rpb, out, logs = ctx.saved_tensors
        plan, needed = ctx.plan, [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            dq, dk, dv, dtable = _Halo._again(ctx, grads, needed)
            return dq, dk, dv, None, dtable, None, None, None
        grad, of_lse = grads
        if grad is None:
            grad = torch.zeros_like(out)
        with full_precision(q):
            delta = (grad * out).sum(-1, keepdim=True)
            if of_lse is not None:
                delta = delta - of_lse
            work = _Pass(plan, q, ctx.scale, hidden, rpb, ctx.dropout, ctx.seed)
            back = _backward(work, k, v, logs, delta, grad.contiguous(), ctx.scale)
        dtable = None if work.table is None or rpb is None else work.table.gradient().to(rpb.dtype)
        each = zip((*back, dtable), needed, strict=True)
        dq, dk, dv, dtable = (d if want else None for d, want in each)
        return dq, dk, dv, None, dtable, None, None, None

    @staticmethod
    def _again(
        ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients that can be differentiated once more."""
        if ctx.dropout:
            raise ZooError("a second derivative through windows with dropout is not possible")
        q, k, v, hidden, rpb, _, _ = ctx.saved_tensors
        with full_precision(q):
            outs = plain(q, k, v, hidden, rpb, ctx.plan, ctx.scale)
        return differentiate_again(outs, (q, k, v, rpb), needed, grads)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    windows: Sequence[Window],
    *,
    scale: float,
    mask: Tensor | None = None,
    rpb: Tensor | None = None,
    key_bias: Tensor | None = None,
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
        rpb: Added to the scores by the distance of key and query, (H, 2 w - 1, ..), or None.
        key_bias: Added to the scores of keys, a constant, (B|1, S), or None.
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
        nothing = (q.sum() + k.sum() + v.sum()).to(wide)  # an empty sum that hangs on all of them
        nothing = nothing if rpb is None else nothing + 0.0 * rpb.sum()
        out = nothing.to(v.dtype).expand(*q.shape[:3], v.shape[3])
        return out, nothing.expand(q.shape[:3])
    dtype = v.dtype
    hidden = None
    if mask is not None or key_bias is not None:
        hidden = q.new_zeros(samples, length, dtype=wide)
        hidden = hidden if key_bias is None else hidden + key_bias.detach()
        hidden = hidden if mask is None else hidden.masked_fill(~mask, -torch.inf)
        hidden = hidden[:, None].expand(-1, heads, -1)
    table, given = None, [q, k, v, hidden]
    if rpb is not None:  # the samples of a head, which share its table, follow one another
        table = rpb.flatten(1)
        given = [None if x is None else x.transpose(0, 1) for x in given]
    flat = [None if x is None else x.to(wide).flatten(0, 1).contiguous() for x in given]
    size = tuple(shape), tuple(windows), samples * heads
    plan = make_plan(*size, wide, q.device, sizes, relative=rpb is not None)
    out, lse = _Halo.apply(*flat, table, plan, scale, dropout)
    lead = (samples, heads) if rpb is None else (heads, samples)
    out, lse = out.unflatten(0, lead), lse[..., 0].unflatten(0, lead)
    if rpb is not None:
        out, lse = out.transpose(0, 1), lse.transpose(0, 1)
    return out.to(dtype), lse
