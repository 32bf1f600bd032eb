"""Cog attention (Lv et al. 2024, "More Expressive Attention with Negative Weights").

The sign of a score times the softmax of its size, so that a head can subtract as well as add:

    s    = q k^T / sqrt(D)                        q (B, H, N, D), k (B, H, M, D), s (B, H, N, M)
    w_ij = sign(s_ij) exp(|s_ij|) / sum_j' exp(|s_ij'|)                   over visible keys j'
    o_i  = sum_j w_ij v_j                         v, o (B, H, N, D)

Sizes of the weights of a row sum to one, the weights themselves to anything from -1 to 1; a score
of exactly zero weighs nothing, yet counts exp(0) below the line. Adding a constant to the scores
changes the result, unlike in softmax; negating q_i negates o_i. The sign is a constant to the
gradient, as in autograd: with P = |w|, dL/ds_ij = P_ij (do_i . v_j - sign_ij do_i . o_i).

A bias b_ij (ALiBi's and T5's positions, the caller's) is added to the exponent, w_ij ~ sign(s_ij)
exp(|s_ij| + b_ij): a penalty lowers the size of a weight whatever its sign. On the score itself a
penalty of a positive score would end as a large negative one, and attract. The authors have no such
bias: they rotate (language) or embed positions (vision), and hide pairs from |s| in the same place.
Terms that depend on the queries (CoPE, Transformer-XL) are scores and keep their sign.

The first and the last layer of a model keep plain attention, as in the paper. No parameters.

Code and paper. The official code gives NaN to a row that sees nothing; here it gives zeros. The
probing scripts of the repository use another form, with 1e-6 added below the line; we follow the
model's. Where products cancel, a score is exactly zero: the route below and the official code scale
afterwards, while the engine scales q first, which can round such a zero to a tiny number with a
sign unless the scale is a power of two. Rotary positions come before the scores and are interleaved
there: "cog+rope(style=...)".

The route "cog_strips" keeps q, k, v, o and one log-sum-exp per row, and forms scores by the tile in
buffers that stay in the cache: 2 matrix products forward, 5 backward. Its roof on a CPU is these
products (7 x 2 D flops a pair); about ten passes of cheap arithmetic and two of 2^x come on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.host.refusals import refuse_extras, refuse_parts, refuse_position, refuse_tracing
from zoo.normalize import _cog_strips as strips
from zoo.ops.again import differentiate_again
from zoo.parts import (
    Call,
    Host,
    Normalize,
    Route,
    Strip,
    full_precision,
    mask_scores,
    repeat_heads,
    widen,
)
from zoo.registry import Paper, Taxonomy, register

HALF = (torch.float16, torch.bfloat16)


def cog_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The equations line by line, with all N x M scores; any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        causal: The last query sees all keys, each one before it sees one less.
        mask: Boolean, True may attend, broadcastable to (B, H, N, M).
        scale: Factor on the scores; default ``1 / sqrt(D)``.

    Source: the official repository's ``Cogformer/attention.py``.
    """
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    size = scores.abs()
    if causal:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        size = size.masked_fill(future, -torch.inf)
    if mask is not None:
        size = size.masked_fill(~mask, -torch.inf)
    empty = (size == -torch.inf).all(-1, keepdim=True)
    weights = scores.sign() * size.masked_fill(empty, 0.0).softmax(-1)
    return weights.masked_fill(empty, 0.0) @ v


