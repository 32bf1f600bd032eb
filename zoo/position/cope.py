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
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.errors import CompatibilityError, ZooError
from zoo.host.refusals import refuse_parts, refuse_tracing
from zoo.parts import (
    Call,
    Host,
    Layout,
    Normalize,
    Part,
    Position,
    Route,
    Strip,
    full_precision,
    grouped_matmul,
    repeat_heads,
)
from zoo.position._cope_relative import relative_term
from zoo.position._cope_strips import cope_attention
from zoo.registry import Paper, Taxonomy, Traits, register


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


def _other_parts(host: Host, call: Call) -> str | None:
    dense = {"score": "dot", "select": "all", "normalize": "softmax"}
    reason = refuse_parts(host, dense)
    if reason:
        return reason
    if call.bias is not None:
        return "it takes no bias on the scores"
    return "it has no dropout" if call.dropout else None


def _refuse_strips(host: Host, call: Call) -> str | None:
    part = host.position
    assert isinstance(part, CoPE)
    reason = _other_parts(host, call)
    if reason:
        return reason
    if part.val_gates or part.relative is not None:
        return f"it has no {'val_gates' if part.val_gates else 'with_rel'}"
    if call.mask is not None and call.mask.shape[1:3] != (1, 1):
        return "its mask can hide keys only, for all heads and queries alike"
    reason = refuse_tracing(
        "a compiler cannot see through its backward pass",
        "torch.func cannot see through its backward pass",
    )
    if reason:
        return reason
    if call.q.device.type != "cpu":
        return f"it is written for a CPU, not {call.q.device.type!r}"
    return None


def _run_strips(host: Host, call: Call) -> Tensor:
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


def _refuse_reference(host: Host, call: Call) -> str | None:
    part = host.position
    assert isinstance(part, CoPE)
    if part.relative is not None and call.k.shape[2] > len(part.relative):
        return f"{call.k.shape[2]} keys are more than the max_len={part.max_len} of with_rel"
    return _other_parts(host, call)


def _run_reference(host: Host, call: Call) -> Tensor:
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
        npos = checks.whole("npos", npos)
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

    def attach(self, host: Host) -> None:
        """See whether the scores are what the gates want, and how keys are kept and laid out."""
        self._scores_are_dots = host.part_names.get("score") == "dot"
        if isinstance(host.normalize, Normalize):
            self._share_keys = host.normalize.share_keys
            self._keep = host.select.window()

    def incompatible(self, host: Host) -> str | None:
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
                term = term + relative_term(strip, self.relative.to(wide), self._keep)
        return term if scores is None else scores + term.to(scores.dtype)

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
