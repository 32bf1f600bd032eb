"""Retrieval for landmark attention: a query sees the finished blocks whose landmarks it likes best.

The cache holds the tokens of finished blocks, not rotated, and those of the block that is not
finished yet. New tokens come as a chunk of queries. Each scores the landmarks of all finished
blocks, takes the best k, and attends to [those k in time order, the unfinished block, the chunk] by
the weights of `by_blocks`, as if the k were all there had been. So even the block before the
current one is seen only if it is chosen.

Positions are stingy, so that none is beyond those of training: k + 1 slots of L + 1 positions come
before the unfinished block. To be scored, the landmarks of the latest k blocks stand in slots 1 to
k and all older ones in slot 0. Of the chosen blocks the j-th (from 0) then stands in slot j, or in
j + 1 if it is among the latest k. The unfinished block begins at slot k + 1, or, while there are
fewer finished blocks, right behind as many slots. With fewer than k all of them stand where they
were. With k the official code (which cannot do with fewer) already shifts each by a slot, the last
one onto the unfinished block; we follow it.

A block that the first token of a chunk finishes counts as finished for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.host import engine
from zoo.normalize._landmark_weights import by_blocks
from zoo.parts import Call, Host, Position, grouped_matmul, widen

if TYPE_CHECKING:
    from zoo.cache import LayerCache
    from zoo.normalize.landmark import Landmark

SELECTIONS = ("token_head", "max_heads", "max_tokens")
# Names in the cache: unfinished tokens (B, G, n, D), landmarks' keys (B, blocks, G, D), and
# ordinary keys and values of finished blocks (B, blocks, G, L, D).
TAIL_K, TAIL_V = "landmark_unfinished_k", "landmark_unfinished_v"
MARKS, BLOCKS_K, BLOCKS_V = "landmark_keys", "landmark_blocks_k", "landmark_blocks_v"


@dataclass
class _Found:
    """Chosen blocks.

    Args:
        index: Which, in time order, (B, H, N or 1, k).
        late: Which of them stand one slot later.
    """

    index: Tensor
    late: Tensor


def recall(part: Landmark, host: Host, call: Call) -> Tensor:
    """Outputs of the heads (B, H, N, E) for new tokens, which go into the cache.

    Args:
        part: The part, with its options.
        host: Its host, whose positions rotate.
        call: New q (B, H, N, D), k (B, G, N, D), v (B, G, N, E), not rotated, and the cache.

    Raises:
        ZooError: In training, or with a mask, a bias or positions.
    """
    if part.training:
        raise ZooError(
            f"'landmark' with retrieve={part.retrieve} retrieves from a cache outside training "
            "only; call eval() first"
        )
    start, length = call.q_start, call.q.shape[2]
    for name, given in (("mask", call.mask), ("bias", call.bias)):
        if given is not None:
            raise ZooError(f"'landmark' with retrieve={part.retrieve} takes no {name} with a cache")
    usual = torch.arange(start, start + length, device=call.q.device)
    if not call.q_pos.is_meta and not torch.equal(call.q_pos, usual.expand(call.q_pos.shape)):
        raise ZooError(
            f"'landmark' with retrieve={part.retrieve} places tokens by itself; it takes no "
            "positions with a cache"
        )
    assert call.cache is not None
    if not length:
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    memory = Memory(part, host, call.cache)
    # The landmark that ends the unfinished block comes first and alone.
    first = 1 if start % (part.block + 1) == part.block else 0
    sizes = [size for size in (first, length - first) if size]
    pieces = zip(*(x.split(sizes, 2) for x in (call.q, call.k, call.v)), strict=True)
    outs = []
    for q, k, v in pieces:
        outs.append(memory.attend(q, k, v))
        memory.append(k, v)
    return torch.cat(outs, 2)


class Memory:
    """The finished and unfinished blocks of a layer.

    Args:
        part: The part, with its options.
        host: Its host.
        cache: Where the blocks are kept.
    """

    def __init__(self, part: Landmark, host: Host, cache: LayerCache) -> None:
        assert part.retrieve is not None
        self.part, self.cache, self.scale = part, cache, host.scale
        self.top, self.block, self.span = part.retrieve, part.block, part.block + 1
        self.heads, self.groups = host.layout.score_heads, host.layout.k_heads
        self.position: Position | None = host.position if host.position.rotates else None

    @property
    def blocks(self) -> int:
        """Finished blocks held."""
        marks = self.cache.get(MARKS)
        return 0 if marks is None else marks.shape[1]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep new tokens, and what has become of the unfinished block.

        Args:
            k: (B, G, N, D), not rotated.
            v: (B, G, N, E).
        """
        k, v = self._unfinished(k, v)
        full = k.shape[2] // self.span
        rest = full * self.span
        if full:
            keys, values = (
                x[:, :, :rest].unflatten(2, (full, self.span)).transpose(1, 2) for x in (k, v)
            )
            keep, offload = self.part.cache_blocks, self.part.offload
            self.cache.extend(MARKS, keys[..., -1, :], dim=1, keep=keep)
            for name, x in ((BLOCKS_K, keys), (BLOCKS_V, values)):
                self.cache.extend(name, x[..., :-1, :], dim=1, keep=keep, offload=offload)
        self.cache.set_state(TAIL_K, k[:, :, rest:])
        self.cache.set_state(TAIL_V, v[:, :, rest:])

    def _unfinished(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The unfinished block with new tokens behind it."""
        before = self.cache.get_state(TAIL_K), self.cache.get_state(TAIL_V)
        if before[0] is None or before[1] is None:
            return k, v
        return torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Outputs (B, H, N, E) of a chunk of queries (B, H, N, D) with its own keys and values."""
        length = q.shape[2]
        k, v = self._unfinished(k, v)
        before = k.shape[2] - length
        start = min(self.blocks, self.top + 1) * self.span
        keys = torch.arange(start, start + k.shape[2], device=q.device)
        q, k = self._rotate(q, keys[before:]), self._rotate_keys(k, keys)
        found = self._choose(q) if self.blocks and self.top else None
        rows = length
        if found is not None and found.index.shape[2] > 1:  # every query has keys of its own
            row = q.shape[0] * q.shape[1] * found.index.shape[3] * self.span * q.shape[3]
            kind = engine.STRIP_BYTES.get(q.device.type, engine.STRIP_BYTES["cuda"])
            rows = max(1, 4 * kind // max(1, row * q.element_size()))
        outs = [
            self._strip(part, k, v, i * rows + before, found, slice(i * rows, (i + 1) * rows))
            for i, part in enumerate(q.split(rows, 2))
        ]
        return torch.cat(outs, 2)

    def _strip(
        self, q: Tensor, k: Tensor, v: Tensor, first: int, found: _Found | None, rows: slice
    ) -> Tensor:
        """Outputs of some rows, the first of which stands at `first` among the keys k."""
        index = torch.arange(first, first + q.shape[2], device=q.device)
        visible = torch.arange(k.shape[2], device=q.device) <= index[:, None]
        scores = grouped_matmul(q, k.transpose(-1, -2)) * self.scale
        if found is None:
            weights = by_blocks(scores, self.block, 0, index, visible, 0.0)
            return grouped_matmul(weights.to(v.dtype), v)
        many = slice(None) if found.index.shape[2] == 1 else rows
        old_k, old_v = self._fetch(found.index[:, :, many], found.late[:, :, many], q)
        old = old_k.shape[-2]
        one = old_k.shape[2] == 1
        # (B, H, R, 1, D) meets a row's own keys, (B, H, 1, R, D) those that rows share.
        asked = q[:, :, None] if one else q[..., None, :]
        back = (asked @ old_k.transpose(-1, -2)).flatten(2, 3) * self.scale
        scores = torch.cat((back, scores), -1)
        visible = torch.cat((visible.new_ones(len(visible), old), visible), -1)
        weights = by_blocks(scores, self.block, 0, index + old, visible, 0.0).to(v.dtype)
        share = weights[..., :old]
        share = share[:, :, None] if one else share[..., None, :]
        return (share @ old_v).flatten(2, 3) + grouped_matmul(weights[..., old:], v)

    def _choose(self, q: Tensor) -> _Found:
        """The best blocks for the rotated queries (B, H, N, D)."""
        marks = self.cache.get(MARKS)
        assert marks is not None
        blocks = marks.shape[1]
        order = torch.arange(blocks, device=q.device)
        late = order >= blocks - self.top if blocks >= self.top else order < 0
        slots = (order - (blocks - self.top) + 1).clamp_min(0) if blocks >= self.top else order
        # Laid out anew: landmarks that are alike, and in the first layer all are, have to tie, and
        # not be told apart by the rounding of a product with strided keys.
        keys = marks.transpose(1, 2).contiguous()
        keys = self._rotate_keys(keys, slots * self.span + self.block)
        scores = grouped_matmul(q, keys.transpose(-1, -2)) * self.scale
        # In logarithms: small shares would all be zero, and the next best among them any of them.
        shares = widen(scores).log_softmax(-1)
        if self.part.selection == "max_heads":
            shares = shares.amax(1, keepdim=True)
        elif self.part.selection == "max_tokens":
            shares = shares.amax(2, keepdim=True)
        best = shares.topk(min(self.top, blocks), -1).indices.sort(-1).values
        best = best.expand(-1, q.shape[1], -1, -1)
        return _Found(best, late[best])

    def _fetch(self, index: Tensor, late: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Keys in their slots and values of chosen blocks, (B, H, R or 1, k (L + 1), D).

        Args:
            index: Blocks, (B, H, R or 1, k).
            late: Whether they stand a slot later.
            q: For its device.
        """
        marks, keys, values = (self.cache.get(name) for name in (MARKS, BLOCKS_K, BLOCKS_V))
        assert marks is not None
        assert keys is not None
        assert values is not None
        samples, heads = index.shape[:2]
        groups = marks.shape[2]

        def pick(x: Tensor) -> Tensor:
            b = torch.arange(samples, device=x.device)[:, None, None, None]
            g = torch.arange(heads, device=x.device)[:, None, None] // (heads // groups)
            return x[b, index.to(x.device), g].to(q.device)

        mark, value = pick(marks)[..., None, :], pick(values)
        k = torch.cat((pick(keys), mark), -2)  # (B, H, R, k, L + 1, D)
        nothing = value.new_zeros(*value.shape[:-2], 1, value.shape[-1])
        v = torch.cat((value, nothing), -2).flatten(3, 4)
        if self.position is not None:
            place = torch.arange(k.shape[3] * self.span, device=q.device)
            # Heads keep their axis, as some rotations differ between them; rows join the batch.
            flat = k.flatten(3, 4).transpose(1, 2).flatten(0, 1)
            turned = [self._rotate(flat, place + slot * self.span) for slot in (0, 1)]
            early, later = (
                x.unflatten(0, (samples, k.shape[2])).transpose(1, 2).unflatten(3, (-1, self.span))
                for x in turned
            )
            k = torch.where(late[..., None, None], later, early)
        return k.flatten(3, 4), v

    def _rotate(self, q: Tensor, at: Tensor) -> Tensor:
        """Turn (B, H, N, D), one head for each of the queries', to positions (N,)."""
        if self.position is None:
            return q
        return self.position.rotate(q, q[:, : self.groups, :0], at, at[:0])[0]

    def _rotate_keys(self, k: Tensor, at: Tensor) -> Tensor:
        """Turn (B, G, N, D), the heads of keys, to positions (N,)."""
        if self.position is None:
            return k
        nothing = k.new_empty(k.shape[0], self.heads, 0, k.shape[3])
        return self.position.rotate(nothing, k, at[:0], at)[1]
