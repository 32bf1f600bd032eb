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

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.host import engine
from zoo.parts import Call, Host, Normalize, Route, Strip, full_precision, mask_scores, repeat_heads
from zoo.registry import Paper, Taxonomy, register

HALF = (torch.float16, torch.bfloat16)
LOG2_E = math.log2(math.e)
# A tile is this part of the engine's strip, so that three stay in a core's own cache, and has
# 2 * SLIM keys for two rows.
SHARE = 16
SLIM = 4


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


class _Tiles:
    """Cuts a pass over (B H, N, M) scores into tiles that share a few buffers.

    Args:
        q: All heads of all samples, (B H, N, D), at least float32.
        k: (B H, M, D).
        scale: Factor on the scores.
        hidden: True may *not* attend, broadcastable to (B, H, N, M), or None.
        offset: Row i sees keys 0 .. i + offset; None for all keys.
        heads: Heads H of a sample.
        buffers: Number of buffers.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        hidden: Tensor | None,
        offset: int | None,
        heads: int,
        buffers: int,
    ) -> None:
        self.q, self.k, self.hidden, self.offset, self.heads = q, k, hidden, offset, heads
        # 2^x is three times faster than e^x on a CPU, so scores are counted in base 2.
        self.factor = scale * LOG2_E
        budget = engine.STRIP_BYTES["cpu"] // SHARE // q.element_size()
        self.high = max(1, min(q.shape[1], max(engine.MIN_ROWS, math.isqrt(budget // SLIM))))
        self.wide = max(1, min(k.shape[1], max(engine.MIN_ROWS, math.isqrt(budget * SLIM))))
        self.deep = max(1, min(q.shape[0], budget // (self.high * self.wide)))
        size = self.deep * self.high * self.wide
        self.buffers = [q.new_empty(size) for _ in range(buffers)]
        self.views: dict[tuple[int, ...], list[Tensor]] = {}

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """Some heads and some of their rows at a time."""
        for h in range(0, self.q.shape[0], self.deep):
            for i in range(0, self.q.shape[1], self.high):
                rows = slice(i, min(i + self.high, self.q.shape[1]))
                yield slice(h, min(h + self.deep, self.q.shape[0])), rows

    def over_keys(
        self, lot: slice, rows: slice, q: Tensor, *others: Tensor
    ) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
        """The keys of a strip, a tile at a time.

        Args:
            lot: Heads of the strip.
            rows: Rows of the strip.
            q: Queries of the strip, (heads, R, D).
            others: What else is to be cut by keys, each (B H, M, ..).

        Yields:
            The keys; the buffers as (heads, R, keys), the first filled with the base-2 scores;
            the tile's share of k and the others.
        """
        last = self.k.shape[1]
        if self.offset is not None:
            last = min(last, rows.stop + self.offset)
        if last <= 0:
            return
        shares = [x[lot, :last].split(self.wide, 1) for x in (self.k, *others)]
        for t, cut in enumerate(zip(*shares, strict=True)):
            k = cut[0]
            tile = self._tile(q.shape[0], q.shape[1], k.shape[1])
            # The factor goes onto the products and not onto q, so that exact zeros stay exact.
            torch.baddbmm(tile[0], q, k.mT, beta=0, alpha=self.factor, out=tile[0])
            yield slice(t * self.wide, t * self.wide + k.shape[1]), tile, list(cut)

    def _tile(self, *shape: int) -> list[Tensor]:
        """The buffers in the shape of a tile; there are few shapes."""
        if shape not in self.views:
            self.views[shape] = [x[: math.prod(shape)].view(shape) for x in self.buffers]
        return self.views[shape]

    def hide(self, tile: Tensor, lot: slice, rows: slice, keys: slice) -> None:
        """Put zeros where the pairs of a tile may not meet."""
        if self.offset is not None:
            first = max(keys.start, rows.start + self.offset + 1)  # the first key hidden from a row
            if first < keys.stop:
                tile[..., first - keys.start :].tril_(rows.start + self.offset - first)
        if self.hidden is not None:
            hidden = self.hidden
            hidden = hidden[:, :, rows] if hidden.shape[2] > 1 else hidden
            hidden = hidden[..., keys] if hidden.shape[3] > 1 else hidden
            index = torch.arange(lot.start, lot.stop, device=tile.device)
            sample = index // self.heads if hidden.shape[0] > 1 else index * 0
            head = index % self.heads if hidden.shape[1] > 1 else index * 0
            tile.masked_fill_(hidden[sample, head], 0.0)


def _forward(tiles: _Tiles, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B H, N, E) and base-2 logarithms of the rows' sums (B H, N, 1)."""
    q, k = tiles.q, tiles.k
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_empty(*q.shape[:2], 1)
    # A score is at most |q| |k|. While that is small, its power needs no maximum subtracted first;
    # half of the exponent's range stays free for the sums.
    longest = abs(tiles.factor) * q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True)
    limit = math.log2(torch.finfo(q.dtype).max) / 2
    for lot, rows in tiles.strips():
        q_rows, y = q[lot, rows], out[lot, rows]
        total = torch.zeros_like(lse[lot, rows])
        top = None
        if not bool(longest[lot, rows].amax() <= limit):
            top = torch.zeros_like(total)
            for keys, (s, size), _ in tiles.over_keys(lot, rows, q_rows):
                tiles.hide(torch.abs(s, out=size), lot, rows, keys)
                torch.maximum(top, size.amax(-1, keepdim=True), out=top)
        for keys, (s, e), (_, v_keys) in tiles.over_keys(lot, rows, q_rows, v):
            torch.abs(s, out=e)
            if top is not None:
                e.sub_(top)
            tiles.hide(e.exp2_(), lot, rows, keys)
            total += e.sum(-1, keepdim=True)
            y.baddbmm_(s.sign_().mul_(e), v_keys)
        empty = total == 0
        y /= total.masked_fill(empty, 1.0)
        logs = total.log2() if top is None else total.log2() + top
        lse[lot, rows] = logs.masked_fill(empty, torch.inf)  # 2^(|s| - inf) weighs nothing
    return out, lse


