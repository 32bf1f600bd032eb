"""Work of chunked linear attention on a CPU: how it is cut into lots, their tables and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zoo.ops._linear_features import activate, activate_backward

# Tokens of a segment, all heads counted, and of one head: its states cost the square of that.
SEGMENT = 4096
STRETCH = 1024


class Tables:
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
class Lot:
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


def cut_lots(shape: torch.Size, chunk: int, bounds: list[int] | None) -> Iterator[Lot]:
    """Cut a pass over (B, H, N, ..) into lots, a sequence from its first token to its last."""
    samples, heads, length = shape[:3]
    # Buffers are new to the memory of each pass, so few tokens get small ones.
    segment = max(min(SEGMENT, STRETCH), min(SEGMENT, samples * heads * length // 4))
    for s in range(1 if bounds is None else len(bounds) - 1):
        start, stop = (0, length) if bounds is None else bounds[s : s + 2]
        size = stop - start
        if not size:
            continue
        deep = max(1, segment // min(size, STRETCH))
        wide = min(samples, max(1, deep // heads))
        deep = min(deep, heads)
        step = max(chunk, min(segment, STRETCH) // chunk * chunk)
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
                    yield Lot(states, batch, lot, slice(i, j), short, i == start, j == stop)


class Work:
    """Inputs in enough precision, tables and buffers of a pass."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        chunk: int,
        bounds: list[int] | None,
        act: str = "none",
        turns: tuple[Tensor, ...] = (),
    ) -> None:
        self.act, self.turns = act, turns  # cosines and sines, (1 or B, H, N, D)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = q, k, v
        self.heads, self.share = q.shape[1], q.shape[1] // k.shape[1]
        self.key, self.value = q.shape[3] * (2 if turns else 1), v.shape[3]
        self.lots = list(cut_lots(q.shape, chunk, bounds))
        self.chunk = max((lot.chunk for lot in self.lots), default=1)
        chunks = max((lot.chunks for lot in self.lots), default=1)
        self.tables = Tables(log_decay, self.heads, self.chunk, chunks, self.dtype)
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

    def part(self, x: Tensor, lot: Lot) -> Tensor:
        """What a lot sees of an input, (b, h, n, C, ..), as it lies in memory."""
        if x.shape[1] == self.heads:
            part = x[lot.batch, lot.heads, lot.tokens]
        else:
            groups = torch.arange(lot.heads.start, lot.heads.stop) // self.share
            part = x[lot.batch, :, lot.tokens].index_select(1, groups)
        return part.unflatten(2, (-1, lot.chunk))

    def load(self, name: str, x: Tensor, lot: Lot) -> Tensor:
        """The same dense and in enough precision.

        Rows that are far apart in memory fall on few places of a cache, and are read many times.
        """
        part = self.part(x, lot)
        if part.dtype != self.dtype or not part.is_contiguous():
            part = self.buffer(name, *part.shape).copy_(part)
        return part

    def turned(self, lot: Lot) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a lot, (1 or b, h, n, C, D)."""
        cos, sin = (
            x[lot.batch if len(x) > 1 else slice(0, 1), lot.heads, lot.tokens] for x in self.turns
        )
        return cos.unflatten(2, (-1, lot.chunk)), sin.unflatten(2, (-1, lot.chunk))

    def featured(self, name: str, x: Tensor, lot: Lot) -> Tensor:
        """Queries or keys of a lot after the features, dense, (b, h, n, C, D or 2 D)."""
        raw = self.load(f"raw {name}", x, lot)
        if self.act != "none":
            room = self.buffer("act" if self.turns else name, *raw.shape)
            raw = activate(self.act, raw, room)
        if not self.turns:
            return raw
        width = raw.shape[-1]
        both = self.buffer(name, *raw.shape[:-1], 2 * width)
        for half, table in zip(both.split(width, -1), self.turned(lot), strict=True):
            torch.mul(raw, table, out=half)
        return both

    def unfeatured(self, name: str, grad: Tensor, x: Tensor, lot: Lot, target: Tensor) -> None:
        """Gradient of queries or keys before the features into its place, from that after them.

        To be called after `featured`, whose dense copy of `x` is still there.
        """
        if self.turns:
            width = target.shape[-1]
            grad = grad.view(*target.shape[:-1], 2 * width)
            (a, b), (cos, sin) = grad.split(width, -1), self.turned(lot)
            room = self.buffer("d_act", *target.shape)
            grad = torch.mul(a, cos, out=room).addcmul_(b, sin)
        if self.act == "none":
            store(target, grad)
            return
        part = self.part(x, lot)
        if part.dtype != self.dtype or not part.is_contiguous():
            part = self.buffer(f"raw {name}", *part.shape)
        activate_backward(self.act, grad.view(target.shape), part, target)

    def angle(self, x: Tensor, grad: Tensor, lot: Lot, total: Tensor | None) -> Tensor:
        """Gradient of the angles of a lot, (b, h, T, D), from that of x; added to `total`.

        Args:
            x: Queries or keys after the features, (b h n, C, 2 D).
            grad: Their gradient.
            lot: The lot.
            total: What other tensors gave.
        """
        width = self.key // 2
        (xc, xs), (gc, gs) = x.split(width, -1), grad.split(width, -1)
        if total is None:
            flat = torch.mul(xc, gs, out=self.buffer("angle", *xc.shape))
        else:
            flat = total.view(xc.shape).addcmul_(xc, gs)
        flat.addcmul_(xs, gc, value=-1)
        return flat.view(-1, lot.heads.stop - lot.heads.start, lot.chunks * lot.chunk, width)

    def scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply by a table, into a buffer, (b h n, C, ..); x itself where nothing decays."""
        if self.tables.plain:
            return x.flatten(0, 2)
        return torch.mul(x, factor, out=self.buffer(name, *x.shape)).flatten(0, 2)

    def rows(self, lot: Lot) -> Tensor:
        """Decay of the state before a chunk for each of its rows."""
        return self.tables.row[lot.heads, :, : lot.chunk]

    def columns(self, lot: Lot) -> Tensor:
        """Decay of each token to the end of its chunk."""
        return self.tables.column[lot.heads, :, self.chunk - lot.chunk :]

    def pairs(self, products: Tensor, lot: Lot) -> Tensor:
        """Decay products (b h n, C, C) in place, and hide the future."""
        if self.tables.plain:
            return products.tril_()
        table = self.tables.pairs[lot.heads, :, : lot.chunk, : lot.chunk]
        products.view(-1, *table.shape[:1], lot.chunks, lot.chunk, lot.chunk).mul_(table)
        return products

    def step(self, lot: Lot) -> Tensor | None:
        """Decay over one chunk, (h, 1), or None where nothing decays."""
        return None if self.tables.plain else self.tables.row[lot.heads, 0, lot.chunk - 1]

    def states(
        self, name: str, lot: Lot, a: Tensor, b: Tensor, state: Tensor, reverse: bool
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


def cut(x: Tensor, lot: Lot) -> Tensor:
    """The place of a lot in a result with a head for each query head, (b, h, n, C, ..)."""
    return x[lot.batch, lot.heads, lot.tokens].unflatten(2, (-1, lot.chunk))


def store(x: Tensor, value: Tensor) -> None:
    """Put (b h n, C, E) into its place (b, h, n, C, E), unless it is there already."""
    if value.data_ptr() != x.data_ptr():
        x.copy_(value.view(x.shape))


def place(work: Work, name: str, x: Tensor) -> Tensor:
    """The place of a result as (b h n, C, E) where it is dense in memory, else a buffer.

    Batched products write other places one matrix at a time.
    """
    if x.is_contiguous():
        return x.view(-1, *x.shape[3:])
    return work.buffer(name, x.shape[0] * x.shape[1] * x.shape[2], *x.shape[3:])
