"""The strip engine: any combination of parts in memory O(rows * M), forward and backward.

Queries are taken a strip of rows at a time. Each strip sees whole rows of scores, so causality,
padding, decoding and cross-attention need nothing from a part; in the backward pass a strip is
computed again and differentiated, so that no N x M tensor is ever kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.parts import (
    Call,
    Position,
    Select,
    Stations,
    Strip,
    grouped_matmul,
    repeat_heads,
)

# Scores of a strip in bytes. On a CPU a strip should stay in the cache; a GPU wants more rows.
STRIP_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
# Up to this size everything is done in one strip and differentiated without recomputation.
WHOLE_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
MIN_ROWS = 16


def strips(call: Call, select: Select, whole: bool = False) -> Iterator[Strip]:
    """Cut a pass into strips whose scores fit the budget of the device.

    Args:
        call: The pass.
        select: Part that may bound the keys of a strip.
        whole: One strip only, whatever its size; what torch.export makes has to fit every size,
            so it is one as well.
    """
    samples, heads, length = call.q.shape[:3]
    device = call.q.device.type
    row = heads * call.k.shape[2] * call.q.element_size()  # bytes of one row of one sample
    whole = whole or torch.compiler.is_exporting()
    if whole or samples * length * row <= WHOLE_BYTES.get(device, WHOLE_BYTES["cuda"]):
        # Nothing is cut and nothing looped over, so that sizes can stay symbols of a compiler.
        yield Strip(call, slice(None), slice(0, length), _keys(call, select, 0, length), call.q)
        return
    row = max(1, row)
    budget = STRIP_BYTES.get(device, STRIP_BYTES["cuda"])
    rows = min(length, max(MIN_ROWS, budget // (samples * row)))
    batch = min(samples, max(1, budget // (rows * row)))
    for b in range(0, samples, batch):
        lot = slice(b, min(b + batch, samples))
        # One split: its backward is one concatenation, where a slice a strip would cost as many
        # full-size gradients.
        for i, q in enumerate(call.q[lot].split(rows, 2)):
            start, stop = i * rows, i * rows + q.shape[2]
            yield Strip(call, lot, slice(start, stop), _keys(call, select, start, stop), q)


def _keys(call: Call, select: Select, start: int, stop: int) -> slice:
    """Keys that some of the rows from `start` to `stop` can meet."""
    first, last = 0, call.k.shape[2]
    if call.causal:
        last = min(last, max(0, call.q_start + stop - call.k_start))
    if call.cu_seqlens is not None and not torch.compiler.is_compiling():
        # No key before the first row's sequence, none after the last row's.
        ends = call.cu_seqlens.tolist()
        first = max(end for end in ends if end <= start)
        last = min(last, min(end for end in ends if end >= stop))
    bounds = select.key_range(call, slice(start, stop))
    if bounds is not None:
        first, last = max(first, bounds[0]), min(last, bounds[1])
    return slice(min(first, last), last)


def _cut(x: Tensor | None, strip: Strip) -> Tensor | None:
    """Cut a mask or bias that broadcasts to (B, H, N, M) down to a strip."""
    if x is None:
        return None
    if x.shape[0] > 1:
        x = x[strip.batch]
    if x.shape[2] > 1:
        x = x[:, :, strip.rows]
    return x[..., strip.keys] if x.shape[3] > 1 else x


def strip_mask(strip: Strip, select: Select) -> Tensor | None:
    """Pairs that may meet: causality, the caller's mask and the selection together."""
    call = strip.call
    masks = [_cut(call.mask, strip), select.allow(strip)]
    first_row = call.q_start + strip.rows.start
    if call.causal and call.k_start + strip.keys.stop - 1 > first_row:
        masks.append(strip.k_index <= strip.q_index[:, None])
    if call.documents is not None:
        rows, keys = call.documents[strip.rows], call.documents[strip.keys]
        masks.append(rows[:, None] == keys)
    mask = None
    for item in masks:
        if item is not None:
            mask = item if mask is None else mask & item
    if mask is None:
        return None
    return mask.view((1,) * (4 - mask.ndim) + mask.shape)


