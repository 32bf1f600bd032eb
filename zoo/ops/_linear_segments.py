"""Chunked linear attention on a CPU, a segment at a time, with its own backward pass.

A segment is so many tokens of so many heads that what is made of it stays near the core: some
chunks of one head of a long sequence, or all heads of many short ones. Its chunks go through
batched matrix products at once, and their states through one product with the triangle of decays
between chunks; from segment to segment only one state goes on. The backward pass walks back over
the segments, and makes the states of the chunks again; kept are the inputs and one state for each
segment, a sixty-fourth of what q, k, v and the output take.

Queries and keys may go through `Features` first: then their activated and doubled forms exist for
one segment at a time. Decays multiply values and gradients of outputs, which are the narrower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.ops._linear_features import Features, tables
from zoo.ops._linear_work import Lot, Work, cut, place, store
from zoo.ops.again import differentiate_again
from zoo.parts import full_precision

Plain = Callable[..., tuple[Tensor, Tensor]]


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    log_decay: Tensor | None,
    chunk: int,
    bounds: list[int] | None,
    plain: Plain,
    features: Features | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, E) in v's type and final states (B or S, H, D, E), at least float32.

    With LRPE among the features D of the states is twice that of q and k.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D).
        v: (B, G, N, E).
        state: (B or S, H, D, E) or None.
        log_decay: (H,) or None; a constant.
        chunk: Tokens of a chunk.
        bounds: Bounds of packed sequences (then B is 1), or None.
        plain: A differentiable form of the same, for second derivatives; of q and k as they are
            after the features.
        features: What q and k go through first.
    """
    features = Features() if features is None else features
    act, theta, positions = features.act, features.theta, features.positions
    out, after = _Segments.apply(
        q, k, v, state, theta, positions, log_decay, act, chunk, bounds, plain
    )
    return out, after


def _forward(
    work: Work, out: Tensor, before: Tensor | None, after: Tensor, keep: bool
) -> list[Tensor]:
    """Fill outputs and final states; the states before the lots where `keep`."""
    kept = []
    state = after
    for lot in work.lots:
        q, k = work.featured("q", work.q, lot), work.featured("k", work.k, lot)
        v = work.load("v", work.v, lot)
        if lot.first:
            state = _first(before, after, lot)
        elif keep:
            kept.append(state)
        lasting = work.scaled("lasting", v, work.columns(lot))
        q, k, v = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        states, state = work.states("states", lot, k, lasting, state, reverse=False)
        target = cut(out, lot)
        y = place(work, "y", target)
        torch.bmm(q, states, out=y)
        if not work.tables.plain:
            y.view(target.shape).mul_(work.rows(lot))
        products = work.buffer("products", len(q), lot.chunk, lot.chunk)
        work.pairs(torch.bmm(q, k.mT, out=products), lot)
        y.baddbmm_(products, v)
        store(target, y)
        if lot.last:
            after[lot.state, lot.heads] = state.unflatten(2, (work.key, work.value))
    return kept


def _first(before: Tensor | None, like: Tensor, lot: Lot) -> Tensor:
    """State that a sequence starts from, (b, h, D E)."""
    if before is None:
        return torch.zeros_like(like[lot.state, lot.heads]).flatten(2)
    return before[lot.state, lot.heads].to(like.dtype).flatten(2)


