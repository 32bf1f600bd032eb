"""CoPE, contextual position encoding (Golovneva, Wang, Weston, Sukhbaatar 2024).

The position of a key is counted in tokens that matter to the query, not in tokens:

    g_ij = sigmoid(q_i . kg_j / sqrt(D)), 0 where (i, j) may not meet        (B, H, N, M)
    p_ij = min(sum of g_it over t = j..i, npos - 1)       from the key up to the query
    z_in = q_i . E_n                                      E (D, npos), one for all heads
    b_ij = z_i between its whole numbers, at p_ij         linear interpolation
    s_ij = (q_i . k_j + b_ij) / sqrt(D)

E starts at zero, so an untrained layer has no positions. kg = k, or keys of its own (`sep_key`), or
v (`val_gates`). `nodiv` leaves b undivided, as the paper's listing reads; the released code
divides, and so do we. `with_rel` adds q_i . R_{i-j} / sqrt(D) with a learned R, in the released
code's variant "cope+rel"; the gates do not see that term. npos is max_len + 1 unless given; the
paper finds 64 to be enough. Parameters D npos (+ keys' projection, + max_len D).

Defined for causal self-attention: positions count up to the query. Where p is whole, b has a kink;
the fast route takes the slope on its right, the others (as the released code) none.

Cost N M D, and per pair a sigmoid, a running sum and two look-ups. No tensor (N, M, npos) exists,
and the route "cope_strips" keeps none of size (N, M): it works on strips of queries, newest
keys first. Once every row has counted to npos - 1 its older keys all add the same z_i: there it is
plain attention, so only about npos / (mean gate) keys of a row pay for their positions. Its floor
are the seven products of attention forward and backward, N M D each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.errors import CompatibilityError, ZooError
from zoo.parts import (
    Call,
    Layout,
    Normalize,
    Part,
    Position,
    Strip,
    full_precision,
    grouped_matmul,
    repeat_heads,
)
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.routes import Route

if TYPE_CHECKING:
    from zoo.attention import Attention

# Queries of a strip, keys by which its newest part grows, and scores worked on at once (they and
# what belongs to them should stay in a core's cache) unless one strip of one head has more.
ROWS, KEYS, LOT = 64, 64, 2**18


def position_logits(
    q: Tensor, gate_logits: Tensor, embedding: Tensor, mask: Tensor | None
) -> Tensor:
    """The term b of every pair, (B, H, R, M), as the paper's listing computes it.

    Args:
        q: (B, H, R, D).
        gate_logits: Gates before the sigmoid, (B, H, R, M).
        embedding: E, (D, npos).
        mask: Pairs that may meet, broadcastable to (B, H, R, M), or None for all.
    """
    gates = gate_logits.sigmoid()
    if mask is not None:
        gates = gates.masked_fill(~mask, 0.0)
    places = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=embedding.shape[1] - 1)
    # A place that is NaN makes its logit NaN, by way of the fraction, but is no index.
    index = places.detach().nan_to_num()
    above, below = index.ceil(), index.floor_()
    whole = q @ embedding
    fraction = places - below
    upper = whole.gather(-1, above.long())
    return fraction * upper + (1 - fraction) * whole.gather(-1, below.long())


def cope_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    embedding: Tensor,
    *,
    mask: Tensor,
    gate_k: Tensor | None = None,
    relative: Tensor | None = None,
    nodiv: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Causal attention with contextual positions, line by line with all pairs at once; any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        embedding: E, (D, npos).
        mask: Pairs that may meet, causality included, broadcastable to (B, H, N, M).
        gate_k: What the gates compare with, (B, H, M, D); default k.
        relative: R, a row for each distance, (max_len, D), or None.
        nodiv: Leave the position term undivided.
        scale: Default 1 / sqrt(D).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2)
    gate_logits = scores if gate_k is None else q @ gate_k.transpose(-1, -2)
    position = position_logits(q, gate_logits * scale, embedding, mask)
    if relative is not None:
        rows, keys = scores.shape[-2:]
        query = torch.arange(keys - rows, keys, device=q.device)
        distance = (query[:, None] - torch.arange(keys, device=q.device)).clamp(min=0)
        scores = scores + torch.einsum("bhnd,nmd->bhnm", q, relative[distance])
    scores = scores * scale + position if nodiv else (scores + position) * scale
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return weights @ v


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


def _other_parts(host: Attention, call: Call) -> str | None:
    wanted = {"score": "dot", "select": "all", "normalize": "softmax"}
    for kind, name in wanted.items():
        if host.part_names[kind] != name:
            return f"{kind} is {host.part_names[kind]!r}, not {name!r}"
    if call.bias is not None:
        return "it takes no bias on the scores"
    return "it has no dropout" if call.dropout else None


def _refuse_strips(host: Attention, call: Call) -> str | None:
    part = host.position
    assert isinstance(part, CoPE)
    reason = _other_parts(host, call)
    if reason:
        return reason
    if part.val_gates or part.relative is not None:
        return f"it has no {'val_gates' if part.val_gates else 'with_rel'}"
    if call.mask is not None and call.mask.shape[1:3] != (1, 1):
        return "its mask can hide keys only, for all heads and queries alike"
    if torch.compiler.is_compiling():
        return "a compiler cannot see through its backward pass"
    if torch._C._are_functorch_transforms_active():
        return "torch.func cannot see through its backward pass"
    if call.q.device.type != "cpu":
        return f"it is written for a CPU, not {call.q.device.type!r}"
    return None


def _run_strips(host: Attention, call: Call) -> Tensor:
    part = host.position
    assert isinstance(part, CoPE)
    shared = [call.k, call.v]
    gate_k = call.prepared["position"].get("gate_k")
    if gate_k is not None:
        shared.append(gate_k)
    if len({x.shape[1] for x in shared}) > 1:
        shared = [repeat_heads(x, call.q.shape[1]) for x in shared]
    mask = call.mask
    return cope_attention(
        call.q,
        shared[0],
        shared[1],
        part.embedding,
        gate_k=None if gate_k is None else shared[2],
        keys=None if mask is None else mask[:, 0, 0],
        nodiv=part.nodiv,
        scale=call.scale,
    )


def _refuse_reference(host: Attention, call: Call) -> str | None:
    part = host.position
    assert isinstance(part, CoPE)
    if part.relative is not None and call.k.shape[2] > len(part.relative):
        return f"{call.k.shape[2]} keys are more than the max_len={part.max_len} of with_rel"
    return _other_parts(host, call)


def _run_reference(host: Attention, call: Call) -> Tensor:
    part = host.position
    assert isinstance(part, CoPE)
    heads, rows, keys = call.q.shape[1], call.q.shape[2], call.k.shape[2]
    causal = torch.ones(rows, keys, dtype=torch.bool, device=call.q.device).tril(keys - rows)
    gate_k = call.v if part.val_gates else call.prepared["position"].get("gate_k")
    return cope_attention_reference(
        call.q,
        repeat_heads(call.k, heads),
        repeat_heads(call.v, heads),
        part.embedding,
        mask=causal if call.mask is None else causal & call.mask,
        gate_k=None if gate_k is None else repeat_heads(gate_k, heads),
        relative=part.relative,
        nodiv=part.nodiv,
        scale=call.scale,
    )


@register(
    "cope",
    kind="position",
    paper=Paper(
        "Contextual Position Encoding: Learning to Count What's Important", 2024, "2405.18719"
    ),
    traits=Traits(bidirectional=False, cross=False, equivariant=False),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters=(
        "qk_dim * (npos or max_len + 1) + with_rel * max_len * qk_dim"
        " + sep_key * k_heads * qk_dim * (dim + bias)"
    ),
)
class CoPE(Position):
    """Positions count the tokens that a gate lets through, and may lie between two embeddings.

    Positions that the caller gives play no part.

    Args:
        dim: Channels.
        layout: Head counts and widths.
        max_len: Longest sequence of training; may be None if `npos` is given.
        bias: A bias in the projection of `sep_key`.
        npos: Number of position embeddings; all farther positions share the last. None for
            max_len + 1, which reaches the farthest.
        sep_key: Gates compare queries with keys of their own projection.
        val_gates: Gates compare queries with values.
        nodiv: Do not divide the position term by sqrt(D).
        with_rel: Add a learned relative position; needs `max_len`, which is more than the distance
            of any pair that may meet. Compilers, and the meta device, know of no masks: there only
            lengths and windows count.
        shared: Take the position embeddings of the model's first layer, which has to ask for it
            too, with as many positions and heads of the same width.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: `npos` or `max_len` is missing or below 1, or `sep_key` and `val_gates` are both
            asked for.
    """

    biases = True
    special_init = True

    def __init__(
        self,
        dim: int,
        layout: Layout,
        max_len: int | None = None,
        bias: bool = False,
        npos: int | None = None,
        sep_key: bool = False,
        val_gates: bool = False,
        nodiv: bool = False,
        with_rel: bool = False,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if npos is None:
            if max_len is None:
                raise ZooError(
                    "npos=None: 'cope' has an embedding for each position up to max_len, which is "
                    "not known; give npos, e.g. npos=64, or max_len"
                )
            npos = max_len + 1
        if type(npos) is not int or npos < 1:
            raise ZooError(f"npos={npos!r} must be a whole number of at least 1")
        if sep_key and val_gates:
            raise ZooError(
                "sep_key=True and val_gates=True: gates of 'cope' compare queries with keys of "
                "their own or with values; give one of the two"
            )
        if with_rel and max_len is None:
            raise ZooError(
                "with_rel=True: 'cope' then has a vector for each distance below max_len, which "
                "is not known; give max_len"
            )
        self.npos, self.max_len = npos, max_len
        self.val_gates, self.nodiv, self.shared = val_gates, nodiv, shared
        width = layout.qk_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Parameter(torch.empty(width, npos, **made))
        self.relative: nn.Parameter | None = None
        if with_rel:
            self.relative = nn.Parameter(torch.empty(max_len or 0, width, **made))
        self.gate_key: nn.Linear | None = None
        self.gate_heads = layout.k_heads
        if sep_key:
            self.gate_key = nn.Linear(dim, layout.k_heads * width, bias=bias, **made)
        # What the other parts of a host say; see `attach`.
        self._scores_are_dots = False
        self._keep: int | None = None
        self._share_keys: Callable[[Tensor], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No positions at the start; distances normal with standard deviation 1 / sqrt(D)."""
        nn.init.zeros_(self.embedding)
        if self.relative is not None:
            nn.init.normal_(self.relative, std=self.relative.shape[1] ** -0.5)

    def attach(self, host: Attention) -> None:
        """See whether the scores are what the gates want, and how keys are kept and laid out."""
        self._scores_are_dots = host.part_names.get("score") == "dot"
        if isinstance(host.normalize, Normalize):
            self._share_keys = host.normalize.share_keys
            self._keep = host.select.window()

    def incompatible(self, host: Attention) -> str | None:
        """Gates from values need values as wide as queries."""
        layout = host.layout
        if self.val_gates and layout.qk_dim != layout.v_dim:
            return (
                f"'cope' with val_gates compares queries of width {layout.qk_dim} with values of "
                f"width {layout.v_dim}, as {host.part_names.get('normalize')!r} and "
                f"{host.part_names['project']!r} lay them out; use val_gates=False"
            )
        return None

    def tie(self, first: Part) -> None:
        """Share the position embeddings of the first layer, where `shared` asks for it."""
        if not self.shared:
            return
        assert isinstance(first, CoPE)
        own, other = (
            f"npos={part.npos}, heads of width {len(part.embedding)}, shared={part.shared}"
            for part in (self, first)
        )
        if own != other:
            raise CompatibilityError(
                f"'cope' in a layer with {own} cannot share the embeddings of the first layer "
                f"with {other}; allowed: the same settings in both"
            )
        self.embedding = first.embedding

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """The gates' own keys, (B, k_heads, M, D), those of earlier tokens included."""
        if self.gate_key is None:
            return {}
        keys = self.gate_key(call.x).unflatten(-1, (self.gate_heads, -1)).transpose(1, 2)
        if call.cache is not None:
            keys = call.cache.extend("cope_gate_k", keys, keep=self._keep)
        return {"gate_k": keys if self._share_keys is None else self._share_keys(keys)}

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        """Scores (B, score_heads, R, M) with the position terms."""
        gate_k = strip.prepared("position").get("gate_k")
        if gate_k is not None:
            gate_k = gate_k[strip.batch, :, strip.keys]
        elif self.val_gates or scores is None or not self._scores_are_dots:
            gate_k = strip.v if self.val_gates else strip.k
        gate_logits = scores
        if gate_k is not None:
            gate_logits = grouped_matmul(strip.q * strip.scale, gate_k.transpose(-1, -2))
        assert gate_logits is not None
        # Half precision cannot count beyond 256.
        wide = torch.promote_types(gate_logits.dtype, torch.float32)
        with full_precision(strip.q):
            q = strip.q.to(wide)
            q = q if self.nodiv else q * strip.scale
            term = position_logits(q, gate_logits.to(wide), self.embedding.to(wide), strip.mask)
            if self.relative is not None:
                term = term + self._relative_term(strip, wide)
        return term if scores is None else scores + term.to(scores.dtype)

    def _relative_term(self, strip: Strip, dtype: torch.dtype) -> Tensor:
        """The scaled q_i . R_{i-j}, (B, H, R, M)."""
        assert self.relative is not None
        assert self.max_len is not None
        distance = strip.q_index[:, None] - strip.k_index
        call, rows, keys = strip.call, strip.rows, strip.keys
        farthest = call.q_start + rows.stop - 1 - call.k_start - keys.start
        far = farthest >= self.max_len
        if far and (torch.compiler.is_compiling() or distance.is_meta):
            # There are no values of masks to look at.
            far = self._keep is None or self._keep > self.max_len
        elif far and strip.mask is not None:
            far = bool((strip.mask & (distance >= self.max_len)).any())
        if far:
            raise ZooError(
                f"max_len={self.max_len} of 'cope' with with_rel is too short for a distance of "
                f"{farthest}; allowed: less than max_len"
            )
        meets = (strip.q.to(dtype) * strip.scale) @ self.relative.to(dtype).t()
        distance = distance.clamp(0, self.max_len - 1)
        return meets.gather(-1, distance.expand(*meets.shape[:2], -1, -1))

    def routes(self) -> tuple[Route, ...]:
        """Strips with a backward pass written by hand, and the paper's form."""
        return (
            Route("cope_strips", _refuse_strips, _run_strips),
            Route("reference", _refuse_reference, _run_reference, auto=False),
        )

    def extra_repr(self) -> str:
        """The options."""
        flags = {
            "sep_key": self.gate_key is not None,
            "val_gates": self.val_gates,
            "nodiv": self.nodiv,
            "with_rel": self.relative is not None,
            "shared": self.shared,
        }
        return ", ".join([f"npos={self.npos}", *(name for name, on in flags.items() if on)])
