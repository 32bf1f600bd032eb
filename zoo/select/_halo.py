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


def _cut(x: Tensor, plan: Plan, keys: bool) -> Tensor:
    """Lay (P, S, D) out as strips, (P strips, rows or keys of a strip, D)."""
    if not plan.copies:
        return x
    grid = x.unflatten(1, plan.shape)
    sizes = plan.keys if keys else plan.rows
    made = x.new_zeros(x.shape[0], len(plan.strips), plan.shape[0], *sizes, x.shape[2])
    for n, strip in enumerate(plan.strips):
        source = grid[:, :, *(tile.keys if keys else tile.rows for tile in strip)]
        room = made[:, n][:, :, *(slice(0, size) for size in source.shape[2:-1])]
        room.copy_(source)
    return made.flatten(2, -2).flatten(0, 1)


def _join(strips: Tensor, plan: Plan, keys: bool) -> Tensor:
    """The way back from strips to (P, S, D): what several strips hold of a key is added up."""
    if not plan.copies:
        return strips
    sizes = plan.keys if keys else plan.rows
    parts = strips.view(-1, len(plan.strips), plan.shape[0], *sizes, strips.shape[-1])
    made = strips.new_zeros(parts.shape[0], *plan.shape, strips.shape[-1])
    for n, strip in enumerate(plan.strips):
        target = made[:, :, *(tile.keys if keys else tile.rows for tile in strip)]
        target += parts[:, n][:, :, *(slice(0, size) for size in target.shape[2:-1])]
    return made.flatten(1, -2)


class Share(NamedTuple):
    """What is computed at once: a block of some of the strips."""

    lot: slice
    block: Block
    mask: Tensor  # (1 or strips of the share, R, K)


