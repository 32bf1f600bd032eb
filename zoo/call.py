"""What parts are given to work with: head layouts, one pass of a layer, and strips of it.

Legend: B batch, N query length, M key length, R rows of a strip, H heads, D head dim, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zoo.cache import LayerCache
from zoo.errors import ZooError


@dataclass(frozen=True)
class Layout:
    """Head counts and widths between the projection and the combination.

    Args:
        heads: Heads that leave the normalizer and enter the combination.
        score_heads: Heads of q and of the scores; a multiple of `heads`.
        k_heads: Heads of k; divides `score_heads`.
        v_heads: Heads of v; divides `heads`.
        qk_dim: Width of a head of q and k.
        v_dim: Width of a head of v.
    """

    heads: int
    score_heads: int
    k_heads: int
    v_heads: int
    qk_dim: int
    v_dim: int

    def with_(self, **changes: int) -> Layout:
        """Copy with some fields replaced."""
        return replace(self, **changes)


@dataclass
class Call:
    """Everything about one forward pass of one layer that its parts may need.

    Args:
        x: Input of the layer, (B, N, C).
        q: Queries, (B, score_heads, N, qk_dim), rotated.
        k: Keys, (B, k_heads, M, qk_dim), rotated, the cached ones included.
        v: Values, (B, v_heads, M, v_dim).
        q_pos: Positions of the queries, (N,) or (B, N), int64.
        k_pos: Positions of the keys, (M,) or (B, M), int64.
        q_start: Index of the first query in the sequence; causality goes by index.
        k_start: Index of the first key held (above 0 once a window has rolled).
        causal: Key j may be seen by query i only if its index is not larger.
        scale: Factor on dot products.
        cross: Keys come from a context.
        mask: Boolean, True may attend, broadcastable to (B, heads, N, M), or None.
        bias: Added to the scores, broadcastable to (B, score_heads, N, M), or None.
        dropout: Probability in force (0 outside training).
        cache: This layer's cache while decoding, or None.
        cu_seqlens: Bounds of the sequences packed into the one sample, (S + 1,), or None.
        documents: Number of the packed sequence of each token, (N,), or None.
        prepared: What the parts' `prepare` returned, by socket.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    q_start: int
    k_start: int
    causal: bool
    scale: float
    cross: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    cache: LayerCache | None = None
    cu_seqlens: Tensor | None = None
    documents: Tensor | None = None
    prepared: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def key_mask(self) -> Tensor | None:
        """The mask as (B, 1, M) for parts that only know hidden keys, or None."""
        return None if self.mask is None else self.mask[:, 0].expand(-1, 1, -1)


@dataclass
class Strip:
    """Some rows of queries against the keys that they may see.

    Args:
        call: The whole pass.
        batch: Samples of the strip.
        rows: Queries of the strip.
        keys: Keys of the strip.
        q: Queries of the strip, (B, score_heads, R, qk_dim).
        mask: Which pairs may meet, broadcastable to (B, score_heads, R, M), or None for all.
    """

    call: Call
    batch: slice
    rows: slice
    keys: slice
    q: Tensor
    mask: Tensor | None = None

    # Keys and values are cut where they are used, not when strips are planned: autograd goes
    # backwards in the order of creation, and would keep every strip's gradient of an early cut.

    @property
    def k(self) -> Tensor:
        """Keys of the strip, (B, k_heads, M, qk_dim)."""
        return self.call.k[self.batch, :, self.keys]

    @property
    def v(self) -> Tensor:
        """Values of the strip, (B, v_heads, M, v_dim)."""
        return self.call.v[self.batch, :, self.keys]

    @property
    def scale(self) -> float:
        """Factor on dot products."""
        return self.call.scale

    @property
    def q_index(self) -> Tensor:
        """Index of each row in the sequence, (R,)."""
        start = self.call.q_start
        return torch.arange(
            start + self.rows.start, start + self.rows.stop, device=self.call.q.device
        )

    @property
    def k_index(self) -> Tensor:
        """Index of each key in the sequence, (M,)."""
        start = self.call.k_start
        return torch.arange(
            start + self.keys.start, start + self.keys.stop, device=self.call.q.device
        )

    @property
    def q_pos(self) -> Tensor:
        """Position of each row, (R,) or (B, R)."""
        return _cut_positions(self.call.q_pos, self.batch, self.rows)

    @property
    def k_pos(self) -> Tensor:
        """Position of each key, (M,) or (B, M)."""
        return _cut_positions(self.call.k_pos, self.batch, self.keys)

    def distance(self) -> Tensor:
        """Query position minus key position, (R, M) or (B, 1, R, M)."""
        gap = self.q_pos[..., :, None] - self.k_pos[..., None, :]
        return gap if gap.ndim == 2 else gap[:, None]

    def prepared(self, kind: str) -> Mapping[str, Any]:
        """What the part in socket `kind` prepared for the whole pass."""
        return self.call.prepared[kind]


def _cut_positions(positions: Tensor, batch: slice, items: slice) -> Tensor:
    return positions[items] if positions.ndim == 1 else positions[batch, items]


def grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (B, H, R, X) by (B, G, X, Y) where head h of `a` meets head h // (H // G) of `b`."""
    heads, groups = a.shape[1], b.shape[1]
    if heads == groups:
        return a @ b
    rows = a.shape[2]
    # The heads of a group share b, so they are so many more rows of one product.
    folded = a.reshape(a.shape[0], groups, heads // groups * rows, a.shape[3])
    return (folded @ b).view(a.shape[0], heads, rows, b.shape[-1])


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    """Refuse bounds of packed sequences that are no bounds.

    Args:
        cu_seqlens: First token of each sequence and, last, the end, (S + 1,) integers.
        length: Tokens in all.

    Raises:
        ZooError: Wrong type or shape, not from 0 to `length`, or decreasing.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ZooError(
            f"cu_seqlens is of type {type(cu_seqlens).__name__}; allowed: an int32 or int64 tensor"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise ZooError(
            f"cu_seqlens of dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}; allowed: "
            "int32 or int64 of rank 1"
        )
    if torch.compiler.is_compiling():
        return  # their values are not known
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
        shown = f"{ends[:4]}..." if len(ends) > 8 else f"{ends}"
        raise ZooError(f"cu_seqlens={shown} must go from 0 to {length} without decreasing")


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of (B, G, M, D) consecutively up to `heads`; a single one is not copied."""
    if x.shape[1] == 1:
        return x.expand(-1, heads, -1, -1)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def share_groups(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat heads of k (B, G, M, D) and v (B, G', M, E) until there are as many of both."""
    heads = math.lcm(k.shape[1], v.shape[1])
    return repeat_heads(k, heads), repeat_heads(v, heads)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast, where the device of `x` has one, from rounding to half precision."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def widen(x: Tensor) -> Tensor:
    """The tensor in float32 at least, for sums and exponentials that half precision cannot hold."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mask_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Put a very low finite score where `mask` is False (finite, so that empty rows stay NaN-free).

    Args:
        scores: (B, H, R, M).
        mask: Broadcastable boolean, True may attend, or None.
    """
    return scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
