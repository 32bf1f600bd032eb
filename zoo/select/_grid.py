"""Windows of tokens on a grid: who sees whom, and the residue classes of a dilation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.select._halo import halo_attention
from zoo.select._halo_plan import Window


@dataclass(frozen=True)
class Grid:
    """Tokens in reading order behind some that everyone sees and that see everyone.

    Args:
        shape: Lengths of the axes.
        windows: The window of each axis, counted within a residue class.
        dilation: Distance of neighbours along each axis.
        prefix: Tokens in front.
    """

    shape: tuple[int, ...]
    windows: tuple[Window, ...]
    dilation: tuple[int, ...]
    prefix: int = 0

    @property
    def length(self) -> int:
        """Tokens, those in front included."""
        return math.prod(self.shape) + self.prefix

    def coordinates(self, index: Tensor) -> list[Tensor]:
        """Coordinates along each axis of tokens behind the prefix."""
        found = []
        for size in reversed(self.shape[1:]):
            found.append(index % size)
            index = index // size
        return [index, *reversed(found)]

    def allowed(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Whether rows may see keys, indices that broadcast against each other."""
        if self.prefix:
            plain = replace(self, prefix=0)
            inside = plain.allowed(rows - self.prefix, keys - self.prefix)
            return (rows < self.prefix) | (keys < self.prefix) | inside
        mask = None
        pairs = zip(self.coordinates(rows), self.coordinates(keys), strict=True)
        for (i, j), window, step, size in zip(
            pairs, self.windows, self.dilation, self.shape, strict=True
        ):
            seen = axis_allowed(i, j, window, step, size)
            mask = seen if mask is None else mask & seen
        assert mask is not None
        return mask

    def offsets(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Index into the flattened table of relative positions, (prod(2 w - 1)); clipped outside.

        Args:
            rows: Indices behind the prefix that broadcast against those of the keys.
            keys: Indices behind the prefix.
        """
        index: Tensor | int = 0
        pairs = zip(self.coordinates(rows), self.coordinates(keys), strict=True)
        for (i, j), window, step in zip(pairs, self.windows, self.dilation, strict=True):
            wide = 2 * window.width - 1
            gap = torch.clamp(j // step - i // step + window.width - 1, min=0, max=wide - 1)
            index = index * wide + gap
        assert isinstance(index, Tensor)
        return index

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Who sees whom, (N, N)."""
        index = torch.arange(self.length, device=device)
        return self.allowed(index[:, None], index)

    def table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys of each query behind the prefix, (S, prod(w)) indices, and which of them count."""
        keys, counts = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        for window, step, size in zip(self.windows, self.dilation, self.shape, strict=True):
            i = torch.arange(size)
            first, stop = window.bounds(i // step, class_sizes(i, step, size))
            along = first[:, None] + torch.arange(window.width)
            here = along < stop[:, None]
            along = along * step + (i % step)[:, None]
            along = torch.where(here, along, i[:, None])
            keys = keys[:, None, :, None] * size + along[None, :, None, :]
            counts = counts[:, None, :, None] & here[None, :, None, :]
            keys, counts = (x.flatten(0, 1).flatten(1, 2) for x in (keys, counts))
        return keys.to(device), counts.to(device)


def class_sizes(index: Tensor, step: int, size: Tensor | int) -> Tensor | int:
    """Number of tokens in the residue class of each index."""
    return size if step == 1 else size // step + (index % step < size % step)


def axis_allowed(i: Tensor, j: Tensor, window: Window, step: int, size: Tensor | int) -> Tensor:
    """Whether queries i may see keys j along one axis with a dilation."""
    if step == 1:
        return window.allowed(i, j, size)
    seen = window.allowed(i // step, j // step, class_sizes(i, step, size))
    return seen & (i % step == j % step)


def _classes(size: int, step: int) -> list[Tensor]:
    """Coordinates of the residue classes of an axis, (classes, length), those of a length in one.

    The first ``size % step`` classes have one token more than the others.
    """
    short, more = divmod(size, step)
    found = []
    if more:
        found.append(torch.arange(short + 1)[None] * step + torch.arange(more)[:, None])
    if short:
        found.append(torch.arange(short)[None] * step + torch.arange(more, step)[:, None])
    return found


def _residues(grid: Grid) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Shape of a class and the tokens of all classes of this shape, (classes, tokens)."""
    axes = [_classes(n, d) for n, d in zip(grid.shape, grid.dilation, strict=True)]
    for combination in itertools.product(*axes):
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        for coordinates, size in zip(combination, grid.shape, strict=True):
            tokens = tokens[:, None, :, None] * size + coordinates[None, :, None, :]
            tokens = tokens.flatten(0, 1).flatten(1, 2)
        yield tuple(int(c.shape[1]) for c in combination), tokens


def window_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    scale: float,
    rpb: Tensor | None = None,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
    sizes: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within the windows of a grid without prefix, by blocks with halos.

    A dilation splits the grid into residue classes first, each of them a grid without dilation.

    Args:
        q: (B, H, S, D).
        k: (B, G, S, D), G dividing H.
        v: (B, G, S, E).
        grid: The grid.
        scale: Factor on dot products.
        rpb: Added to the scores by the distance within the residue class, (H, 2 w - 1, ..).
        key_bias: Added to the scores of keys, a constant, (B|1, S).
        dropout: On the weights.
        sizes: Queries of a block along each axis; default by size.

    Returns:
        Outputs (B, H, S, E) and the logarithms of the rows' sums (B, H, S).
    """

    def windows(
        q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, ...], key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return halo_attention(
            q, k, v, shape, grid.windows, scale=scale, rpb=rpb, key_bias=key_bias,
            dropout=dropout, sizes=sizes,
        )  # fmt: skip

    if all(step == 1 for step in grid.dilation) or not grid.length:
        return windows(q, k, v, grid.shape, key_bias)
    outs, lses, order = [], [], []
    for shape, tokens in _residues(grid):
        index = tokens.flatten().to(q.device)
        # Classes are samples of their own: (B, H, classes * tokens, D) to (B * classes, H, ..).
        parts = [
            x.index_select(2, index).unflatten(2, tokens.shape).transpose(1, 2).flatten(0, 1)
            for x in (q, k, v)
        ]
        near = key_bias
        if near is not None:
            near = near.expand(len(q), -1).index_select(1, index).view(-1, tokens.shape[1])
        found = windows(parts[0], parts[1], parts[2], shape, near)
        out, lse = (x.unflatten(0, (-1, len(tokens))).transpose(1, 2).flatten(2, 3) for x in found)
        outs.append(out)
        lses.append(lse)
        order.append(index)
    back = torch.cat(order).argsort()
    return torch.cat(outs, 2).index_select(2, back), torch.cat(lses, 2).index_select(2, back)