def _shares(plan: Plan, total: int) -> Iterator[Share]:
    """Cut a pass over `total` strips into shares whose scores fit a buffer."""
    strips = len(plan.strips)
    for block in plan.blocks:
        _, rows, keys = block.mask.shape
        many = max(1, BUDGET // max(1, rows * keys))
        if block.mask.shape[0] == 1 or many >= strips:
            many = many if block.mask.shape[0] == 1 else many // strips * strips
            for p in range(0, total, many):
                yield Share(slice(p, min(p + many, total)), block, block.mask)
            continue
        for p in range(0, total, strips):
            for c in range(0, strips, many):
                end = min(c + many, strips)
                yield Share(slice(p + c, p + end), block, block.mask[c:end])


class _Pass:
    """What the forward and the backward pass over the shares have in common.

    Args:
        plan: How the grid is cut.
        q: Queries as strips, (P strips, rows, D).
        scale: Factor on the scores.
        hidden: -inf at hidden keys and 0 elsewhere, as strips (P strips, keys), or None.
        dropout: On the weights.
        seed: Of the numbers for dropout.
        buffers: Number of buffers.
    """

    def __init__(
        self,
        plan: Plan,
        q: Tensor,
        scale: float,
        hidden: Tensor | None,
        dropout: float,
        seed: int,
        buffers: int,
    ) -> None:
        self.plan, self.q, self.hidden, self.dropout = plan, q, hidden, dropout
        # 2^x is faster than e^x on a CPU, so scores are counted in base 2.
        self.factor = scale * LOG2_E
        self.generator = torch.Generator(q.device)
        self.generator.manual_seed(seed)
        shares = list(_shares(plan, q.shape[0]))
        sizes = [self.pairs(share) for share in shares]
        self.shares = shares
        self.buffers = [q.new_empty(max(sizes, default=0)) for _ in range(buffers)]

    @staticmethod
    def pairs(share: Share) -> int:
        """Scores of a share."""
        return (share.lot.stop - share.lot.start) * math.prod(share.block.mask.shape[1:])

    def tiles(self, share: Share) -> list[Tensor]:
        """The buffers in the shape of a share, (strips, R, K)."""
        shape = (share.lot.stop - share.lot.start, *share.block.mask.shape[1:])
        return [x[: math.prod(shape)].view(shape) for x in self.buffers]

    def start(self, tile: Tensor, share: Share, logs: Tensor | None) -> None:
        """Fill a tile with -inf at hidden pairs and minus the logarithms of the sums elsewhere."""
        lot, block, mask = share
        view = tile.view(-1, *mask.shape)
        if self.hidden is None and logs is None:
            view.copy_(mask)
            return
        if self.hidden is not None:
            hidden = self.hidden[lot, None, block.keys]
            torch.add(mask, hidden.view(-1, mask.shape[0], *hidden.shape[1:]), out=view)
            if logs is not None:
                tile.sub_(logs[lot, block.rows])
        elif logs is not None:
            rows = logs[lot, block.rows]
            torch.sub(mask, rows.view(-1, mask.shape[0], *rows.shape[1:]), out=view)

    def kept(self, tile: Tensor) -> Tensor:
        """Weights that dropout leaves, with their factor, the same in both passes."""
        keep = torch.empty_like(tile).bernoulli_(1 - self.dropout, generator=self.generator)
        return keep.div_(1 - self.dropout)


def _forward(work: _Pass, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (P strips, rows, E) and base-2 logarithms of the sums, +inf for rows without keys."""
    q = work.q
    out, logs = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(*q.shape[:2], 1)
    # A score is at most |q| |k|. While that is small, its power needs no maximum subtracted first;
    # half of the exponent's range stays free for the sums.
    longest = q.new_zeros(())
    if q.numel() and k.numel():
        longest = abs(work.factor) * q.norm(dim=-1).amax() * k.norm(dim=-1).amax()
    safe = bool(longest <= math.log2(torch.finfo(q.dtype).max) / 2)
    for share in work.shares:
        lot, block, _ = share
        (s,) = work.tiles(share)
        work.start(s, share, None)
        s.baddbmm_(q[lot, block.rows], k[lot, block.keys].mT, alpha=work.factor)
        top = None
        if not safe:
            top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
            s.sub_(top)
        total = s.exp2_().sum(-1, keepdim=True)
        empty = None
        if work.hidden is not None:
            empty = total == 0
            total.masked_fill_(empty, 1.0)
        if work.dropout:
            s.mul_(work.kept(s))
        y = torch.bmm(s, v[lot, block.keys])
        torch.div(y, total, out=out[lot, block.rows])
        total.log2_()
        if top is not None:
            total += top
        if empty is not None:
            total.masked_fill_(empty, torch.inf)
        logs[lot, block.rows] = total
    return out, logs


def _backward(
    work: _Pass, k: Tensor, v: Tensor, logs: Tensor, delta: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as strips."""
    q = work.q
    dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(k), torch.zeros_like(v)
    for share in work.shares:
        lot, block, _ = share
        p, ds = work.tiles(share)
        rows, keys, g = q[lot, block.rows], k[lot, block.keys], grad[lot, block.rows]
        work.start(p, share, logs)
        p.baddbmm_(rows, keys.mT, alpha=work.factor).exp2_()
        torch.bmm(g, v[lot, block.keys].mT, out=ds)
        if work.dropout:
            kept = work.kept(p)
            ds.mul_(kept)
            dv[lot, block.keys] += torch.bmm(kept.mul_(p).mT, g)
        else:
            dv[lot, block.keys] += torch.bmm(p.mT, g)
        ds.sub_(delta[lot, block.rows]).mul_(p)
        dk[lot, block.keys] += torch.bmm(ds.mT, rows)
        dq[lot, block.rows] = torch.bmm(ds, keys)
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
            s = s + _cut(hidden[..., None], plan, True)[:, None, block.keys, 0]
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
    index = torch.arange(math.prod(plan.shape)).view(1, -1, 1)
    order = _cut(index, plan, False).view(-1)
    real = _cut(torch.ones_like(index), plan, False).view(-1).bool()
    flat = parts.flatten(1, -2)
    place = torch.empty(int(real.sum()), dtype=torch.int64)
    place[order[real]] = torch.arange(len(real))[real]
    return flat.index_select(1, place.to(strips.device))


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
            far = None if hidden is None else _cut(hidden[..., None], plan, True)[..., 0]
            cut = [_cut(x, plan, keys) for x, keys in ((q, False), (k, True), (v, True))]
            work = _Pass(plan, cut[0], scale, far, dropout, seed, buffers=1)
            out, logs = (_join(x, plan, False) for x in _forward(work, cut[1], cut[2]))
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
            pairs = ((q, False), (k, True), (v, True))
            cut = [_cut(x, plan, keys) for x, keys in pairs]
            far = None if hidden is None else _cut(hidden[..., None], plan, True)[..., 0]
            work = _Pass(plan, cut[0], ctx.scale, far, ctx.dropout, ctx.seed, buffers=2)
            rows = [_cut(x.contiguous(), plan, False) for x in (logs, delta, grad)]
            found = _backward(work, cut[1], cut[2], *rows, ctx.scale)
            back = [_join(d, plan, keys) for d, (_, keys) in zip(found, pairs, strict=True)]
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