class _Cog(torch.autograd.Function):
    """Cog attention of (B, H, N, D) with its own backward; nothing of size N x M is kept."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        offset: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, H, N, E) and the logarithms of the rows' sums."""
        with full_precision(q):
            tiles = strips.Tiles(q, k, scale, hidden, offset, buffers=2)
            out, lse = strips.forward(tiles, v)
        return out.view(*q.shape[:3], v.shape[3]).to(v.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep inputs, outputs and a number per row."""
        q, k, v, hidden, ctx.offset, ctx.scale = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, hidden, out, lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, hidden, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            mask = None if hidden is None else ~hidden
            y = cog_attention_reference(
                widen(q),
                widen(k),
                widen(v),
                causal=ctx.offset is not None,
                mask=mask,
                scale=ctx.scale,
            )
            needed = ctx.needs_input_grad[:3]
            back = differentiate_again([y.to(v.dtype)], (q, k, v), needed, grads[:1])
            return (*back, None, None, None)
        with full_precision(q):
            tiles = strips.Tiles(q, k, ctx.scale, hidden, ctx.offset, buffers=3)
            found = strips.backward(tiles, v, out, lse, grads[0], ctx.scale)
        each = zip(found, (q, k, v), strict=True)
        return (*(d.view(x.shape).to(x.dtype) for d, x in each), None, None, None)


def cog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same as `cog_attention_reference`, in memory O(N + M) and with its own backward.

    Rows that see nothing give zeros. A second derivative takes the reference's memory.

    Args:
        q: (B, H, N, D).
        k: (B, G, M, D), G dividing H.
        v: (B, G, M, E).
        causal: The last query sees all keys, each one before it sees one less.
        mask: Boolean, True may attend, broadcastable to (B, H, N, M).
        scale: Factor on the scores; default ``1 / sqrt(D)``.

    Returns:
        (B, H, N, E).

    Raises:
        ZooError: A mask that is not boolean or has another rank or shape, or k and v of different
            lengths.
    """
    heads = q.shape[1]
    if k.shape[2] != v.shape[2]:
        raise ZooError(f"k has {k.shape[2]} keys, but v has {v.shape[2]} values")
    if mask is not None:
        wanted = (q.shape[0], heads, q.shape[2], k.shape[2])
        fits = mask.ndim == 4 and all(a in (1, b) for a, b in zip(mask.shape, wanted, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise ZooError(
                f"mask of dtype {mask.dtype} and shape {tuple(mask.shape)}; allowed: torch.bool "
                f"that broadcasts to {wanted}"
            )
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    hidden = None if mask is None else ~mask
    offset = k.shape[2] - q.shape[2] if causal else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Cog.apply(q, k, v, hidden, offset, scale)[0]


def _refuse_parts(host: Host, call: Call) -> str | None:
    dense = {"score": "dot", "select": "all"}
    return refuse_parts(host, dense) or refuse_position(host) or refuse_extras(call, mask=True)


def _refuse_strips(host: Host, call: Call) -> str | None:
    reason = _refuse_parts(host, call) or refuse_tracing(
        "its own backward is not for compilers, which take the engine whole"
    )
    if reason is None and call.q.device.type != "cpu":
        return "its tiles are sized for the cache of a CPU"
    if reason is None and not call.k.shape[2]:
        return "there are no keys"
    if reason is None and host.route == "auto" and call.q.shape[2] == 1:
        return "for one row the engine, which copies no cached keys, is quicker"
    return reason


def _run_strips(host: Host, call: Call) -> Tensor:
    return cog_attention(
        call.q, call.k, call.v, causal=call.causal, mask=call.mask, scale=call.scale
    )


def _run_reference(host: Host, call: Call) -> Tensor:
    heads = call.q.shape[1]
    return cog_attention_reference(
        call.q,
        repeat_heads(call.k, heads),
        repeat_heads(call.v, heads),
        causal=call.causal,
        mask=call.mask,
        scale=call.scale,
    )


@register(
    "cog",
    kind="normalize",
    paper=Paper("More Expressive Attention with Negative Weights", 2024, "2411.07176"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="signed",
        complexity="quadratic",
    ),
    layers={"first": "plain", "last": "plain"},
)
class Cog(Normalize):
    """Softmax of the sizes of the scores, with the signs of the scores."""

    biases_exponent = True

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, H, R, M), at least float32."""
        return self._weights(scores, mask, None)

    def weigh_biased(self, strip: Strip, scores: Tensor, bias: Tensor) -> Tensor:
        """Weights (B, H, R, M), at least float32, with a bias on the sizes of the scores."""
        return self._weights(scores, strip.mask, bias)

    @staticmethod
    def _weights(scores: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        scores = scores.float() if scores.dtype in HALF else scores
        sizes = scores.abs() if bias is None else scores.abs() + bias
        # Hidden pairs are hidden from the sizes: the size of a hidden score would be the largest.
        return mask_scores(sizes, mask).softmax(-1) * scores.sign()

    def routes(self) -> tuple[Route, ...]:
        """Tiles with their own backward; the official dense form where it is asked for."""
        return (
            Route("cog_strips", _refuse_strips, _run_strips),
            Route("reference", _refuse_parts, _run_reference, auto=False),
        )
