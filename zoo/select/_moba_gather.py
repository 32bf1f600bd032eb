"""MoBA by gathered queries, for `zoo.select.moba`: time follows N * k * block.

A head at a time: the queries that chose a block are gathered into one list, blocks in their order,
each list meets its block in one fused call, and results go back to their queries by one weighted
sum of rows. Going back, each list is differentiated with the merged output and log-sum-exp. Memory
beside inputs and outputs is that of one head's lists, N P (D + E) numbers, used again for the next.

Legend: N tokens of a sequence, D width of q and k, E width of v, P past blocks of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.again import differentiate_again
from zoo.ops.partial import flash, flash_backward
from zoo.parts import full_precision

Dense = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Lists:
    """The queries of a head by the blocks that they chose.

    Args:
        rows: Query of each entry, block after block.
        spans: Block, first and last entry of each list that is not empty.
        place: Entry of each choice plus one, (N, P); 0 where there is none.
    """

    rows: Tensor
    spans: list[tuple[int, int, int]]
    place: Tensor

    @staticmethod
    def of(chosen: Tensor, blocks: int) -> _Lists:
        """Sort the choices (N, P) of a head; small integers are sorted by counting."""
        flat = chosen.reshape(-1)
        order = flat.sort(stable=True)[1]
        counts = torch.bincount(flat + 1, minlength=blocks + 1).tolist()
        lacking = counts[0]  # choices of -1 stand first
        entry = torch.arange(1 - lacking, order.numel() + 1 - lacking, device=flat.device)
        place = torch.zeros_like(order).scatter_(0, order, entry.clamp_(min=0))
        spans, first = [], 0
        for block, count in enumerate(counts[1:]):
            if count:
                spans.append((block, first, first + count))
            first += count
        return _Lists(order[lacking:] // chosen.shape[1], spans, place.view(chosen.shape))

    def gather(self, x: Tensor, out: Tensor) -> Tensor:
        """Rows of x (N, ..) by lists; fresh memory would cost more than the copy."""
        return torch.index_select(x, 0, self.rows, out=out[: self.rows.numel()])

    def sum(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum over each query's choices of its rows of x (1 + entries, E), whose first is zero."""
        return F.embedding_bag(self.place, x, mode="sum", per_sample_weights=weights)


