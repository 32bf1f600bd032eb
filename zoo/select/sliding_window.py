"""Sliding window attention (Beltagy, Peters, Cohan 2020, "Longformer"): the nearest tokens only.

    causal          query i sees key j  iff  0 <= i - j < W
    bidirectional   query i sees key j  iff  |i - j| <= W // 2

by index in the sequence, whatever positions the tokens carry. The causal window counts the query
itself, as in Mistral 7B (2023): W keys, of which W - 1 lie in the past. (Some papers let
i - j <= W through, one key more; flash-attention calls ours ``(W - 1, 0)``.) After n layers a token
has seen n (W - 1) + 1 tokens. While decoding, the cache holds the latest W tokens.

Cost N W D per head, by two roads: the strip engine looks only at the keys of each strip's window,
and for dot-product softmax self-attention the route "windowed" hands blocks of C queries with
their C + W keys to scaled_dot_product_attention in one call. The blocks' keys overlap, so their
copy takes 1 + W / C times the memory of k and v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import Call, Select, Strip, mask_scores, repeat_heads
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.routes import Route

if TYPE_CHECKING:
    from zoo.attention import Attention

# Queries of a block, for windows up to `WIDE` and above: more waste pairs outside the window, fewer
# leave the matrix products small and copy keys more often (N = 4096 on a CPU, 8 heads of 64).
BLOCKS, WIDE = (64, 128), 128


def reach(window: int, causal: bool) -> tuple[int, int]:
    """Farthest key that a query sees, in tokens back and in tokens ahead."""
    return (window - 1, 0) if causal else (window // 2, window // 2)


def sliding_window_reference(
    q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention under the full N x N window mask, any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, D).
        window: W.
        causal: Only keys up to the query.
        mask: Hidden keys, (B, 1, 1, N) boolean, or None.
    """
    index = torch.arange(q.shape[2], device=q.device)
    gap = index[:, None] - index
    allowed = ((gap >= 0) & (gap < window) if causal else gap.abs() <= window // 2)[None, None]
    if mask is not None:
        allowed = allowed & mask
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = mask_scores(scores, allowed).softmax(-1)
    return weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0) @ v


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    offset: int,
    span: tuple[int, int],
    scale: float,
    dropout: float,
) -> Tensor:
    """Softmax attention of rows (B, H, R, D), row r standing `offset` + r keys after the first.

    Args:
        q: (B, H, R, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        keys: Keys not hidden, (B, M) boolean, or None.
        offset: Index of the first row, counted from the first key.
        span: Farthest key seen, back and ahead.
        scale: Factor on dot products.
        dropout: On the weights.
    """
    row = torch.arange(offset, offset + q.shape[2], device=q.device)
    gap = row[:, None] - torch.arange(k.shape[2], device=q.device)
    mask = (gap <= span[0]) & (gap >= -span[1])
    if keys is not None:
        mask = mask & keys[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return y if keys is None else y.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    block: int | None = None,
) -> Tensor:
    """Softmax self-attention within a window in time and memory O(N W), by blocks of queries.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, D).
        window: W.
        causal: Only keys up to the query.
        mask: Hidden keys, (B, 1, 1, N) boolean, True may be seen, or None.
        scale: Default 1 / sqrt(D).
        dropout: On the weights.
        block: Queries of a block; default by the window.
    """
    block = BLOCKS[window > WIDE] if block is None else block
    samples, heads, length, _ = q.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    keys = None if mask is None else mask[:, 0, 0].expand(samples, length)
    span = reach(window, causal)
    # An even number of keys runs better, so the causal blocks carry one key that all rows hide.
    back, ahead = (window, 0) if causal else span
    size = block + back + ahead
    if length < size:
        return _attend(q, k, v, keys, 0, span, scale, dropout)
    blocks = (length - size) // block + 1
    stop = back + blocks * block

    def windows(x: Tensor) -> Tensor:
        """Keys of every block as samples of their own, (B n, H, size, D)."""
        return x.unfold(2, size, block).permute(0, 2, 1, 4, 3).flatten(0, 1)

    first, tail = back + ahead, length - stop
    inner = q[:, :, back:stop].unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    inner_keys = None if keys is None else keys.unfold(1, size, block).flatten(0, 1)
    body = _attend(inner, windows(k), windows(v), inner_keys, back, span, scale, dropout)
    body = body.unflatten(0, (samples, blocks)).transpose(1, 2).flatten(2, 3)
    pieces = [body]
    if back:  # the first rows, whose windows would begin before the first key
        head_keys = None if keys is None else keys[:, :first]
        head = q[:, :, :back], k[:, :, :first], v[:, :, :first], head_keys
        pieces.insert(0, _attend(*head, 0, span, scale, dropout))
    if tail:  # the last rows, whose windows end early or that fill no block
        cut = stop - back
        last_keys = None if keys is None else keys[:, cut:]
        last = q[:, :, stop:], k[:, :, cut:], v[:, :, cut:], last_keys
        pieces.append(_attend(*last, back, span, scale, dropout))
    return torch.cat(pieces, 2)


