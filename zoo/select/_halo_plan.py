"""Windows on the axes of a grid, and how a grid is cut into blocks: `zoo.select._halo`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Pairs whose scores are computed at once, in elements of a buffer: two of them stay in the cache.
BUDGET = 2**18
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
        offsets: Where a flattened table of relative positions has the entry of a pair, of the same
            shape; pairs that may not meet point behind its end. None where no table was announced.
    """

    rows: slice
    keys: slice
    mask: Tensor
    offsets: Tensor | None = None


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


def _gaps(rows: Tensor, keys: Tensor, window: Window) -> Tensor:
    """Entries along one axis of a table of relative positions, clipped outside of windows."""
    return torch.clamp(keys - rows + window.width - 1, min=0, max=2 * window.width - 2)


def _axis(size: int, tile: int, window: Window) -> tuple[list[Tile], int, Tensor, Tensor]:
    """Cut a further axis: its tiles, their keys, who sees whom, and gaps, (tiles, rows, keys)."""
    index = torch.arange(size)
    first, stop = window.bounds(index, size)
    starts = range(0, size, tile)
    ends = [min(s + tile, size) for s in starts]
    wide = max(int(stop[e - 1] - first[s]) for s, e in zip(starts, ends, strict=True))
    tiles, seen = [], torch.ones(len(ends), tile, wide, dtype=torch.bool)
    gaps = torch.zeros(seen.shape, dtype=torch.int64)
    for n, (s, e) in enumerate(zip(starts, ends, strict=True)):
        left = min(int(first[s]), size - wide)
        tiles.append(Tile(slice(s, e), slice(left, left + wide)))
        # Rows that fill up the last tile see everything, and nothing comes of it.
        seen[n, : e - s] = window.allowed(index[s:e, None], index[left : left + wide], size)
        gaps[n, : e - s] = _gaps(index[s:e, None], index[left : left + wide], window)
    return tiles, wide, seen, gaps


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of two axes, (tiles, rows, keys) each, as two factors of the shape of their product."""
    sizes = [x * y for x, y in zip(a.shape, b.shape, strict=True)]
    shape = [n for pair in zip(a.shape, b.shape, strict=True) for n in pair]
    wide = a[:, None, :, None, :, None].expand(shape), b[None, :, None, :, None].expand(shape)
    return wide[0].reshape(sizes), wide[1].reshape(sizes)


@lru_cache(maxsize=32)
def make_plan(
    shape: tuple[int, ...],
    windows: tuple[Window, ...],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...] | None = None,
    relative: bool = False,
) -> Plan:
    """Cut a grid into blocks.

    Args:
        shape: Lengths of its axes, at least 1.
        windows: The window of each axis.
        batch: Heads of all samples.
        dtype: Of the scores.
        device: Where the masks go.
        sizes: Queries of a block along each axis; default by a rough estimate of the time.
        relative: Make the offsets into a table of relative positions.
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
        strips = tuple(itertools.product(*(axis[0] for axis in axes)))
        # Pairs along the further axes and their entries, (strips, rows, keys).
        across, entries = torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1).long()
        table = 1
        for (_, _, seen, gaps), window in zip(axes, windows[1:], strict=True):
            across = torch.logical_and(*_product(across, seen))
            before, here = _product(entries, gaps)
            entries = before * (2 * window.width - 1) + here
            table *= 2 * window.width - 1
        alike = bool((across == across[:1]).all())
        if alike and not (relative and bool((entries != entries[:1]).any())):
            across, entries = across[:1], entries[:1]
        high, wide = across.shape[1:]
        blocks, known = [], dict[tuple[Any, ...], tuple[Tensor, Tensor | None]]()
        index = torch.arange(shape[0])
        first, stop = windows[0].bounds(index, shape[0])
        for s in range(0, shape[0], sizes[0]):
            e = min(s + sizes[0], shape[0])
            left, right = int(first[s]), int(stop[e - 1])
            # Blocks that see the same relative to themselves share a mask.
            key = (e - s, right - left, *(first[s:e] - left).tolist(), *(stop[s:e] - left).tolist())
            key = (*key, left - s) if relative else key
            if key not in known:
                pairs = index[s:e, None], index[left:right]
                along = windows[0].allowed(*pairs, shape[0])[None]
                seen = torch.logical_and(*_product(along, across))
                mask = torch.zeros(seen.shape, dtype=dtype)
                mask = mask.masked_fill_(~seen, -torch.inf).to(device)
                offsets = None
                if relative:
                    down, here = _product(_gaps(*pairs, windows[0])[None], entries)
                    behind = table * (2 * windows[0].width - 1)
                    offsets = (down * table + here).masked_fill_(~seen, behind).int().to(device)
                known[key] = mask, offsets
            rows, keys = slice(s * high, e * high), slice(left * wide, right * wide)
            blocks.append(Block(rows, keys, *known[key]))
        tile_rows = tuple(axis[2].shape[1] for axis in axes)
        tile_keys = tuple(axis[1] for axis in axes)
    return Plan(shape, strips, tile_rows, tile_keys, tuple(blocks))
