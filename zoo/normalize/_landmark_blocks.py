"""The fast route of landmark attention on a CPU: block by block, with its own backward.

Keys are packed by blocks, ordinary ones and landmarks apart, so that the first level, over a row's
own block and the landmarks, is known before any past block is looked at. What is left of a past
block b is then one factor for each row,

    w_ij = e_ij f_ib,  e_ij = 2^(s_ij - max),  f_ib = p_ib / sum_j e_ij     j ordinary, in block b

and its gradient, with A_ij = do_i . v_j and C_ib = sum_j w_ij A_ij,

    ds_ij = w_ij (A_ij - C_ib / p_ib),     ds_i,landmark(b) = C_ib - p_ib do_i . o_i.

Scores are formed by the tile with *keys* along its rows: sums over the keys of a block and products
with a factor for each query are then whole vectors of queries. Seven matrix products a pair, as in
plain attention; saved are q, k, v, o and one number per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.host import engine
from zoo.normalize._landmark_weights import landmark_attention_reference
from zoo.ops.again import differentiate_again
from zoo.parts import full_precision, widen

LOG2_E = math.log2(math.e)
# A tile is this part of the engine's strip: two of them and what they are made of stay in a
# core's own cache. Strips have about so many rows, in whole blocks where these are short.
SHARE = 8
ROWS = 64


@dataclass
class _Strip:
    """Some heads and rows, with the first level of their softmax.

    Args:
        heads: Heads of the strip.
        rows: Its rows.
        q: (h, R, D), and with the scale in base 2 on it.
        scaled: The same times the factor of base-2 scores.
        groups: Blocks before the last row's own, which the landmark level may see.
        own: Ordinary keys of the own blocks.
        local: Base-2 scores of the own blocks, (h, keys, R), -inf where hidden.
        landmarks: Base-2 scores of landmarks, (h, groups, R), -inf where hidden.
    """

    heads: slice
    rows: slice
    q: Tensor
    scaled: Tensor
    groups: int
    own: slice
    local: Tensor
    landmarks: Tensor


class _Blocks:
    """A pass over flat heads whose keys are packed by blocks.

    Args:
        q: (B H, N, D).
        k: (B H, M, D), M at least N; the queries are the last N of the M tokens.
        v: (B H, M, E).
        block: Ordinary tokens L of a block.
        scale: Factor on the scores.
        buffers: Number of tiles held.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, buffers: int
    ) -> None:
        self.q, self.block = q, block
        self.heads, self.length = q.shape[:2]
        self.total = k.shape[1]
        self.factor = scale * LOG2_E
        self.k, self.landmarks = self.pack(k)
        self.v, _ = self.pack(v)
        budget = engine.STRIP_BYTES["cpu"] // SHARE // q.element_size()
        span = block + 1
        wanted = max(1, min(ROWS, budget // engine.MIN_ROWS))
        self.step = wanted // span * span or min(wanted, span)
        self.deep = max(1, min(self.heads, budget // (self.step * block)))
        self.wide = max(1, budget // (self.deep * self.step * block))
        size = self.deep * self.step * min(self.wide, self.k.shape[1] // block) * block
        self.buffers = [q.new_empty(size) for _ in range(buffers)]
        # A score is at most |q| |k|. While that is small no maximum need be subtracted before 2^x;
        # half of the exponent's range stays free for the sums.
        longest = q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)
        limit = math.log2(torch.finfo(q.dtype).max) / 2
        self.bounded = bool(abs(self.factor) * longest.amax() <= limit)

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ordinary tokens (B H, blocks L, D) and landmarks (B H, blocks, D) of (B H, M, D)."""
        span = self.block + 1
        blocks = -(-self.total // span)
        full = x.new_zeros(x.shape[0], blocks * span, x.shape[2])
        full[:, : self.total] = x
        groups = full.unflatten(1, (blocks, span))
        return groups[:, :, :-1].flatten(1, 2).contiguous(), groups[:, :, -1].contiguous()

    def unpack(self, ordinary: Tensor, landmarks: Tensor) -> Tensor:
        """Put (B H, blocks L, D) and (B H, blocks, D) back to (B H, M, D)."""
        groups = ordinary.unflatten(1, (-1, self.block))
        return torch.cat((groups, landmarks[:, :, None]), 2).flatten(1, 2)[:, : self.total]

    def strips(self) -> Iterator[_Strip]:
        """Cut the rows, at multiples of the step counted over all tokens, and a few heads."""
        offset, span = self.total - self.length, self.block + 1
        # The step is some whole blocks, or a part of one: no strip begins inside a block and ends
        # in another.
        outer = max(self.step, span)
        starts = [
            i
            for first in range(offset // span * span, self.total, outer)
            for i in range(first, min(first + outer, self.total), self.step)
        ]
        cuts = zip(starts, [*starts[1:], self.total], strict=True)
        rows = [slice(max(a, offset) - offset, b - offset) for a, b in cuts if b > offset]
        for h in range(0, self.heads, self.deep):
            heads = slice(h, min(h + self.deep, self.heads))
            for part in rows:
                yield self._strip(heads, part)

    def _strip(self, heads: slice, rows: slice) -> _Strip:
        """Scores of the first level."""
        span, offset = self.block + 1, self.total - self.length
        index = torch.arange(rows.start + offset, rows.stop + offset, device=self.q.device)
        lead, last = (rows.start + offset) // span, (rows.stop - 1 + offset) // span
        end = last * self.block + min(self.block, rows.stop + offset - last * span)
        own = slice(lead * self.block, end)
        q = self.q[heads, rows]
        scaled = q * self.factor
        local = self.k[heads, own] @ scaled.mT
        key = torch.arange(own.start, own.stop, device=self.q.device)[:, None]
        apart = key // self.block != index // span
        local.masked_fill_(apart | (key % self.block > index % span), -torch.inf)
        landmarks = self.landmarks[heads, :last] @ scaled.mT
        if last > lead:
            later = torch.arange(last, device=self.q.device)[:, None] >= index // span
            landmarks.masked_fill_(later, -torch.inf)
        return _Strip(heads, rows, q, scaled, last, own, local, landmarks)

    def tiles(self, strip: _Strip) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """The blocks before a strip's last one, some at a time.

        Yields:
            The blocks; their ordinary keys; the buffers as (h, blocks, L, R), the first filled with
            2^(score - maximum of the block).
        """
        for b in range(0, strip.groups, self.wide):
            groups = slice(b, min(b + self.wide, strip.groups))
            keys = slice(groups.start * self.block, groups.stop * self.block)
            shape = (len(strip.q), keys.stop - keys.start, strip.q.shape[1])
            tile = [x[: math.prod(shape)].view(shape) for x in self.buffers]
            torch.bmm(self.k[strip.heads, keys], strip.scaled.mT, out=tile[0])
            tile = [x.unflatten(1, (-1, self.block)) for x in tile]
            if not self.bounded:
                tile[0].sub_(tile[0].amax(2, keepdim=True))
            tile[0].exp2_()
            yield groups, keys, tile


def _forward(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Outputs (B H, N, E) and base-2 logarithms of the first level's sums (B H, N)."""
    q, v = blocks.q, blocks.v
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2])
    for strip in blocks.strips():
        top = strip.local.amax(1, keepdim=True)
        if strip.groups:
            top = torch.maximum(top, strip.landmarks.amax(1, keepdim=True))
        local, share = strip.local.sub_(top).exp2_(), strip.landmarks.sub_(top).exp2_()
        total = local.sum(1, keepdim=True).add_(share.sum(1, keepdim=True))
        lse[strip.heads, strip.rows] = total.log2().add_(top)[:, 0]
        share /= total
        y = (local.div_(total)).mT @ v[strip.heads, strip.own]
        for groups, keys, (tile,) in blocks.tiles(strip):
            factor = share[:, groups] / tile.sum(2)
            tile.mul_(factor[:, :, None])
            y.baddbmm_(tile.flatten(1, 2).mT, v[strip.heads, keys])
        out[strip.heads, strip.rows] = y
    return out, lse


def _backward(
    blocks: _Blocks, out: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B H, N, D), k (B H, M, D) and v (B H, M, E)."""
    k, v = blocks.k, blocks.v
    tiny = torch.finfo(grad.dtype).tiny
    delta = (grad * out).sum(-1)
    dq = torch.zeros_like(blocks.q)
    dk, dv, dmarks = (torch.zeros_like(x) for x in (k, v, blocks.landmarks))
    for strip in blocks.strips():
        heads, rows, own = strip.heads, strip.rows, strip.own
        g, logs, d = grad[heads, rows], lse[heads, None, rows], delta[heads, None, rows]
        dq_rows = dq[heads, rows]
        local = strip.local.sub_(logs).exp2_()
        dv[heads, own].baddbmm_(local, g)
        ds = (v[heads, own] @ g.mT).sub_(d).mul_(local)
        dk[heads, own].baddbmm_(ds, strip.q)
        dq_rows.baddbmm_(ds.mT, k[heads, own])
        if not strip.groups:
            continue
        share = strip.landmarks.sub_(logs).exp2_()
        gain = torch.empty_like(share)  # C: what each past block adds to do . o
        for groups, keys, (w, ds) in blocks.tiles(strip):
            p = share[:, groups]
            w.mul_((p / w.sum(2))[:, :, None])
            flat, ds_flat = w.flatten(1, 2), ds.flatten(1, 2)
            dv[heads, keys].baddbmm_(flat, g)
            torch.bmm(v[heads, keys], g.mT, out=ds_flat)
            ds.mul_(w)
            c = ds.sum(2)
            gain[:, groups] = c
            # A share that has underflowed weighs nothing, and nothing comes back from it.
            ds.addcmul_(w, c.div_(p.clamp_min(tiny))[:, :, None], value=-1)
            dk[heads, keys].baddbmm_(ds_flat, strip.q)
            dq_rows.baddbmm_(ds_flat.mT, k[heads, keys])
        gain.addcmul_(share, d, value=-1)
        dmarks[heads, : strip.groups].baddbmm_(gain, strip.q)
        dq_rows.baddbmm_(gain.mT, blocks.landmarks[heads, : strip.groups])
    nothing = dv.new_zeros(dv.shape[0], blocks.landmarks.shape[1], dv.shape[2])
    return (
        dq.mul_(scale),
        blocks.unpack(dk, dmarks).mul_(scale),
        blocks.unpack(dv, nothing),
    )


class BlockAttention(torch.autograd.Function):
    """Landmark attention of (B, H, N, D) with its own backward; nothing of size N x M is kept."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
        """Outputs (B, H, N, E) and the logarithms of the rows' sums."""
        with full_precision(q):
            blocks = _Blocks(_flatten(q), _flatten(k), _flatten(v), block, scale, buffers=1)
            out, lse = _forward(blocks)
        return out.view(*q.shape[:3], v.shape[3]).to(v.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep inputs, outputs and a number per row."""
        q, k, v, ctx.block, ctx.scale = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            with full_precision(q):
                wide = widen(q), widen(k), widen(v)
                y = landmark_attention_reference(*wide, ctx.block, ctx.scale).to(v.dtype)
                needed = ctx.needs_input_grad[:3]
                back = differentiate_again([y], (q, k, v), needed, grads[:1])
            return (*back, None, None)
        with full_precision(q):
            flat = _flatten(q), _flatten(k), _flatten(v)
            blocks = _Blocks(*flat, ctx.block, ctx.scale, buffers=2)
            found = _backward(blocks, _flatten(out), lse, _flatten(grads[0]), ctx.scale)
        each = zip(found, (q, k, v), strict=True)
        return (*(d.view(x.shape).to(x.dtype) for d, x in each), None, None)


def _flatten(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B H, N, D) of at least float32, one row after the other."""
    return widen(x).flatten(0, 1).contiguous()