def _refuse(host: Attention, call: Call) -> str | None:
    for kind, wanted in (("score", "dot"), ("normalize", "softmax")):
        found = host.part_names[kind]
        if found != wanted:
            return f"{kind} is {found!r}, not {wanted!r}"
    if host.position.biases or call.bias is not None:
        return "it takes no bias on the scores"
    if call.q.shape[2] != call.k.shape[2] or call.q_start != call.k_start:
        return "there are cached keys"
    if call.mask is not None and (call.mask.shape[1] > 1 or call.mask.shape[2] > 1):
        return "its mask can hide keys only, for all heads and queries alike"
    window = _window(host)
    if call.q.shape[2] <= 2 * window:
        return f"{call.q.shape[2]} tokens are no more than two windows of {window}"
    return None


def _window(host: Attention) -> int:
    assert isinstance(host.select, SlidingWindow)
    return host.select.width


def _run(host: Attention, call: Call) -> Tensor:
    return sliding_window_attention(
        call.q,
        call.k,
        call.v,
        _window(host),
        call.causal,
        mask=call.mask,
        scale=call.scale,
        dropout=call.dropout,
    )


@register(
    "sliding_window",
    kind="select",
    paper=Paper("Longformer: The Long-Document Transformer", 2020, "2004.05150"),
    traits=Traits(cross=False, equivariant=False, cost="N * window"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="local",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="linear",
    ),
    aliases=("swa",),
)
class SlidingWindow(Select):
    """The latest `window` tokens, or `window // 2` to either side.

    Args:
        window: W, the query itself included where attention is causal.
        causal: Only keys up to the query.

    Raises:
        ZooError: `window` < 1.
    """

    def __init__(self, window: int = 128, causal: bool = False) -> None:
        super().__init__()
        if not isinstance(window, int) or window < 1:
            raise ZooError(f"window={window!r} must be a whole number of at least 1")
        self.width = window
        self.causal = causal
        self.back, self.ahead = reach(window, causal)

    def allow(self, strip: Strip) -> Tensor | None:
        """(R, M), or None where the windows of all rows hold all keys of the strip."""
        call = strip.call
        first, last = call.k_start + strip.keys.start, call.k_start + strip.keys.stop - 1
        top, bottom = call.q_start + strip.rows.start, call.q_start + strip.rows.stop - 1
        near, far = bottom - first <= self.back, last - top <= self.ahead
        # What lies ahead of a causal query is hidden by causality anyway.
        if near and (far or self.causal):
            return None
        gap = strip.q_index[:, None] - strip.k_index
        return gap <= self.back if self.causal else gap.abs() <= self.back

    def key_range(self, call: Call, rows: slice) -> tuple[int, int]:
        """Keys between the first row's window and the last one's."""
        shift = call.q_start - call.k_start
        first = max(0, shift + rows.start - self.back)
        return first, max(first, shift + rows.stop + self.ahead)

    def window(self) -> int | None:
        """W where attention is causal; a bidirectional query may come back to any key."""
        return self.width if self.causal else None

    def routes(self) -> tuple[Route, ...]:
        """Blocks of queries with their keys, in one fused call."""
        return (Route("windowed", _refuse, _run),)

    def extra_repr(self) -> str:
        """The option."""
        return f"window={self.width}, causal={self.causal}"
