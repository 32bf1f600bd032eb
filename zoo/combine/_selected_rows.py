"""Softmax attention of selected rows of each head, for `zoo.combine.moh`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Selected rows that are computed at once: few enough to skip most of the future under causality.
STRIP_ROWS = 96


def _strips(rows: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Cut the sorted rows of one head: which of them, the first and the last row."""
    firsts, count = rows[::STRIP_ROWS].tolist(), len(rows)
    lasts = rows[STRIP_ROWS - 1 :: STRIP_ROWS].tolist()
    if count % STRIP_ROWS:
        lasts += rows[-1:].tolist()
    for i, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        yield slice(i * STRIP_ROWS, min((i + 1) * STRIP_ROWS, count)), first, last


class SelectedRows(torch.autograd.Function):
    """Softmax attention of some rows of each head against all keys; zeros in the other rows.

    The weights of a strip live in one reused buffer and are computed again in the backward pass.
    Under causality the keys of a strip end at its last row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        counts: list[int],
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Attend.

        Args:
            ctx: Of autograd.
            q: (B, H, N, D).
            k: (B, H, M, D).
            v: (B, H, M, E).
            rows: Selected rows of all heads of all samples, sorted within each head.
            counts: How many of them each head has.
            causal: Row i sees keys 0..i.
            scale: Factor on dot products.

        Returns:
            (B, H, N, E), laid out as (B, N, H, E).
        """
        samples, heads, length, _ = q.shape
        y = q.new_zeros(samples, length, heads, v.shape[3]).transpose(1, 2)
        spare = q.new_empty(STRIP_ROWS * k.shape[2])
        for i, own in enumerate(rows.split(counts)):
            b, h = divmod(i, heads)
            keys, values = k[b, h].contiguous(), v[b, h].contiguous()
            queries = q[b, h].index_select(0, own).mul_(scale)
            out = q.new_empty(len(own), v.shape[3])
            for part, first, last in _strips(own):
                bounds = (own[part], first, last) if causal else None
                weights = SelectedRows.weights(queries[part], keys, bounds, spare)
                torch.mm(weights, values[: weights.shape[1]], out=out[part])
            y[b, h].index_copy_(0, own, out)
        ctx.save_for_backward(q, k, v, rows)
        ctx.counts, ctx.causal, ctx.scale = counts, causal, scale
        return y

    @staticmethod
    def weights(
        queries: Tensor, keys: Tensor, bounds: tuple[Tensor, int, int] | None, spare: Tensor
    ) -> Tensor:
        """Weights (R, M) of scaled queries (R, D), in the memory of `spare`."""
        seen = len(keys) if bounds is None else bounds[2] + 1
        scores = spare[: len(queries) * seen].view(len(queries), seen)
        torch.mm(queries, keys[:seen].t(), out=scores)
        if bounds is not None and bounds[1] < bounds[2]:
            rows, first, last = bounds  # every row of the strip sees keys 0..first
            late = torch.arange(first + 1, last + 1, device=keys.device)
            scores[:, first + 1 :].masked_fill_(rows[:, None] < late, -torch.inf)
        return torch.softmax(scores, -1, out=scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, rows = ctx.saved_tensors
        dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        spare = q.new_empty(2, STRIP_ROWS * k.shape[2])
        for i, own in enumerate(rows.split(ctx.counts)):
            b, h = divmod(i, q.shape[1])
            keys, values = k[b, h].contiguous(), v[b, h].contiguous()
            queries = q[b, h].index_select(0, own).mul_(ctx.scale)
            wanted = grad[b, h].index_select(0, own)
            moved = torch.empty_like(queries)
            for part, first, last in _strips(own):
                bounds = (own[part], first, last) if ctx.causal else None
                weights = SelectedRows.weights(queries[part], keys, bounds, spare[0])
                seen = weights.shape[1]
                dv[b, h, :seen].addmm_(weights.t(), wanted[part])
                errors = spare[1, : weights.numel()].view_as(weights)
                torch.mm(wanted[part], values[:seen].t(), out=errors)
                torch.ops.aten._softmax_backward_data.out(
                    errors, weights, -1, weights.dtype, grad_input=errors
                )
                torch.mm(errors, keys[:seen], out=moved[part])
                dk[b, h, :seen].addmm_(errors.t(), queries[part])
            dq[b, h].index_copy_(0, own, moved.mul_(ctx.scale))
        return dq, dk, dv, None, None, None, None
