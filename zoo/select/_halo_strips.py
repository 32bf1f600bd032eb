"""A grid laid out as strips, for `zoo.select._halo`, and its passes in plain operations.

The plain form can be differentiated any number of times; it keeps all scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.select._halo_plan import Plan


class Room:
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


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    rpb: Tensor | None,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`zoo.select._halo` in operations that can be differentiated any number of times."""
    q, k, v = _cut_plain(q, plan, False), _cut_plain(k, plan, True), _cut_plain(v, plan, True)
    outs, logs = [], []
    for block in plan.blocks:
        s = (q[:, block.rows] @ k[:, block.keys].mT) * scale
        strips = s.unflatten(0, (-1, block.mask.shape[0])) + block.mask
        if rpb is not None:
            assert block.offsets is not None
            entries = F.pad(rpb.to(s.dtype), (0, 1))[:, None, block.offsets.long()]
            strips = (strips.unflatten(0, (len(rpb), -1)) + entries).flatten(0, 1)
        s = strips.flatten(0, 1)
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
        parts.append(F.pad(part, room).flatten(1, -2))
    return torch.stack(parts, 1).flatten(0, 1)


def _join_plain(strips: Tensor, plan: Plan) -> Tensor:
    """As `_join` for queries, out of place."""
    if not plan.copies:
        return strips
    parts = strips.view(-1, len(plan.strips), plan.shape[0], *plan.rows, strips.shape[-1])
    index = torch.arange(1, 1 + math.prod(plan.shape)).view(1, -1, 1)
    order = Room(plan, False, index, 1).load(index).view(-1)  # 0 in rows that fill up a tile
    place = torch.zeros(len(order) + 1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    return parts.flatten(1, -2).index_select(1, place[1 : index.numel() + 1].to(strips.device))
