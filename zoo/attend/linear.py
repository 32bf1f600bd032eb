"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020, "Transformers are RNNs").

    phi(x) = elu(x) + 1                               on q and k, elementwise, positive
    o_i    = phi(q_i) S / (phi(q_i) . z + eps)        S = sum_j phi(k_j) v_j^T   (B, H, D, D)
                                                      z = sum_j phi(k_j)         (B, H, D)

with sums over all keys, or over j <= i where attention is causal: then S and z are a recurrent
state of fixed size, D (D + 1) numbers per key/value head however long the past. The implicit
weights phi(q_i) . phi(k_j) / (sum + eps) are positive and sum to almost one. No parameters.

Cost N D (D + C) per head: the causal form is that of `zoo.ops.linear` without a decay, in chunks
of C tokens, quadratic inside a chunk and through the state between chunks. A column of ones beside
the values makes the normaliser one more of their channels. (The cumulative sum over N matrices that
the paper's equation suggests takes 64 times the memory and is several times slower than softmax
attention.)

What is left open or differs: dot products are not scaled, as in the paper (a `scale` is refused).
The paper adds no eps; its code adds 1e-6, which is followed here. Everything is computed in
float32 at least, since the sums outgrow half precision. A rotation of q and k comes before phi, so
the weights stay positive, but no longer depend on i - j alone. Dropout hides keys from the
numerator, each for all later queries, since single weights are never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.ops.linear import chunked_linear_attention, parallel_linear_attention
from zoo.parts import Attend, Call, Host, Route, full_precision, grouped_matmul, share_groups
from zoo.registry import Paper, Taxonomy, Traits, register

EPS = 1e-6
Form = Callable[..., tuple[Tensor, Tensor]]


def features(x: Tensor) -> Tensor:
    """elu(x) + 1, in float32 at least."""
    return F.elu(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x) + 1


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, eps: float = EPS
) -> Tensor:
    """The quadratic form: weights first, then values; any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        causal: Key j is seen by queries i >= j only (N = M).
        eps: Added to the sum of a row.
    """
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    if causal:
        weights = weights.tril()
    return (weights / (weights.sum(-1, keepdim=True) + eps)) @ v


@register(
    "linear",
    kind="attend",
    paper=Paper(
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "2006.16236",
    ),
    traits=Traits(mask="keys", bias=False, cost="N * D * D"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="kernel",
        distribution="none_linear",
        complexity="linear",
        exact="no",
    ),
    aliases=("linear_attention",),
)
class Linear(Attend):
    """Dot products of positive features instead of exponentials, with a state of fixed size."""

    def incompatible(self, host: Host) -> str | None:
        """A scale, which features do not have."""
        if host.scale != host.layout.qk_dim**-0.5:
            return f"'linear' does not scale dot products; leave out scale={host.scale!r}"
        return None

    def forward(self, call: Call) -> Tensor:
        """Outputs of the heads, (B, H, N, v_dim)."""
        return self.mix(call, chunked_linear_attention, _totals)

    def mix(self, call: Call, causal: Form, whole: Form) -> Tensor:
        """The same by the given forms: `causal`, or `whole` for sums over all keys."""
        a, b = self._features(call)
        b, v = share_groups(b, call.v.to(a.dtype))
        if call.dropout:
            v = v * F.dropout(v.new_ones(*v.shape[:3], 1), call.dropout)
        w = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        options: dict[str, Any] = {}
        # A context is whole in every call, so there is nothing to remember of it.
        cache = None if call.cross else call.cache
        share = a.shape[1] // b.shape[1]
        if cache is not None:
            state = cache.get_state("linear")
            # Without a decay all heads of a group have one state.
            options["initial_state"] = None if state is None else state.repeat_interleave(share, 1)
        if call.cu_seqlens is not None:
            options["cu_seqlens"] = call.cu_seqlens
        with full_precision(a):
            y, state = (causal if call.causal else whole)(a, b, w, **options)
            if cache is not None:
                cache.set_state("linear", state[:, ::share])
            return (y[..., :-1] / (y[..., -1:] + EPS)).to(call.v.dtype)

    def weights(self, call: Call) -> Tensor:
        """phi(q_i) . phi(k_j) over the sum of its row, (B, H, N, M).

        Raises:
            ZooError: Earlier keys are gone into the state of a cache.
        """
        if call.cache is not None and not call.cross and call.q_start:
            raise ZooError("'linear' keeps the sum of past keys only; no weights with a cache")
        a, b = self._features(call)
        with full_precision(a):
            products = grouped_matmul(a, b.mT)
        if call.causal:
            products = products.tril()
        if call.documents is not None:
            products = products * (call.documents[:, None] == call.documents)
        return products / (products.sum(-1, keepdim=True) + EPS)

    @staticmethod
    def _features(call: Call) -> tuple[Tensor, Tensor]:
        """Of queries (B, H, N, D) and of keys (B, G, M, D)."""
        a, b = features(call.q), features(call.k)
        if call.key_mask is not None:
            b = b.masked_fill(~call.key_mask[..., None], 0.0)
        return a, b

    def routes(self) -> tuple[Route, ...]:
        """The kernel for causal sums; the quadratic form where it is asked for."""
        return (
            Route("linear_triton", _refuse_triton, _run_triton, packed=True),
            Route("reference", lambda host, call: None, _run_reference, auto=False, packed=True),
        )


def _totals(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over all keys, and those of earlier passes: y (B, H, N, E), state (B, H, D, E)."""
    share = a.shape[1] // b.shape[1]
    if cu_seqlens is None:
        total = b.mT @ w
        if initial_state is not None:
            total = total + initial_state[:, ::share]
        return grouped_matmul(a, total), total.repeat_interleave(share, 1)
    if torch.compiler.is_compiling():
        raise ZooError("cu_seqlens: packed sequences are cut by their numbers; do not compile them")
    sizes = [j - i for i, j in pairwise(cu_seqlens.tolist())]
    pieces = zip(*(x.split(sizes, 2) for x in (a, b, w)), strict=True)
    found = [_totals(*piece) for piece in pieces]
    return torch.cat([y for y, _ in found], 2), torch.cat([state for _, state in found])


def _all_pairs(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `_totals` through all N x M products."""
    products = grouped_matmul(a, b.mT)
    if cu_seqlens is not None:
        index = torch.arange(a.shape[2], device=a.device)
        document = torch.bucketize(index, cu_seqlens[1:], right=True)
        products = products * (document[:, None] == document)
    y = grouped_matmul(products, w)
    total = (b.mT @ w).repeat_interleave(a.shape[1] // b.shape[1], 1)
    if initial_state is not None:
        y, total = y + a @ initial_state, total + initial_state
    return y, total


def _refuse_triton(host: Host, call: Call) -> str | None:
    if not call.causal:
        return "without causality two matrix products do it"
    # Beside the values stands one more column.
    by_name = host.route == "linear_triton"
    reason = refuse(call.q, call.k, call.v, head_dim=127, by_name=by_name)
    if reason is None and torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into the kernel"
    return reason


def _run_triton(host: Host, call: Call) -> Tensor:
    from zoo.kernels.linear import linear_attention

    def kernel(
        a: Tensor,
        b: Tensor,
        w: Tensor,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, state = linear_attention(a, b, w, None, initial_state, cu_seqlens)
        return y, state

    part = host.attend
    assert isinstance(part, Linear)
    return part.mix(call, kernel, _totals)


def _run_reference(host: Host, call: Call) -> Tensor:
    part = host.attend
    assert isinstance(part, Linear)
    return part.mix(call, parallel_linear_attention, _all_pairs)