def _backward(
    tiles: _Tiles, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B H, N, D), k (B H, M, D) and v (B H, M, E)."""
    q, k = tiles.q, tiles.k
    delta = (grad * out).sum(-1, keepdim=True)
    dq = torch.zeros_like(q)
    # Products that sum over rows are quicker with the keys along the rows of memory.
    dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1]).mT for x in (k, v))
    for lot, rows in tiles.strips():
        q_rows, dq_rows, g = q[lot, rows], dq[lot, rows], grad[lot, rows]
        logs, d = lse[lot, rows], delta[lot, rows]
        for keys, (s, p, ds), cut in tiles.over_keys(lot, rows, q_rows, v, dk, dv):
            k_keys, v_keys, dk_keys, dv_keys = cut
            tiles.hide(torch.abs(s, out=p).sub_(logs).exp2_(), lot, rows, keys)
            sign = s.sign_()
            torch.bmm(g, v_keys.mT, out=ds)
            ds.addcmul_(sign, d, value=-1).mul_(p)
            dv_keys.baddbmm_(sign.mul_(p).mT, g)
            dk_keys.baddbmm_(ds.mT, q_rows)
            dq_rows.baddbmm_(ds, k_keys)
    return dq.mul_(scale), dk.mul_(scale), dv


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
            tiles = _Tiles(_flatten(q), _flatten(k), scale, hidden, offset, q.shape[1], buffers=2)
            out, lse = _forward(tiles, _flatten(v))
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
            wanted = [
                x for x, needed in zip((q, k, v), ctx.needs_input_grad[:3], strict=True) if needed
            ]
            mask = None if hidden is None else ~hidden
            wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
            y = cog_attention_reference(
                *wide, causal=ctx.offset is not None, mask=mask, scale=ctx.scale
            )
            each = iter(torch.autograd.grad(y.to(v.dtype), wanted, grads[0], create_graph=True))
            return tuple(next(each) if needed else None for needed in ctx.needs_input_grad)
        with full_precision(q):
            tiles = _Tiles(
                _flatten(q), _flatten(k), ctx.scale, hidden, ctx.offset, q.shape[1], buffers=3
            )
            flat = [_flatten(x) for x in (v, out, grads[0])]
            found = _backward(tiles, flat[0], flat[1], lse, flat[2], ctx.scale)
        back = (d.view(x.shape).to(x.dtype) for d, x in zip(found, (q, k, v), strict=True))
        return (*back, None, None, None)


def _flatten(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B H, N, D) of at least float32, one row after the other."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1).contiguous()


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
    for kind, wanted in (("score", "dot"), ("select", "all")):
        found = host.part_names[kind]
        if found != wanted:
            return f"{kind} is {found!r}, not {wanted!r}"
    if host.position.biases:
        return f"position {host.part_names['position']!r} biases the scores"
    if call.bias is not None:
        return "it takes no bias on the scores"
    if call.dropout:
        return "it has no dropout on the weights"
    return None


def _refuse_strips(host: Host, call: Call) -> str | None:
    reason = _refuse_parts(host, call)
    if reason is None and torch.compiler.is_compiling():
        return "its own backward is not for compilers, which take the engine whole"
    if reason is None and torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into its own backward"
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
