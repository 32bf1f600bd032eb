"""Where the blocks of MoBA are, who chose them, and how its kernels are cut: `zoo.kernels.moba`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels.common import INTERPRET, block_d, head


class Tables(NamedTuple):
    """Where blocks and rows are, int32; the same for all heads and samples.

    Args:
        starts: First token of each block, (blocks,).
        stops: Token after its last one; blocks that do not exist are empty.
        begins: First token of each row's own block, (N,).
        numbers: Number of a row's own block within its sequence, (N,).
        base: Number of the first block of a row's sequence among all blocks, (N,).
    """

    starts: Tensor
    stops: Tensor
    begins: Tensor
    numbers: Tensor
    base: Tensor


class Tile(NamedTuple):
    """How a kernel is launched: rows and columns of its tiles, warps, stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def count_blocks(tokens: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Most blocks that there can be; without a look at where sequences end."""
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (tokens + sequences * (block - 1)) // block


def tables(tokens: int, block: int, cu_seqlens: Tensor | None, device: torch.device) -> Tables:
    """Tables of sequences packed one after the other, or of a single one."""
    blocks = count_blocks(tokens, block, cu_seqlens)
    row = torch.arange(tokens, device=device)
    number = torch.arange(blocks, device=device)
    if cu_seqlens is None:
        begins, index, base = row // block * block, row // block, torch.zeros_like(row)
        starts = number * block
        limits = torch.full_like(starts, tokens)
    else:
        cu = cu_seqlens.long()
        until = ((cu.diff() + block - 1) // block).cumsum(0)  # blocks of this and earlier sequences
        before = torch.cat([until.new_zeros(1), until])
        sequence = torch.searchsorted(cu, row, right=True) - 1
        index = (row - cu[sequence]) // block
        begins, base = cu[sequence] + index * block, before[sequence]
        sequence = torch.searchsorted(until, number, right=True)
        # Numbers beyond the last block belong to the sequence after the last: no tokens.
        starts = cu[sequence] + (number - before[sequence]) * block
        limits = torch.cat([cu[1:], cu[-1:]])[sequence]
    stops = torch.minimum(starts + block, limits)
    return Tables(*(x.clamp(max=tokens).int() for x in (starts, stops, begins, index, base)))


def lists(chosen: Tensor, where: Tables) -> tuple[Tensor, Tensor]:
    """The choices (B, H, N, P) sorted by head and block.

    Returns:
        slots: Choices within their head, (B H N P,) int32; those of no block at each head's end.
        ends: Where each block's choices begin among all, (B H, blocks + 1) int64.
    """
    heads, choices = chosen.shape[0] * chosen.shape[1], chosen.shape[2] * chosen.shape[3]
    blocks = where.starts.shape[0]
    past = (chosen >= 0) & (chosen < where.numbers[:, None])
    key = torch.where(past, chosen + where.base[:, None], blocks).view(heads, choices)
    count = heads * (blocks + 1)
    # The fewer bytes a key has, the fewer passes sorting takes.
    dtype = next(t for t in (torch.int16, torch.int32, torch.int64) if count <= torch.iinfo(t).max)
    every = torch.arange(count, device=chosen.device).view(heads, blocks + 1)
    key, order = (key + every[:, :1]).to(dtype).flatten().sort(stable=True)
    ends = torch.searchsorted(key, every.to(dtype))
    return (order % max(choices, 1)).int(), ends


def gather_tiles(ends: Tensor, choices: int, size: int) -> tuple[int, Tensor, Tensor]:
    """Cut every block's gathered rows into tiles.

    Args:
        ends: (B H, blocks + 1).
        choices: Choices of a head.
        size: Rows of a tile.

    Returns:
        The most tiles that a head can have; the block of each of them, (B H, tiles) int32, the
        number of blocks beyond the last tile; tiles up to and with each block, (B H, blocks) int32.
    """
    blocks = ends.shape[1] - 1
    tiles = (choices + blocks * (size - 1)) // size
    until = ((ends.diff(dim=1) + size - 1) // size).cumsum(1)
    number = torch.arange(tiles, device=ends.device).expand(ends.shape[0], tiles).contiguous()
    return tiles, torch.searchsorted(until, number, right=True, out_int32=True), until.int()


def tile(q: Tensor, v: Tensor, block: int, *, backward: bool = False) -> Tile:
    """Sizes as an H200 likes them; small ones in the interpreter, where tests need many tiles."""
    if INTERPRET:
        return Tile(32, min(32, block_d(block)), 4, 1)
    row = max(block_d(q.shape[-1]), block_d(v.shape[-1])) * q.element_size()
    if q.dtype == torch.float32:  # exact products keep their operands in registers
        size = Tile(32, 32, 8, 1)
    elif row > 256:
        size = Tile(64, 32, 4, 2) if not backward else Tile(32, 32, 4, 2)
    else:
        size = Tile(64, 64, 4, 2 if backward else 3)
    return size._replace(columns=min(size.columns, block_d(block)))


def options(q: Tensor, k: Tensor, v: Tensor, size: Tile) -> dict[str, Any]:
    """What kernels are compiled for and launched with."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD": head(q, v),
        "BM": size.rows,
        "BN": size.columns,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }
