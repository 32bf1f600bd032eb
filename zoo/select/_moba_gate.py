"""The gate of MoBA: which past blocks each query attends to. See `zoo.select.moba`.

Legend: B batch, H heads, G key heads, N queries, M keys, R rows of a strip, n blocks, P past blocks
to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from zoo.host import engine
from zoo.kernels import refuse
from zoo.parts import full_precision, grouped_matmul, widen

# Up to this many blocks are found one after the other, which is quicker than sorting.
FEW = 8
# A strip of gate scores is this part of the engine's strip, to stay in a core's own cache and
# waste little on blocks of the future.
SHARE = 8


@dataclass(frozen=True)
class Blocks:
    """Where the blocks lie. Those of all sequences are numbered through, for sums over them.

    Args:
        size: Tokens of a block.
        count: Blocks that may be chosen: all whole ones, and more where sequences are packed.
        own: Block of each query, numbered within its sequence, (N,).
        keys: The same of each key, (M,).
        first: Number of the first block of each query's sequence, (N,); None for a single one.
        of_key: Number of each key's block, (M,); None for a single sequence.
        bounds: Where packed sequences begin and end, (S + 1,); None for a single one.
    """

    size: int
    count: int
    own: Tensor
    keys: Tensor
    first: Tensor | None = None
    of_key: Tensor | None = None
    bounds: Tensor | None = None


def lay_blocks(
    queries: int, keys: int, size: int, cu_seqlens: Tensor | None, device: torch.device
) -> Blocks:
    """Lay blocks over `keys` tokens of which the last `queries` ask."""
    index = torch.arange(keys, device=device)
    if cu_seqlens is None:
        blocks = index // size
        return Blocks(size, keys // size, blocks[keys - queries :], blocks)
    starts = cu_seqlens.to(device=device, dtype=torch.int64)
    sequence = torch.searchsorted(starts, index, right=True) - 1
    blocks = (index - starts[sequence]) // size
    before = (starts.diff() + size - 1) // size
    first = (before.cumsum(0) - before)[sequence]
    count = keys // size + len(starts) - 1
    return Blocks(size, count, blocks, blocks, first, first + blocks, starts)


def _pool(x: Tensor, blocks: Blocks, dim: int) -> Tensor:
    """Sum the tokens along `dim` to the blocks of `blocks`."""
    if blocks.of_key is None:
        whole = x.narrow(dim, 0, blocks.count * blocks.size)
        return whole.unflatten(dim, (blocks.count, blocks.size)).sum(dim)
    shape = list(x.shape)
    shape[dim] = blocks.count
    return x.new_zeros(shape).index_add_(dim, blocks.of_key, x)


def block_means(k: Tensor, blocks: Blocks) -> Tensor:
    """Mean key of each block, (B, G, n, D), at least float32, from k (B, G, M, D)."""
    wide = widen(k)
    sums = _pool(wide, blocks, -2)
    if blocks.of_key is None:
        return sums / blocks.size
    ones = wide.new_ones(k.shape[2], 1)
    return sums / _pool(ones, blocks, -2).clamp(min=1)


def _pick(scores: Tensor, picks: int) -> Tensor:
    """Columns of the `picks` largest scores above -inf, (.., picks) int32, -1 where there are less.

    Among equals the first ones, so that there are never more and every device finds the same.
    """
    if picks > FEW:
        values, index = scores.sort(dim=-1, descending=True, stable=True)
        found = index[..., :picks].int().masked_fill(values[..., :picks] == -torch.inf, -1)
        lacking = max(0, picks - scores.shape[-1])
        return torch.nn.functional.pad(found, (0, lacking), value=-1)
    each = []
    for i in range(picks):
        value, index = scores.max(-1, keepdim=True)
        each.append(index.int().masked_fill_(value == -torch.inf, -1))
        if i + 1 < picks:
            scores = scores.scatter_(-1, index, -torch.inf)
    return torch.cat(each, -1)


def gate(
    q: Tensor,
    k: Tensor,
    blocks: Blocks,
    picks: int,
    *,
    mask: Tensor | None = None,
    means: Tensor | None = None,
    by_name: bool = False,
) -> Tensor:
    """The best past blocks of each query.

    Args:
        q: (B, H, N, D).
        k: (B, G, M, D), G dividing H.
        blocks: Where blocks lie.
        picks: P.
        mask: Boolean, True may attend, broadcastable to (B, H, N, M): hidden keys do not count in
            the means, and a block all of whose keys are hidden cannot be chosen.
        means: What `block_means` gives, where it is known.
        by_name: Whether the Triton kernel was asked for: then it may also run in the interpreter.
            It takes the work on a GPU anyway, where there is no mask and no mean is known.

    Returns:
        (B, H, N, P) int32, numbered within the sequence, best first, -1 where there are fewer.
    """
    samples, heads, length, _ = q.shape
    device = q.device
    if not picks or not blocks.count or not q.numel():
        return torch.full((samples, heads, length, picks), -1, dtype=torch.int32, device=device)
    if mask is None and means is None:
        found = _by_kernel(q, k, blocks, picks, by_name)
        if found is not None:
            return found
    with torch.no_grad(), full_precision(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        none = None  # blocks without a visible key
        if mask is not None and mask.shape[1] == mask.shape[2] == 1:
            counts = _pool(mask.to(wide), blocks, -1)  # (B or 1, 1, 1, n)
            means = _pool(k.to(wide).masked_fill(~mask.mT, 0.0), blocks, -2)
            means, none = means / counts.clamp(min=1).mT, counts == 0
        elif mask is not None:
            k = k.to(wide)
        elif means is None:
            means = block_means(k, blocks)
        width = k.shape[2] if means is None else blocks.count
        budget = engine.STRIP_BYTES.get(device.type, engine.STRIP_BYTES["cuda"]) // SHARE
        rows = max(engine.MIN_ROWS, budget // (samples * heads * width * wide.itemsize))
        rows = length if torch.compiler.is_compiling() else min(rows, length)
        parts = []
        for i in range(0, length, rows):
            part = slice(i, min(i + rows, length))
            own, columns = blocks.own[part], blocks.count
            if blocks.first is None and rows < length:
                # The last row has the longest past. (One column at least, for a maximum of it.)
                last = k.shape[2] - length + part.stop - 1
                columns = max(1, min(columns, last // blocks.size))
            q_rows = q[:, :, part].to(wide)
            if means is not None:
                scores = grouped_matmul(q_rows, means[:, :, :columns].mT)
                if none is not None:
                    scores.masked_fill_(none[..., :columns], -torch.inf)
            else:
                assert mask is not None
                scores = _mean_products(q_rows, k, blocks, _rows(mask, part))[..., :columns]
            number = torch.arange(columns, device=device)
            if blocks.first is None:
                past = number < own[:, None]
            else:
                first = blocks.first[part, None]
                past = (number >= first) & (number < first + own[:, None])
            best = _pick(scores.masked_fill_(~past, -torch.inf), picks)
            if blocks.first is not None:
                best = (best - first.int()).clamp_(min=-1)
            parts.append(best)
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _by_kernel(q: Tensor, k: Tensor, blocks: Blocks, picks: int, by_name: bool) -> Tensor | None:
    """What the Triton kernel chooses, or None where it cannot."""
    if refuse(q, k, head_dim=q.shape[-1], by_name=by_name) is not None:
        return None
    # (Compilers cannot ask for the transforms.)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return None
    kernel = import_module("zoo.kernels.moba_gate")  # imports triton
    if kernel.refuse_gate(q, k, picks, by_name=by_name) is not None:
        return None
    chosen: Tensor = kernel.choose(q, k, blocks.size, picks, blocks.bounds)
    return chosen


def _rows(mask: Tensor, part: slice) -> Tensor:
    return mask[:, :, part] if mask.shape[2] > 1 else mask


def _mean_products(q: Tensor, k: Tensor, blocks: Blocks, mask: Tensor) -> Tensor:
    """Mean of the products of q (B, H, R, D) with the visible keys of each block, (B, H, R, n)."""
    products = grouped_matmul(q, k.mT)
    counts = _pool(mask.to(q.dtype), blocks, -1)
    scores = _pool(products.masked_fill_(~mask, 0.0), blocks, -1) / counts.clamp(min=1)
    return scores.masked_fill_(counts == 0, -torch.inf)


def visible(chosen: Tensor, own: Tensor, keys: Tensor, count: int) -> Tensor:
    """Which keys rows may see by the choice of blocks alone, (B, H, R, M) boolean.

    Args:
        chosen: (B, H, R, P), -1 for none.
        own: Block of each row, (R,).
        keys: Block of each key, (M,).
        count: Blocks that there can be.
    """
    every = torch.cat([chosen.long(), own[:, None].expand(*chosen.shape[:3], 1)], -1) + 1
    seen = torch.zeros(*chosen.shape[:3], count + 1, dtype=torch.bool, device=chosen.device)
    return seen.scatter(-1, every, True)[..., 1:].index_select(-1, keys)
