"""Cog attention by tiles in the cache, differentiated by hand: `zoo.normalize.cog`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.host import engine
from zoo.parts import widen

LOG2_E = math.log2(math.e)
# A tile is this part of the engine's strip, so that three stay in a core's own cache, and has
# 2 * SLIM keys for two rows.
SHARE = 16
SLIM = 4


def _flatten(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B H, N, D) of at least float32, one row after the other."""
    return widen(x).flatten(0, 1).contiguous()


class Tiles:
    """Cuts a pass over (B H, N, M) scores into tiles that share a few buffers.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        scale: Factor on the scores.
        hidden: True may *not* attend, broadcastable to (B, H, N, M), or None.
        offset: Row i sees keys 0 .. i + offset; None for all keys.
        buffers: Number of buffers.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        hidden: Tensor | None,
        offset: int | None,
        buffers: int,
    ) -> None:
        self.heads, self.hidden, self.offset = q.shape[1], hidden, offset
        self.q, self.k = q, k = _flatten(q), _flatten(k)
        # 2^x is three times faster than e^x on a CPU, so scores are counted in base 2.
        self.factor = scale * LOG2_E
        budget = engine.STRIP_BYTES["cpu"] // SHARE // q.element_size()
        self.high = max(1, min(q.shape[1], max(engine.MIN_ROWS, math.isqrt(budget // SLIM))))
        self.wide = max(1, min(k.shape[1], max(engine.MIN_ROWS, math.isqrt(budget * SLIM))))
        self.deep = max(1, min(q.shape[0], budget // (self.high * self.wide)))
        size = self.deep * self.high * self.wide
        self.buffers = [q.new_empty(size) for _ in range(buffers)]
        self.views: dict[tuple[int, ...], list[Tensor]] = {}

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """Some heads and some of their rows at a time."""
        for h in range(0, self.q.shape[0], self.deep):
            for i in range(0, self.q.shape[1], self.high):
                rows = slice(i, min(i + self.high, self.q.shape[1]))
                yield slice(h, min(h + self.deep, self.q.shape[0])), rows

    def over_keys(
        self, lot: slice, rows: slice, q: Tensor, *others: Tensor
    ) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
        """The keys of a strip, a tile at a time.

        Args:
            lot: Heads of the strip.
            rows: Rows of the strip.
            q: Queries of the strip, (heads, R, D).
            others: What else is to be cut by keys, each (B H, M, ..).

        Yields:
            The keys; the buffers as (heads, R, keys), the first filled with the base-2 scores;
            the tile's share of k and the others.
        """
        last = self.k.shape[1]
        if self.offset is not None:
            last = min(last, rows.stop + self.offset)
        if last <= 0:
            return
        shares = [x[lot, :last].split(self.wide, 1) for x in (self.k, *others)]
        for t, cut in enumerate(zip(*shares, strict=True)):
            k = cut[0]
            tile = self._tile(q.shape[0], q.shape[1], k.shape[1])
            # The factor goes onto the products and not onto q, so that exact zeros stay exact.
            torch.baddbmm(tile[0], q, k.mT, beta=0, alpha=self.factor, out=tile[0])
            yield slice(t * self.wide, t * self.wide + k.shape[1]), tile, list(cut)

    def _tile(self, *shape: int) -> list[Tensor]:
        """The buffers in the shape of a tile; there are few shapes."""
        if shape not in self.views:
            self.views[shape] = [x[: math.prod(shape)].view(shape) for x in self.buffers]
        return self.views[shape]

    def hide(self, tile: Tensor, lot: slice, rows: slice, keys: slice) -> None:
        """Put zeros where the pairs of a tile may not meet."""
        if self.offset is not None:
            first = max(keys.start, rows.start + self.offset + 1)  # the first key hidden from a row
            if first < keys.stop:
                tile[..., first - keys.start :].tril_(rows.start + self.offset - first)
        if self.hidden is not None:
            hidden = self.hidden
            hidden = hidden[:, :, rows] if hidden.shape[2] > 1 else hidden
            hidden = hidden[..., keys] if hidden.shape[3] > 1 else hidden
            index = torch.arange(lot.start, lot.stop, device=tile.device)
            sample = index // self.heads if hidden.shape[0] > 1 else index * 0
            head = index % self.heads if hidden.shape[1] > 1 else index * 0
            tile.masked_fill_(hidden[sample, head], 0.0)


def forward(tiles: Tiles, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B H, N, E) from v (B, H, M, E), and base-2 logarithms of rows' sums (B H, N, 1)."""
    q, k, v = tiles.q, tiles.k, _flatten(v)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_empty(*q.shape[:2], 1)
    # A score is at most |q| |k|. While that is small, its power needs no maximum subtracted first;
    # half of the exponent's range stays free for the sums.
    longest = abs(tiles.factor) * q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True)
    limit = math.log2(torch.finfo(q.dtype).max) / 2
    for lot, rows in tiles.strips():
        q_rows, y = q[lot, rows], out[lot, rows]
        total = torch.zeros_like(lse[lot, rows])
        top = None
        if not bool(longest[lot, rows].amax() <= limit):
            top = torch.zeros_like(total)
            for keys, (s, size), _ in tiles.over_keys(lot, rows, q_rows):
                tiles.hide(torch.abs(s, out=size), lot, rows, keys)
                torch.maximum(top, size.amax(-1, keepdim=True), out=top)
        for keys, (s, e), (_, v_keys) in tiles.over_keys(lot, rows, q_rows, v):
            torch.abs(s, out=e)
            if top is not None:
                e.sub_(top)
            tiles.hide(e.exp2_(), lot, rows, keys)
            total += e.sum(-1, keepdim=True)
            y.baddbmm_(s.sign_().mul_(e), v_keys)
        empty = total == 0
        y /= total.masked_fill(empty, 1.0)
        logs = total.log2() if top is None else total.log2() + top
        lse[lot, rows] = logs.masked_fill(empty, torch.inf)  # 2^(|s| - inf) weighs nothing
    return out, lse


def backward(
    tiles: Tiles, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B H, N, D), k (B H, M, D) and v (B H, M, E).

    Args:
        tiles: Those of the pass, with three buffers.
        v: (B, H, M, E).
        out: What `forward` returned, (B, H, N, E).
        lse: What `forward` returned beside it.
        grad: Gradient of the outputs, (B, H, N, E).
        scale: Factor on the scores.
    """
    q, k = tiles.q, tiles.k
    v, out, grad = _flatten(v), _flatten(out), _flatten(grad)
    delta = (grad * out).sum(-1, keepdim=True)
    dq = torch.zeros_like(q)
    # Products that sum over rows are quicker with the keys along the rows of memory.
    dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1]).mT for x in (k, v))
    for lot, rows in tiles.strips():
        q_rows, dq_rows, g = q[lot, rows], dq[lot, rows], grad[lot, rows]
        logs, d = lse[lot, rows], delta[lot, rows]
        for keys, (s, p, ds), cut in tiles.over_keys(lot, rows, q_rows, v, dk, dv):
            k_keys, v_keys, dk_keys, dv_keys = cut
            tiles.hide(torch.abs(s, out=p).sub_(logs).exp2_(), lot, rows, keys)
            sign = s.sign_()
            torch.bmm(g, v_keys.mT, out=ds)
            ds.addcmul_(sign, d, value=-1).mul_(p)
            dv_keys.baddbmm_(sign.mul_(p).mT, g)
            dk_keys.baddbmm_(ds.mT, q_rows)
            dq_rows.baddbmm_(ds, k_keys)
    return dq.mul_(scale), dk.mul_(scale), dv
