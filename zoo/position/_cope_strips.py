"""CoPE by strips of queries, newest keys first, with a backward pass by hand: `zoo.position.cope`.

Legend: X groups of heads of samples, rows those of all heads of a group, W keys of a strip.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ZooError
from zoo.parts import full_precision

# Queries of a strip, keys by which its newest part grows, and scores worked on at once (they and
# what belongs to them should stay in a core's cache) unless one strip of one head has more.
ROWS, KEYS, LOT = 64, 64, 2**18


class _Work:
    """What a strip needs of scores and their like, (X, rows, keys), reused from strip to strip."""

    def __init__(self, lot: int, rows: int, keys: int, like: Tensor, backward: bool) -> None:
        self.shape = (lot, rows, keys)
        self.scores, self.gates, self.places = (like.new_empty(self.shape) for _ in range(3))
        self.index = like.new_empty(self.shape, dtype=torch.int64)
        pair = torch.complex64 if like.dtype == torch.float32 else torch.complex128
        self.pairs = like.new_empty(self.shape, dtype=pair)
        self.grad = like.new_empty(self.shape) if backward else self.scores
        self.separate: Tensor | None = None

    def gate_logits(self) -> Tensor:
        """Room for gates that are not those of the scores."""
        if self.separate is None:
            self.separate = torch.empty_like(self.scores)
        return self.separate


class _Piece:
    """A strip of queries of some groups of heads against its keys, newest first.

    Rows are those of some heads of each group, R a head. Key c of the strip is hidden from row r
    of a head where c + r < R - 1.
    """

    def __init__(self, cut: tuple[slice, slice, slice], total: int, hidden: Tensor | None) -> None:
        self.cut = cut
        self.groups, _, self.rows = cut
        self.keys = slice(total - self.rows.stop, None)
        self.hidden = None if hidden is None else hidden[self.groups, None, self.keys]

    def queries(self, x: Tensor) -> Tensor:
        """Cut (groups, repeats, N, D) to (X, rows, D)."""
        return x[self.cut].flatten(1, 2)

    def put(self, into: Tensor, x: Tensor) -> None:
        """Undo `queries`."""
        into[self.cut] = x.unflatten(1, (-1, self.rows.stop - self.rows.start))

    def score(self, q: Tensor, k: Tensor, out: Tensor) -> Tensor:
        """Dot products (X, rows, W) without those that may not be seen."""
        k = k[self.groups, self.keys]
        s = out[: q.shape[0], : q.shape[1], : k.shape[1]]
        torch.bmm(q, k.transpose(1, 2), out=s)
        rows = self.rows.stop - self.rows.start
        triangle = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril(-1).flip(0)
        s.unflatten(1, (-1, rows))[..., :rows].masked_fill_(triangle, -torch.inf)
        return s if self.hidden is None else s.masked_fill_(self.hidden, -torch.inf)

    def count(self, gate_logits: Tensor, limit: int, work: _Work) -> int:
        """Fill `work.gates` and `work.places` from the newest key on; return where to stop.

        All rows have counted to `limit` there, or there are no more keys.
        """
        lot, rows, keys = gate_logits.shape
        gates, places = work.gates[:lot, :rows], work.places[:lot, :rows]
        start, stop = 0, min(keys, max(limit, self.rows.stop - self.rows.start))
        while True:
            new = places[..., start:stop]
            torch.sigmoid(gate_logits[..., start:stop], out=gates[..., start:stop])
            torch.cumsum(gates[..., start:stop], -1, out=new)
            if start:
                new += places[..., start - 1 : start]
            if stop == keys or bool((new[..., -1] >= limit).all()):
                return stop
            start, stop = stop, min(keys, stop + KEYS)

    def place(self, scores: Tensor, table: Tensor, near: int, work: _Work) -> None:
        """Add the interpolated term to the newest `near` keys' scores.

        Leaves in `work`: places without their whole part, that part as index, and the pairs found.
        """
        lot, rows = scores.shape[:2]
        places, index, pairs = (
            x[:lot, :rows, :near] for x in (work.places, work.index, work.pairs)
        )
        index.copy_(places.clamp_(max=table.shape[2] - 1))
        if bool(places[..., -1].isnan().any()):  # as it is wherever a row has a NaN
            index.clamp_(min=0)
        # One look-up finds the value at the whole number below and the slope from there.
        torch.gather(table, -1, index, out=pairs)
        value, slope = torch.view_as_real(pairs).unbind(-1)
        scores[..., :near].add_(value).addcmul_(places.frac_(), slope)


def _table(z: Tensor) -> Tensor:
    """Values of z (X, rows, npos), and the steps between them as imaginary parts."""
    step = torch.zeros_like(z)
    torch.sub(z[..., 1:], z[..., :-1], out=step[..., :-1])
    return torch.complex(z, step)


def _pieces(q: Tensor, hidden: Tensor | None, keys: int) -> tuple[list[_Piece], tuple[int, int]]:
    """Strips of q (groups, repeats, N, D), and the most groups and rows that one has."""
    groups, repeats, length = q.shape[:3]
    # Heads that share keys are rows of one product, which pays for twice the room.
    room = min(repeats, 2) * LOT // max(1, keys)
    rows = max(1, min(ROWS, length, max(ROWS // min(repeats, 4), room // repeats)))
    heads = max(1, min(repeats, room // rows))
    lot = max(1, min(groups, LOT // max(1, heads * rows * keys)))
    cuts = product(_cut(groups, lot), _cut(repeats, heads), _cut(length, rows))
    return [_Piece(cut, length, hidden) for cut in cuts], (lot, heads * rows)


def _cut(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


class _Strips(torch.autograd.Function):
    """Attention with contextual positions on (groups, ...) tensors whose keys run newest first.

    Takes q (groups, repeats, N, D) with the scale on it, k and v (groups, M, D), gate keys like k
    or None, E (D, npos) and hidden keys (groups, M) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_k: Tensor | None,
        embedding: Tensor,
        hidden: Tensor | None,
    ) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[2])
        lse = q.new_empty(*q.shape[:3], 1)
        pieces, (lot, rows) = _pieces(q, hidden, k.shape[1])
        work = _Work(lot, rows, k.shape[1], q, backward=False)
        for piece in pieces:
            scores, last, near, _ = _scores(piece, piece.queries(q), k, gate_k, embedding, work)
            top = scores[..., :near].amax(-1, keepdim=True)
            if near < scores.shape[2]:
                top = torch.maximum(top, scores[..., near:].amax(-1, keepdim=True) + last)
            top.clamp_(min=torch.finfo(q.dtype).min)  # rows that see nothing
            weights = _exp(scores, near, top, last)
            total = weights.sum(-1, keepdim=True)
            y = torch.bmm(weights, v[piece.groups, piece.keys])
            if hidden is not None:
                total.masked_fill_(total == 0, 1.0)
            piece.put(out, y / total)
            piece.put(lse, top + total.log())
        ctx.save_for_backward(q, k, v, gate_k, embedding, hidden, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate_k, embedding, hidden, out, lse = ctx.saved_tensors
        with full_precision(q):  # autocast is as the caller of this pass has it
            dq = torch.empty_like(q)
            dk, dv, de = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(embedding)
            dg = None if gate_k is None else torch.zeros_like(gate_k)
            delta = (grad_out * out).sum(-1, keepdim=True)
            pieces, (lot, rows) = _pieces(q, hidden, k.shape[1])
            work = _Work(lot, rows, k.shape[1], q, backward=True)
            for piece in pieces:
                groups, keys = piece.groups, piece.keys
                q_, dy = piece.queries(q), piece.queries(grad_out)
                scores, last, near, table = _scores(piece, q_, k, gate_k, embedding, work)
                weights = _exp(scores, near, piece.queries(lse), last)
                _add(dv[groups, keys], weights, dy)
                ds = work.grad[: scores.shape[0], : scores.shape[1], : scores.shape[2]]
                torch.bmm(dy, v[groups, keys].transpose(1, 2), out=ds)
                ds.sub_(piece.queries(delta)).mul_(weights)
                gate_grad, dz = _position_backward(ds, scores, near, table, work)
                dq_ = torch.bmm(dz, embedding.t().expand(len(dz), -1, -1))
                de.addmm_(q_.flatten(0, 1).t(), dz.flatten(0, 1))
                if gate_k is None:
                    ds[..., :near] += gate_grad
                else:
                    assert dg is not None
                    found = gate_k[groups, keys][:, :near]
                    torch.baddbmm(dq_, gate_grad, found, out=dq_)
                    _add(dg[groups, keys][:, :near], gate_grad, q_)
                torch.baddbmm(dq_, ds, k[groups, keys], out=dq_)
                _add(dk[groups, keys], ds, q_)
                piece.put(dq, dq_)
            return dq, dk, dv, dg, de, None


def _scores(
    piece: _Piece, q: Tensor, k: Tensor, gate_k: Tensor | None, embedding: Tensor, work: _Work
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Scores (X, rows, W) of which all but the newest lack the constant that comes second.

    Then the number of the newest, and the table of values and steps.
    """
    scores = piece.score(q, k, work.scores)
    gate_logits = scores if gate_k is None else piece.score(q, gate_k, work.gate_logits())
    z = torch.bmm(q, embedding.expand(len(q), -1, -1))
    near = piece.count(gate_logits, embedding.shape[1] - 1, work)
    table = _table(z)
    piece.place(scores, table, near, work)
    return scores, z[..., -1:], near, table


def _exp(scores: Tensor, near: int, shift: Tensor, last: Tensor) -> Tensor:
    """exp(scores - shift), the constant of the older keys included, in place."""
    scores[..., :near].sub_(shift)
    scores[..., near:].sub_(shift - last)
    return scores.exp_()


def _add(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b, (X, rows, W) and (X, rows, D), to (X, W, D)."""
    torch.baddbmm(into, a.transpose(1, 2), b, out=into)


def _position_backward(
    ds: Tensor, spare: Tensor, near: int, table: Tensor, work: _Work
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates' logits (X, rows, near) and of z (X, rows, npos).

    Args:
        ds: Gradient of the scores, (X, rows, W).
        spare: Room of the same shape.
        near: Keys that have a position of their own.
        table: What `_table` made.
        work: As the strip's scores left it; used up.
    """
    lot, rows = ds.shape[:2]
    gates, places, index, pairs = (
        x[:lot, :rows, :near] for x in (work.gates, work.places, work.index, work.pairs)
    )
    db, dp = ds[..., :near], spare[..., :near]
    value, slope = torch.view_as_real(pairs).unbind(-1)
    torch.mul(db, slope, out=dp)
    # b = z[below] + fraction * (z[below + 1] - z[below])
    value.copy_(db)
    torch.mul(db, places, out=slope)
    found = torch.zeros_like(table).scatter_add_(-1, index, pairs)
    dz = found.real - found.imag
    dz[..., 1:] += found.imag[..., :-1]
    if near < ds.shape[2]:
        # The gradients of a row's scores add up to zero: this is what the older keys have.
        dz[..., -1] -= db.sum(-1)
    # A gate moves its own key and all older ones.
    older = torch.cumsum(dp, -1, out=places)
    dp.sub_(older).add_(older[..., -1:])
    dp.mul_(gates)
    return dp.addcmul_(dp, gates, value=-1.0), dz


def cope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    embedding: Tensor,
    *,
    gate_k: Tensor | None = None,
    keys: Tensor | None = None,
    nodiv: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax attention with contextual positions by strips, in memory O(M).

    Args:
        q: (B, H, N, D), the latest N of the M tokens.
        k: (B, G, M, D), G dividing H.
        v: (B, G, M, E).
        embedding: E, (D, npos).
        gate_k: What the gates compare with, (B, G, M, D); default k.
        keys: Keys that may be seen, (B, M) or (1, M) boolean, or None for all.
        nodiv: Leave the position term undivided.
        scale: Default 1 / sqrt(D).

    Returns:
        (B, H, N, E).

    Raises:
        ZooError: Shapes that do not fit, or keys that are not boolean.
    """
    _check_shapes(q, k, v, embedding, gate_k, keys)
    samples, heads, length, width = q.shape
    groups, dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale

    def newest_first(x: Tensor, factor: float = 1.0) -> Tensor:
        x = x.to(dtype).flip(2).flatten(0, 1)
        return x if factor == 1 else x * factor

    # The factor on q acts on the position term too, so with `nodiv` keys have it instead.
    on_q, on_k = (1.0, scale) if nodiv else (scale, 1.0)
    hidden = None
    if keys is not None:
        hidden = ~keys.flip(1).expand(samples, -1).repeat_interleave(groups, 0)
    with full_precision(q):
        y = _Strips.apply(
            (q.to(dtype) * on_q).reshape(samples * groups, heads // groups, length, width),
            newest_first(k, on_k),
            newest_first(v),
            None if gate_k is None else newest_first(gate_k, on_k),
            embedding.to(dtype),
            hidden,
        )
    return y.view(samples, heads, length, v.shape[3]).to(v.dtype)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, embedding: Tensor, gate_k: Tensor | None, keys: Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ZooError(f"{name} of shape {tuple(x.shape)}; allowed: (batch, heads, tokens, D)")
    samples, heads, length, width = q.shape
    groups, total = k.shape[1:3]
    if not groups or heads % groups:
        raise ZooError(f"k has {groups} heads; allowed: a divisor of the {heads} heads of q")
    if length > total:
        raise ZooError(
            f"q has {length} queries, but k has {total} keys; allowed: at most as many queries as "
            "keys, of which they are the latest"
        )
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (samples, groups, total, width)),
        "v": (v, (samples, groups, total, v.shape[-1])),
        "gate_k": (gate_k, tuple(k.shape)),
        "embedding": (embedding, (width, max(1, embedding.shape[-1]))),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and tuple(given.shape) != shape:
            raise ZooError(f"{name} of shape {tuple(given.shape)}; allowed: {shape}")
    if keys is not None:
        fits = tuple(keys.shape) in ((samples, total), (1, total))
        if keys.dtype != torch.bool or not fits:
            raise ZooError(
                f"keys of dtype {keys.dtype} and shape {tuple(keys.shape)}; allowed: torch.bool "
                f"of shape ({samples}, {total}) or (1, {total})"
            )