def _weights(parts: Stations, strip: Strip) -> Tensor:
    scores, position = parts.score(strip), parts.position
    terms = []
    if position.biases and position.static and parts.normalize.biases_exponent:
        terms.append(position.bias(strip, None))
    elif position.biases:
        scores = position.bias(strip, scores)
    if parts.select.biases:
        terms.append(parts.select.bias(strip))
    bias = _cut(strip.call.bias, strip)
    if bias is not None:
        terms.append(bias)
    if terms and parts.normalize.biases_exponent:
        weights = parts.normalize.weigh_biased(strip, scores, sum(terms[1:], terms[0]))
    else:
        weights = parts.normalize.weigh(strip, sum(terms, scores))
    if strip.mask is not None:
        mask = strip.mask
        if mask.shape[1] not in (1, weights.shape[1]):  # a normalizer may join heads
            mask = mask[:, :: mask.shape[1] // weights.shape[1]]
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return weights


def run_strip(parts: Stations, strip: Strip, fused: bool) -> Tensor:
    """Outputs of one strip, (B, heads, R, v_dim).

    Args:
        parts: The parts.
        strip: The strip.
        fused: Let scaled_dot_product_attention do a dot-product softmax strip.
    """
    if strip.keys.start == strip.keys.stop:
        # An empty sum is a zero that still hangs on q, so that gradients find their way.
        nothing = strip.q[:, : parts.heads, :, :0].sum(-1, keepdim=True)
        return nothing.to(strip.v.dtype).expand(-1, -1, -1, strip.v.shape[3])
    strip = replace(strip, mask=strip_mask(strip, parts.select))
    if fused:
        return fused_strip(parts.position, strip, parts.select)
    weights = _weights(parts, strip)
    dropout = strip.call.dropout
    if dropout:
        weights = F.dropout(weights, dropout)
    return grouped_matmul(weights.to(strip.v.dtype), strip.v)


def fused_strip(position: Position, strip: Strip, select: Select | None = None) -> Tensor:
    """One strip of dot-product softmax attention through scaled_dot_product_attention."""
    call, mask = strip.call, strip.mask
    bias = _cut(call.bias, strip)
    if position.biases:
        term = position.bias(strip, None)
        bias = term if bias is None else bias + term
    if select is not None and select.biases:
        term = select.bias(strip)
        bias = term if bias is None else bias + term
    attn_mask: Tensor | None = mask
    if bias is not None:
        bias = bias.to(strip.q.dtype)
        shape = (1, 1, strip.q.shape[2], strip.k.shape[2])
        attn_mask = bias.expand(torch.broadcast_shapes(bias.shape, shape))
        if mask is not None:
            attn_mask = attn_mask.masked_fill(~mask, -torch.inf)
    heads = strip.q.shape[1]
    y = F.scaled_dot_product_attention(
        strip.q,
        repeat_heads(strip.k, heads),
        repeat_heads(strip.v, heads),
        attn_mask=attn_mask,
        dropout_p=call.dropout,
        scale=call.scale,
    )
    if call.mask is None:
        return y  # causality and selection leave every row its own key
    assert mask is not None
    return y.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def run(parts: Stations, call: Call, *, fused: bool = False, whole: bool = False) -> Tensor:
    """Attend with any combination of parts.

    Args:
        parts: The parts; their `prepare` has been called.
        call: The pass.
        fused: Use scaled_dot_product_attention inside the strips.
        whole: One strip, for comparison with the strips.

    Returns:
        (B, heads, N, v_dim).
    """
    pieces = list(strips(call, parts.select, whole))
    if len(pieces) == 1:
        return run_strip(parts, pieces[0], fused)
    if torch.is_grad_enabled():
        # The random numbers of dropout have to come again when a strip is recomputed.
        rng = call.dropout > 0 or parts.normalize.random
        outs = [
            checkpoint(run_strip, parts, strip, fused, use_reentrant=False, preserve_rng_state=rng)
            for strip in pieces
        ]
    else:
        outs = [run_strip(parts, strip, fused) for strip in pieces]
    return _join(outs, pieces, call)


def _join(outs: list[Tensor], pieces: list[Strip], call: Call) -> Tensor:
    """Put the strips' outputs together to (B, heads, N, v_dim)."""
    rows: list[Tensor] = []
    samples: list[Tensor] = []
    for y, strip in zip(outs, pieces, strict=True):
        rows.append(y)
        if strip.rows.stop == call.q.shape[2]:
            samples.append(torch.cat(rows, 2) if len(rows) > 1 else rows[0])
            rows = []
    return torch.cat(samples, 0) if len(samples) > 1 else samples[0]


def weights(parts: Stations, call: Call) -> Tensor:
    """All attention weights, (B, heads, N, M), before dropout: the one place that holds N x M."""
    total = call.k.shape[2]
    pieces = list(strips(call, parts.select))
    outs = []
    for strip in pieces:
        w = _weights(parts, replace(strip, mask=strip_mask(strip, parts.select)))
        outs.append(F.pad(w, (strip.keys.start, total - strip.keys.stop)))
    return _join(outs, pieces, call)
