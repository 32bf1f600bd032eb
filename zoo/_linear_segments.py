"""Chunked linear attention on a CPU, a segment at a time, with its own backward pass.

A segment is so many tokens of so many heads that what is made of it stays near the core: some
chunks of one head of a long sequence, or all heads of many short ones. Its chunks go through
batched matrix products at once, and their states through one product with the triangle of decays
between chunks; from segment to segment only one state goes on. The backward pass walks back over
the segments, and makes the states of the chunks again; kept are the inputs and one state for each
segment, a sixty-fourth of what q, k, v and the output take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.parts import full_precision

# Tokens of a segment, all heads counted.
SEGMENT = 1024

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
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, E) in v's type and final states (B or S, H, D, E), at least float32.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D).
        v: (B, G, N, E).
        state: (B or S, H, D, E) or None.
        log_decay: (H,) or None; a constant.
        chunk: Tokens of a chunk.
        bounds: Bounds of packed sequences (then B is 1), or None.
        plain: A differentiable form of the same, for second derivatives.
    """
    out, after = _Segments.apply(q, k, v, state, log_decay, chunk, bounds, plain)
    return out, after


class _Tables:
    """Powers of the decays, for all heads: within a chunk, and from chunk to chunk."""

    def __init__(
        self, log_decay: Tensor | None, heads: int, chunk: int, chunks: int, dtype: torch.dtype
    ) -> None:
        self.plain = log_decay is None
        at, n = torch.arange(chunk), torch.arange(chunks)
        rate = (torch.zeros(1) if log_decay is None else log_decay)[:, None].to(dtype)
        self.row = ((at + 1) * rate).exp()[:, None, :, None]  # of the state before, (H, 1, C, 1)
        self.column = ((chunk - 1 - at) * rate).exp()[:, None, :, None]  # to the end of the chunk
        gap = (at[:, None] - at).clamp_min(0)
        self.pairs = (gap * rate[..., None]).exp().tril()[:, None]  # (H, 1, C, C)
        gap = (n[:, None] - 1 - n).clamp_min(0)
        self.between = (chunk * gap * rate[..., None]).exp().tril(-1)  # (H, n, n)
        self.since = (chunk * n * rate).exp()[..., None]  # from the start of chunk 0, (H, n, 1)
        if self.plain:
            self.between, self.since = (x.expand(heads, -1, -1) for x in (self.between, self.since))


@dataclass
class _Lot:
    """Chunks of equal length that are computed at once: some tokens of some heads.

    Args:
        state: Index of the first state that they continue.
        batch: Samples.
        heads: Heads of these samples.
        tokens: Tokens.
        chunk: Tokens of a chunk.
        first: They are the first of their sequence.
        last: They are the last of their sequence.
    """

    state: slice
    batch: slice
    heads: slice
    tokens: slice
    chunk: int
    first: bool
    last: bool

    @property
    def chunks(self) -> int:
        return (self.tokens.stop - self.tokens.start) // self.chunk