def _own(length: int, block: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Whole blocks as one batch of attention to oneself, and the short one at the end."""
    whole = length // block
    if whole:
        yield slice(0, whole * block), (whole, block)
    if length % block:
        yield slice(whole * block, length), (1, length % block)


def _batch(x: Tensor, part: slice, shape: tuple[int, int]) -> Tensor:
    """Rows of (N, D) as (blocks, 1, block, D)."""
    return x[part].unflatten(0, shape)[:, None]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, scale: float, work: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Output (N, E) and log-sum-exp (N,) of a head."""
    length = q.shape[0]
    out, lse = q.new_empty(length, v.shape[1]), q.new_empty(length)
    for own, shape in _own(length, block):
        o, logs = flash(*(_batch(x, own, shape) for x in (q, k, v)), scale=scale, causal=True)
        out[own].unflatten(0, shape).copy_(o[:, 0])
        lse[own] = logs.flatten()
    lists = _Lists.of(chosen, -(-length // block))
    if not lists.spans:
        return out, lse
    queries, rows, logs = work
    queries = lists.gather(q, queries)
    rows[0], logs[0] = 0, -torch.inf
    for j, first, last in lists.spans:
        keys = slice(j * block, (j + 1) * block)
        some = (x[None, None] for x in (queries[first:last], k[keys], v[keys]))
        o, s = flash(*some, scale=scale)
        rows[1 + first : 1 + last] = o[0, 0]
        logs[1 + first : 1 + last] = s[0, 0]
    parts = logs.take(lists.place)  # (N, P)
    total = lse
    for part in parts.unbind(1):
        total = torch.logaddexp(total, part)
    out.mul_(lse.sub_(total).exp_()[:, None])
    out += lists.sum(rows, parts.sub_(total[:, None]).exp_())
    return out, total


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    first_head: bool,
    block: int,
    scale: float,
    work: list[Tensor],
) -> None:
    """Put the gradients of a head into `found`: added to k's and v's, but for the first head."""
    length = q.shape[0]
    dq, dk, dv = found
    for part, shape in _own(length, block):
        g, q_own, k_own, v_own, o = (_batch(x, part, shape) for x in (grad, q, k, v, out))
        logs = lse[part].view(shape[0], 1, shape[1])
        pieces = flash_backward(g, q_own, k_own, v_own, o, logs, scale=scale, causal=True)
        dq[part].unflatten(0, shape).copy_(pieces[0][:, 0])
        for into, piece in ((dk, pieces[1][:, 0]), (dv, pieces[2][:, 0])):
            rows = into[part].unflatten(0, shape)
            _ = rows.copy_(piece) if first_head else rows.add_(piece)
    lists = _Lists.of(chosen, -(-length // block))
    if not lists.spans:
        return
    grads, queries, outs = (
        lists.gather(x, w) for x, w in zip((grad, q, out), work[:3], strict=True)
    )
    logs, rows = lse[lists.rows], work[3]
    rows[0] = 0
    for j, first, last in lists.spans:
        keys, part = slice(j * block, (j + 1) * block), slice(first, last)
        some = (x[None, None] for x in (grads[part], queries[part], k[keys], v[keys], outs[part]))
        g, q_list, k_block, v_block, o = some
        s = logs[None, None, part]
        pieces = flash_backward(g, q_list, k_block, v_block, o, s, scale=scale)
        rows[1 + first : 1 + last] = pieces[0][0, 0]
        dk[keys] += pieces[1][0, 0]
        dv[keys] += pieces[2][0, 0]
    dq += lists.sum(rows)


class Gather(torch.autograd.Function):
    """MoBA of q (B, H, N, D), k (B, G, N, D), v (B, G, N, E) by choices (B, H, N, P).

    Keeps inputs, output and a number per row. `bounds` are the first and last token of each
    sequence; `dense` computes the same plainly, for second derivatives.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        block: int,
        scale: float,
        bounds: list[int],
        dense: Dense,
    ) -> tuple[Tensor, Tensor]:
        """Output (B, H, N, E) and log-sum-exp (B, H, N)."""
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3])
        most = _longest(bounds) * chosen.shape[3]
        work = [q.new_empty(most, q.shape[3])]
        work += [q.new_empty(most + 1, v.shape[3]), q.new_empty(most + 1)]
        with full_precision(q):
            for head, keys, part in _heads(q, k, bounds):
                mine = (q[head], k[keys], v[keys], chosen[head])
                # Rows of a head lie far apart where those of all heads lie side by side.
                q_h, k_h, v_h, picks = (x[part].contiguous() for x in mine)
                o, s = _forward(q_h, k_h, v_h, picks, block, scale, work)
                out[head][part], lse[head][part] = o, s
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass recomputes from."""
        q, k, v, chosen, ctx.block, ctx.scale, ctx.bounds, ctx.dense = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, chosen, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, chosen, out, lse = ctx.saved_tensors
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            with full_precision(q):
                y = ctx.dense(q, k, v, chosen)
                needed = ctx.needs_input_grad[:3]
                back = differentiate_again([y], (q, k, v), needed, grads[:1])
            return (*back, *nothing)
        grad = grads[0].to(out.dtype)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        most = _longest(ctx.bounds) * chosen.shape[3]
        widths = (v.shape[3], q.shape[3], v.shape[3])
        work = [q.new_empty(most, width) for width in widths]
        work.append(q.new_empty(most + 1, q.shape[3]))
        with full_precision(q):
            for head, keys, part in _heads(q, k, ctx.bounds):
                mine = (grad[head], q[head], k[keys], v[keys], out[head], lse[head], chosen[head])
                g, q_h, k_h, v_h, o, s, picks = (x[part].contiguous() for x in mine)
                into = dq[head][part], dk[keys][part], dv[keys][part]
                first = head[1] % (q.shape[1] // k.shape[1]) == 0
                _backward(g, q_h, k_h, v_h, o, s, picks, into, first, ctx.block, ctx.scale, work)
        return (dq, dk, dv, *nothing)


def _longest(bounds: list[int]) -> int:
    return max((b - a for a, b in pairwise(bounds)), default=0)


def _heads(
    q: Tensor, k: Tensor, bounds: list[int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], slice]]:
    """Sample and head of queries, those of their keys, and the tokens of a sequence."""
    repeats = q.shape[1] // max(1, k.shape[1])
    for a, b in pairwise(bounds):
        for sample in range(q.shape[0] if b > a else 0):
            for head in range(q.shape[1]):
                yield (sample, head), (sample, head // repeats), slice(a, b)
