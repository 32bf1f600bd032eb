"""Sliding window attention (Beltagy, Peters, Cohan 2020, "Longformer"): the nearest tokens only.

    causal          query i sees key j  iff  0 <= i - j < W
    bidirectional   query i sees key j  iff  |i - j| <= W // 2

by index in the sequence, whatever positions the tokens carry. The causal window counts the query
itself, as in Mistral 7B (2023): W keys, of which W - 1 lie in the past. (Some papers let
i - j <= W through, one key more; flash-attention calls ours ``(W - 1, 0)``.) After n layers a token
has seen n (W - 1) + 1 tokens. While decoding, the cache holds the latest W tokens.

Cost N W D per head, by several roads: the strip engine looks only at the keys of each strip's
window; for dot-product softmax self-attention the route "windowed" multiplies blocks of queries
with the keys of their windows, without a copy of either (`zoo.select._halo`). On CUDA FlexAttention
comes first, then the Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.host.refusals import refuse_parts, refuse_tracing
from zoo.parts import Call, Host, Route, Select, Strip, mask_scores
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.select._flex import flex_windows, refuse_flex
from zoo.select._grid import Grid
from zoo.select._halo import halo_attention
from zoo.select._halo_plan import Window


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

    Raises:
        ZooError: A window or block below 1, shapes that do not fit, or a mask that hides more than
            keys.
    """
    window = checks.whole("window", window)
    block = checks.optional(checks.whole)("block", block)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or (x.shape[0], x.shape[2]) != (q.shape[0], q.shape[2]):
            raise ZooError(
                f"{name} of shape {tuple(x.shape)} does not fit q of shape {tuple(q.shape)}; "
                "allowed: (batch, heads, tokens, width)"
            )
    allowed = ((1, 1, 1, q.shape[2]), (q.shape[0], 1, 1, q.shape[2]))
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in allowed):
        raise ZooError(
            f"mask of shape {tuple(mask.shape)} and type {mask.dtype}; allowed: torch.bool of "
            f"shape {allowed[1]}, hidden keys"
        )
    return halo_attention(
        q,
        k,
        v,
        (q.shape[2],),
        (_rule(window, causal),),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=None if mask is None else mask[:, 0, 0].expand(q.shape[0], q.shape[2]),
        dropout=dropout,
        sizes=None if block is None else (block,),
    )[0]


def _rule(window: int, causal: bool) -> Window:
    """The window as an interval that borders cut off."""
    back, ahead = reach(window, causal)
    return Window(back, ahead, causal=causal, shift=False)


def _refuse_bias(host: Host, call: Call) -> str | None:
    reason = refuse_parts(host, {"score": "dot", "normalize": "softmax"})
    if reason:
        return reason
    if host.position.biases or call.bias is not None:
        return "it takes no bias on the scores"
    if call.q.shape[2] != call.k.shape[2] or call.q_start != call.k_start:
        return "there are cached keys"
    return None


def _refuse_blocks(host: Host, call: Call) -> str | None:
    reason = _refuse_bias(host, call)
    if reason:
        return reason
    if call.q.is_meta:
        return "it looks at numbers, and meta tensors have none"
    reason = refuse_tracing("its own backward is not for compilers, which take the strips whole")
    if reason:
        return reason
    if call.mask is not None and (call.mask.shape[1] > 1 or call.mask.shape[2] > 1):
        return "its mask can hide keys only, for all heads and queries alike"
    window = _window(host)
    if call.q.shape[2] <= 2 * window:
        return f"{call.q.shape[2]} tokens are no more than two windows of {window}"
    return None


def _window(host: Host) -> int:
    assert isinstance(host.select, SlidingWindow)
    return host.select.width


def _refuse_fused(host: Host, call: Call) -> str | None:
    """Why neither FlexAttention nor the kernel can take a pass, or None."""
    reason = _refuse_bias(host, call)
    if reason:
        return reason
    if call.mask is not None:
        return "it takes no mask beside the window"
    return "it has no dropout on the weights" if call.dropout else None


def _refuse_flex(host: Host, call: Call) -> str | None:
    reason = _refuse_fused(host, call)
    return reason or refuse_flex(call.q, call.k, call.v, by_name=host.route == "flex")


def _run_flex(host: Host, call: Call) -> Tensor:
    rule = _rule(_window(host), call.causal)
    grid = Grid((call.q.shape[2],), (rule,), (1,))
    return flex_windows(call.q, call.k, call.v, grid, call.scale)


def _refuse_triton(host: Host, call: Call) -> str | None:
    reason = _refuse_fused(host, call)
    if reason:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into its kernels"
    if not call.q.numel():
        return "there are no queries"
    from zoo.kernels import refuse

    return refuse(call.q, call.k, call.v, by_name=host.route == "sliding_window_triton")


def _run_triton(host: Host, call: Call) -> Tensor:
    from zoo.kernels.neighborhood import neighborhood_attention

    q, k, v = call.q, call.k, call.v
    size, causal = (_window(host),), (call.causal,)
    return neighborhood_attention(
        q, k, v, (q.shape[2],), size, (1,), (1,), causal, call.scale, clip=True
    )


def _run(host: Host, call: Call) -> Tensor:
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
    contender="sliding_window(window=8)",
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
        self.width = window = checks.whole("window", window)
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
        """FlexAttention and the kernel on CUDA, blocks of queries with their keys elsewhere."""
        return (
            Route("flex", _refuse_flex, _run_flex),
            Route("sliding_window_triton", _refuse_triton, _run_triton),
            Route("windowed", _refuse_blocks, _run),
        )

    def extra_repr(self) -> str:
        """The option."""
        return f"window={self.width}, causal={self.causal}"