def _lots(shape: torch.Size, chunk: int, bounds: list[int] | None) -> Iterator[_Lot]:
    """Cut a pass over (B, H, N, ..) into lots, a sequence from its first token to its last."""
    samples, heads, length = shape[:3]
    for s in range(1 if bounds is None else len(bounds) - 1):
        start, stop = (0, length) if bounds is None else bounds[s : s + 2]
        size = stop - start
        if not size:
            continue
        deep = max(1, SEGMENT // size)
        wide = min(samples, max(1, deep // heads))
        deep = min(deep, heads)
        step = max(chunk, SEGMENT // chunk * chunk)
        cuts = [*range(start, start + size // chunk * chunk, step), start + size // chunk * chunk]
        if cuts[-1] != stop:
            cuts.append(stop)
        for b in range(0, samples, wide):
            batch = slice(b, min(b + wide, samples))
            for h in range(0, heads, deep):
                lot = slice(h, min(h + deep, heads))
                for i, j in pairwise(cuts):
                    if i == j:
                        continue
                    states = batch if bounds is None else slice(s, s + 1)
                    short = min(chunk, j - i)
                    yield _Lot(states, batch, lot, slice(i, j), short, i == start, j == stop)


class _Work:
    """Inputs in enough precision, tables and buffers of a pass."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        chunk: int,
        bounds: list[int] | None,
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = q, k, v
        self.heads, self.share = q.shape[1], q.shape[1] // k.shape[1]
        self.key, self.value = q.shape[3], v.shape[3]
        self.lots = list(_lots(q.shape, chunk, bounds))
        self.chunk = max((lot.chunk for lot in self.lots), default=1)
        chunks = max((lot.chunks for lot in self.lots), default=1)
        self.tables = _Tables(log_decay, self.heads, self.chunk, chunks, self.dtype)
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Room for a tensor that is needed for one lot only."""
        size = 1
        for length in shape:
            size *= length
        held = self.buffers.get(name)
        if held is None or held.numel() < size:
            held = self.buffers[name] = self.empty(size)
        return held[:size].view(shape)

    def empty(self, *shape: int) -> Tensor:
        """Room for a result."""
        return self.q.new_empty(shape, dtype=self.dtype)

    def load(self, name: str, x: Tensor, lot: _Lot) -> Tensor:
        """What a lot sees of an input, (b, h, n, C, ..): dense and in enough precision.

        Rows that are far apart in memory fall on few places of a cache, and are read many times.
        """
        if x.shape[1] == self.heads:
            part = x[lot.batch, lot.heads, lot.tokens]
        else:
            groups = torch.arange(lot.heads.start, lot.heads.stop) // self.share
            part = x[lot.batch, :, lot.tokens].index_select(1, groups)
        if part.dtype != self.dtype or not part.is_contiguous():
            part = self.buffer(name, *part.shape).copy_(part)
        return part.unflatten(2, (-1, lot.chunk))

    def scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply by a table, into a buffer, (b h n, C, ..); x itself where nothing decays."""
        if self.tables.plain:
            return x.flatten(0, 2)
        return torch.mul(x, factor, out=self.buffer(name, *x.shape)).flatten(0, 2)

    def rows(self, lot: _Lot) -> Tensor:
        """Decay of the state before a chunk for each of its rows."""
        return self.tables.row[lot.heads, :, : lot.chunk]

    def columns(self, lot: _Lot) -> Tensor:
        """Decay of each token to the end of its chunk."""
        return self.tables.column[lot.heads, :, self.chunk - lot.chunk :]

    def pairs(self, products: Tensor, lot: _Lot) -> Tensor:
        """Decay products (b h n, C, C) in place, and hide the future."""
        if self.tables.plain:
            return products.tril_()
        table = self.tables.pairs[lot.heads, :, : lot.chunk, : lot.chunk]
        products.view(-1, *table.shape[:1], lot.chunks, lot.chunk, lot.chunk).mul_(table)
        return products

    def step(self, lot: _Lot) -> Tensor | None:
        """Decay over one chunk, (h, 1), or None where nothing decays."""
        return None if self.tables.plain else self.tables.row[lot.heads, 0, lot.chunk - 1]

    def states(
        self, name: str, lot: _Lot, a: Tensor, b: Tensor, state: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """States before each chunk of a lot and after it, from sums of a^T b within chunks.

        Args:
            name: Name of a buffer.
            lot: The lot.
            a: (b h n, C, D).
            b: (b h n, C, E).
            state: What comes in, (b, h, D E).
            reverse: From the last chunk to the first.

        Returns:
            (b h n, D, E), and (b, h, D E).
        """
        samples, heads = state.shape[:2]
        wide = self.key * self.value
        added = self.buffer("added", len(a), self.key, self.value)
        torch.bmm(a.mT, b, out=added)
        added = added.view(samples * heads, lot.chunks, wide)
        since = self.tables.since[lot.heads, : lot.chunks]
        between = self.tables.between[lot.heads, : lot.chunks, : lot.chunks]
        if reverse:
            since, between = since.flip(1), between.mT
        found = self.buffer(name, samples, heads, lot.chunks, wide)
        torch.mul(since, state[:, :, None], out=found)
        if lot.chunks > 1:
            many = between.expand(samples, -1, -1, -1).flatten(0, 1)
            found.view(added.shape).baddbmm_(many, added)
        end = 0 if reverse else -1
        after, step = found[:, :, end], self.step(lot)
        after = after if step is None else after * step
        after = after + added.view(found.shape)[:, :, end]
        return found.view(len(a), self.key, self.value), after


def _cut(x: Tensor, lot: _Lot) -> Tensor:
    """The place of a lot in a result with a head for each query head, (b, h, n, C, ..)."""
    return x[lot.batch, lot.heads, lot.tokens].unflatten(2, (-1, lot.chunk))


def _store(x: Tensor, value: Tensor) -> None:
    """Put (b h n, C, E) into its place (b, h, n, C, E), unless it is there already."""
    if value.data_ptr() != x.data_ptr():
        x.copy_(value.view(x.shape))


def _place(work: _Work, name: str, x: Tensor) -> Tensor:
    """The place of a result as (b h n, C, E) where it is dense in memory, else a buffer.

    Batched products write other places one matrix at a time.
    """
    if x.is_contiguous():
        return x.view(-1, *x.shape[3:])
    return work.buffer(name, x.shape[0] * x.shape[1] * x.shape[2], *x.shape[3:])


def _forward(
    work: _Work, out: Tensor, before: Tensor | None, after: Tensor, keep: bool
) -> list[Tensor]:
    """Fill outputs and final states; the states before the lots where `keep`."""
    kept = []
    inputs = (work.q, work.k, work.v)
    state = after
    for lot in work.lots:
        q, k, v = (work.load(n, x, lot) for n, x in zip("qkv", inputs, strict=True))
        if lot.first:
            state = _first(before, after, lot)
        elif keep:
            kept.append(state)
        reach = work.scaled("reach", q, work.rows(lot))
        lasting = work.scaled("lasting", k, work.columns(lot))
        q, k, v = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        states, state = work.states("states", lot, lasting, v, state, reverse=False)
        products = work.buffer("products", len(q), lot.chunk, lot.chunk)
        work.pairs(torch.bmm(q, k.mT, out=products), lot)
        target = _cut(out, lot)
        y = _place(work, "y", target)
        torch.bmm(products, v, out=y)
        y.baddbmm_(reach, states)
        _store(target, y)
        if lot.last:
            after[lot.state, lot.heads] = state.unflatten(2, (work.key, work.value))
    return kept


def _first(before: Tensor | None, like: Tensor, lot: _Lot) -> Tensor:
    """State that a sequence starts from, (b, h, D E)."""
    if before is None:
        return torch.zeros_like(like[lot.state, lot.heads]).flatten(2)
    return before[lot.state, lot.heads].to(like.dtype).flatten(2)


def _backward(
    work: _Work,
    grad: Tensor,
    d_after: Tensor | None,
    before: Tensor | None,
    kept: list[Tensor],
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, of k and v with a head for each query head, and of the `count` states."""
    inputs = (work.q, work.k, work.v)
    shape = work.q.shape
    dq, dk = (work.empty(*shape) for _ in range(2))
    dv = work.empty(*shape[:3], work.value)
    d_before = work.empty(count, work.heads, work.key, work.value).zero_()
    if d_after is not None:
        d_before += d_after  # of an empty sequence, and the start of the way back of the others
    left = list(kept)
    back = d_before
    for lot in reversed(work.lots):
        q, k, v = (work.load(n, x, lot) for n, x in zip("qkv", inputs, strict=True))
        g = work.load("g", grad, lot).flatten(0, 2)
        rows, columns = work.rows(lot), work.columns(lot)
        if lot.last:
            back = d_before[lot.state, lot.heads].flatten(2)
        state = _first(before, d_before, lot) if lot.first else left.pop()
        reach, lasting = work.scaled("reach", q, rows), work.scaled("lasting", k, columns)
        q, k, v = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        states, _ = work.states("states", lot, lasting, v, state, reverse=False)
        later, back = work.states("later", lot, reach, g, back, reverse=True)
        targets = [_cut(x, lot) for x in (dq, dk, dv)]
        a, b, c = (_place(work, n, x) for n, x in zip("abc", targets, strict=True))
        torch.bmm(g, states.mT, out=a)
        torch.bmm(v, later.mT, out=b)
        torch.bmm(lasting, later, out=c)
        if not work.tables.plain:
            a.view(targets[0].shape).mul_(rows)
            b.view(targets[1].shape).mul_(columns)
        products = work.buffer("products", len(q), lot.chunk, lot.chunk)
        c.baddbmm_(work.pairs(torch.bmm(q, k.mT, out=products), lot).mT, g)
        work.pairs(torch.bmm(g, v.mT, out=products), lot)
        a.baddbmm_(products, k)
        b.baddbmm_(products.mT, q)
        for x, value in zip(targets, (a, b, c), strict=True):
            _store(x, value)
        if lot.first:
            d_before[lot.state, lot.heads] = back.unflatten(2, (work.key, work.value))
    return dq, dk, dv, d_before


class _Segments(torch.autograd.Function):
    """Linear attention of (B, H, N, D); nothing of size N x N or N x D x E is made."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        log_decay: Tensor | None,
        chunk: int,
        bounds: list[int] | None,
        plain: Plain,
    ) -> tuple[Tensor, Tensor]:
        """Outputs and final states."""
        with full_precision(q):
            work = _Work(q, k, v, log_decay, chunk, bounds)
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
        ctx.save_for_backward(q, k, v, state, log_decay, *kept)
        ctx.chunk, ctx.bounds, ctx.plain = chunk, bounds, plain
        return out.to(v.dtype), after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the first states."""
        q, k, v, state, log_decay, *kept = ctx.saved_tensors
        inputs = (q, k, v, state)
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            found = _through(ctx, inputs, needed, log_decay, grads)
            return (*found, None, None, None, None)
        grad, d_after = grads
        with full_precision(q):
            work = _Work(q, k, v, log_decay, ctx.chunk, ctx.bounds)
            if grad is None:
                grad = q.new_zeros(1).expand(*q.shape[:3], work.value)
            count = len(q) if ctx.bounds is None else len(ctx.bounds) - 1
            dq, dk, dv, d_before = _backward(work, grad, d_after, state, kept, count)
            if work.share > 1:
                dk, dv = (x.unflatten(1, (-1, work.share)).sum(2) for x in (dk, dv))
        found = [
            d.to(x.dtype) if x is not None and wanted else None
            for d, x, wanted in zip((dq, dk, dv, d_before), inputs, needed, strict=True)
        ]
        return (*found, None, None, None, None)


def _through(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    log_decay: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the plain form."""
    q, k, v, state = inputs
    outs = ctx.plain(q, k, v, log_decay, state, ctx.chunk, ctx.bounds)
    pairs = [(y, g) for y, g in zip(outs, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [x for x, flag in zip(inputs, needed, strict=True) if flag and x is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(found) if flag else None for flag in needed]
