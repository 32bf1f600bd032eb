"""A table of relative positions in `zoo.select._halo`: added by the block, summed by the block.

The table (H, 2 w - 1, ..) has an entry for each head and each distance of a key from a query. The
entries of a block's pairs are looked up once for all samples of a head, with -inf for pairs that
may not meet, and take the place of the block's mask. Blocks that look the same relative to
themselves share what was looked up, so the memory does not grow with the first axis of the grid.

    bias_b[r, k]  = table[offset_b[r, k]]                        r, k the rows and keys of block b
    dtable[t]     = sum over samples, blocks and pairs with offset_b[r, k] = t of ds[r, k]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.select._halo_plan import Block


class Table:
    """Entries of a table for blocks, and the gradients of the entries.

    Args:
        entries: (H, T), in the units of the scores.
        dtype: Of the scores.
        samples: Heads of the pass that share a row of the table; they follow one another.
    """

    def __init__(self, entries: Tensor, dtype: torch.dtype, samples: int) -> None:
        self.entries = F.pad(entries.to(dtype), (0, 1), value=-torch.inf)
        self.samples = samples
        self.sums = torch.zeros_like(self.entries)
        self.head = -1
        self.known: dict[int, Tensor] = {}
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}

    def turn_to(self, head: int) -> None:
        """Take another head; what was looked up or collected for the last one is done with."""
        if head != self.head:
            self._settle()
            self.known, self.head = {}, head

    def bias(self, block: Block) -> Tensor:
        """The entries of a block's pairs for this head, (1 or strips, R, K), -inf for hidden."""
        assert block.offsets is not None
        found = self.known.get(id(block.offsets))
        if found is None:
            flat = self.entries[self.head].index_select(0, block.offsets.view(-1))
            found = self.known[id(block.offsets)] = flat.view(block.offsets.shape)
        return found

    def collect(self, block: Block, share: slice, ds: Tensor) -> None:
        """Take gradients of the scores of some strips of this head, (strips, R, K)."""
        offsets = block.offsets
        assert offsets is not None
        if id(offsets) not in self.pending:
            self.pending[id(offsets)] = offsets, ds.new_zeros(offsets.shape)
        total = self.pending[id(offsets)][1]
        if len(ds) % len(total):  # some strips of one sample
            total[share] += ds
        else:
            total += ds.view(-1, *total.shape).sum(0)

    def _settle(self) -> None:
        for offsets, total in self.pending.values():
            self.sums[self.head].index_add_(0, offsets.view(-1), total.view(-1))
        self.pending = {}

    def gradient(self) -> Tensor:
        """Gradients of all entries, (H, T)."""
        self._settle()
        return self.sums[:, :-1]