def _backward(
    work: Work,
    grad: Tensor,
    d_after: Tensor | None,
    before: Tensor | None,
    kept: list[Tensor],
    count: int,
    times: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, of k and v with a head for each query head, of the `count` states, of theta.

    The last wants `times`, the positions (1 or B, N) as numbers.
    """
    inputs = (work.q, work.k, work.v)
    dq, dk = (work.empty(*work.q.shape) for _ in range(2))
    dv = work.empty(*work.q.shape[:3], work.value)
    d_theta = None if times is None else work.empty(work.heads, work.key // 2).zero_()
    d_before = work.empty(count, work.heads, work.key, work.value).zero_()
    if d_after is not None:
        d_before += d_after  # of an empty sequence, and the start of the way back of the others
    left = list(kept)
    back = d_before
    bare = work.act == "none" and not work.turns
    for lot in reversed(work.lots):
        q, k = work.featured("q", work.q, lot), work.featured("k", work.k, lot)
        v, g = work.load("v", work.v, lot), work.load("g", grad, lot)
        if lot.last:
            back = d_before[lot.state, lot.heads].flatten(2)
        state = _first(before, d_before, lot) if lot.first else left.pop()
        lasting = work.scaled("lasting", v, work.columns(lot))
        reached = work.scaled("reached", g, work.rows(lot))
        q, k, v, g = (x.flatten(0, 2) for x in (q, k, v, g))
        states, _ = work.states("states", lot, k, lasting, state, reverse=False)
        later, back = work.states("later", lot, q, reached, back, reverse=True)
        targets = [cut(x, lot) for x in (dq, dk, dv)]
        if bare:
            a, b = (place(work, n, x) for n, x in zip("ab", targets[:2], strict=True))
        else:
            a, b = work.buffer("a", *q.shape), work.buffer("b", *k.shape)
        c = place(work, "c", targets[2])
        torch.bmm(reached, states.mT, out=a)
        torch.bmm(lasting, later.mT, out=b)
        torch.bmm(k, later, out=c)
        if not work.tables.plain:
            c.view(targets[2].shape).mul_(work.columns(lot))
        products = work.buffer("products", len(q), lot.chunk, lot.chunk)
        c.baddbmm_(work.pairs(torch.bmm(q, k.mT, out=products), lot).mT, g)
        work.pairs(torch.bmm(g, v.mT, out=products), lot)
        a.baddbmm_(products, k)
        b.baddbmm_(products.mT, q)
        if d_theta is not None and times is not None:
            angles = work.angle(k, b, lot, work.angle(q, a, lot, None))
            at = times[lot.batch if len(times) > 1 else slice(0, 1), None, None, lot.tokens]
            d_theta[lot.heads] += (at @ angles).sum((0, 2))
        for name, value, x, target in zip("qk", (a, b), inputs[:2], targets[:2], strict=True):
            work.unfeatured(name, value, x, lot, target)
        store(targets[2], c)
        if lot.first:
            d_before[lot.state, lot.heads] = back.unflatten(2, (work.key, work.value))
    return dq, dk, dv, d_before, d_theta


class _Segments(torch.autograd.Function):
    """Linear attention of (B, H, N, D); nothing of size N x N or N x D x E is made."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        theta: Tensor | None,
        positions: Tensor | None,
        log_decay: Tensor | None,
        act: str,
        chunk: int,
        bounds: list[int] | None,
        plain: Plain,
    ) -> tuple[Tensor, Tensor]:
        """Outputs and final states."""
        with full_precision(q):
            turns: tuple[Tensor, ...] = ()
            if theta is not None and positions is not None:
                made = tables(theta, positions, q.dtype)
                turns = tuple(x.view(-1, *x.shape[-3:]) for x in made)
            work = Work(q, k, v, log_decay, chunk, bounds, act, turns)
            samples, heads, length = q.shape[:3]
            # Tokens first in memory, as the output projection wants them.
            out = work.empty(samples, length, heads, work.value).transpose(1, 2)
            count = samples if bounds is None else len(bounds) - 1
            after = work.empty(count, heads, work.key, work.value).zero_()
            if state is not None:
                after += state  # stays where a sequence is empty
            keep = any(ctx.needs_input_grad)
            kept = _forward(work, out, state, after, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, state, theta, positions, log_decay, *turns, *kept)
        ctx.act, ctx.chunk, ctx.bounds, ctx.plain = act, chunk, bounds, plain
        return out.to(v.dtype), after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, the first states and theta."""
        q, k, v, state, theta, positions, log_decay, *kept = ctx.saved_tensors
        inputs = (q, k, v, state, theta)
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            found = _through(ctx, inputs, needed, positions, log_decay, grads)
            return (*found, *[None] * 6)
        grad, d_after = grads
        with full_precision(q):
            turns = () if theta is None else tuple(kept[:2])
            work = Work(q, k, v, log_decay, ctx.chunk, ctx.bounds, ctx.act, turns)
            times = None
            if needed[4]:
                times = positions.to(work.dtype).view(-1, q.shape[2])
            if grad is None:
                grad = q.new_zeros(1).expand(*q.shape[:3], work.value)
            count = len(q) if ctx.bounds is None else len(ctx.bounds) - 1
            kept = kept[len(turns) :]
            dq, dk, dv, *others = _backward(work, grad, d_after, state, kept, count, times)
            if work.share > 1:
                dk, dv = (x.unflatten(1, (-1, work.share)).sum(2) for x in (dk, dv))
        found = [
            d.to(x.dtype) if x is not None and d is not None and wanted else None
            for d, x, wanted in zip((dq, dk, dv, *others), inputs, needed, strict=True)
        ]
        return (*found, *[None] * 6)


def _through(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    positions: Tensor | None,
    log_decay: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the plain form."""
    q, k, v, state, theta = inputs
    made = Features(ctx.act, theta, positions).apply(q, k, v)  # type: ignore[arg-type]
    outs = ctx.plain(*made, log_decay, state, ctx.chunk, ctx.bounds)
    return differentiate_again(outs, inputs, needed, grads)
