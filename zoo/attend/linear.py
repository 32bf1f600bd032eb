"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020, "Transformers are RNNs").

    phi(x) = elu(x) + 1                               on q and k, elementwise, positive
    o_i    = phi(q_i) S / (phi(q_i) . z + eps)        S = sum_j phi(k_j) v_j^T   (B, H, D, D)
                                                      z = sum_j phi(k_j)         (B, H, D)

with sums over all keys, or over j <= i where attention is causal: then S and z are a recurrent
state of fixed size, D (D + 1) numbers per key/value head however long the past. The implicit
weights phi(q_i) . phi(k_j) / (sum + eps) are positive and sum to almost one. No parameters.

Cost N D (D + C) per head: the causal form takes chunks of C tokens, quadratic inside a chunk and
through the state between chunks, all in batched matrix products; the states before the chunks are
one cumulative sum over N / C matrices. (The cumulative sum over N matrices that the paper's
equation suggests takes 64 times the memory and is several times slower than softmax attention.)

What is left open or differs: dot products are not scaled, as in the paper (a `scale` is refused).
The paper adds no eps; its code adds 1e-6, which is followed here. Everything is computed in
float32 at least, since the sums outgrow half precision. A rotation of q and k comes before phi, so
the weights stay positive, but no longer depend on i - j alone. Dropout hides keys from the
numerator, each for all later queries, since single weights are never formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import Attend, Call, full_precision
from zoo.registry import Paper, Taxonomy, Traits, register

if TYPE_CHECKING:
    from zoo.attention import Attention

EPS = 1e-6
# Tokens of a chunk.
CHUNK = 64


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


def chunked_sums(
    a: Tensor, b: Tensor, w: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """y_i = a_i (state + sum over j <= i of b_j w_j^T), in time and memory O(N).

    Args:
        a: Features of queries, (B, G, R, N, D), R query heads to a group.
        b: Features of keys, (B, G, N, D).
        w: What is summed, (B, G, N, E).
        state: Sum over earlier tokens, (B, G, D, E), or None.
        chunk: Tokens of a chunk.

    Returns:
        y (B, G, R, N, E), and the state after the last token.
    """
    length = a.shape[3]
    chunk = min(chunk, length)
    short = -length % chunk
    if short:  # zero features add nothing to any sum
        a, b, w = (F.pad(x, (0, 0, 0, short)) for x in (a, b, w))
    a, b, w = (x.unflatten(-2, (-1, chunk)) for x in (a, b, w))  # (.., n, C, D)
    if state is None:
        state = b.new_zeros(*b.shape[:2], b.shape[-1], w.shape[-1])
    sums = torch.cat([state[:, :, None], b.transpose(-1, -2) @ w], 2).cumsum(2)
    near = (a @ b.transpose(-1, -2)[:, :, None]).tril() @ w[:, :, None]
    y = near + a @ sums[:, :, None, :-1]
    return y.flatten(3, 4)[:, :, :, :length], sums[:, :, -1]


@register(
    "linear",
    kind="attend",
    paper=Paper(
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "2006.16236",
    ),
    traits=Traits(mask="keys", bias=False, packed=False, cost="N * D * D"),
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

    def incompatible(self, host: Attention) -> str | None:
        """A scale, which features do not have."""
        if host.scale != host.layout.qk_dim**-0.5:
            return f"'linear' does not scale dot products; leave out scale={host.scale!r}"
        return None

    def forward(self, call: Call) -> Tensor:
        """Outputs of the heads, (B, H, N, v_dim)."""
        a, b = self._features(call)
        v = call.v.to(a.dtype)
        if call.dropout:
            v = v * F.dropout(v.new_ones(*v.shape[:3], 1), call.dropout)
        # With a column of ones beside the values, the sums carry the normaliser along.
        w = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        # A context is whole in every call, so there is nothing to remember of it.
        cache = None if call.cross else call.cache
        state = None if cache is None else cache.get_state("linear")
        with full_precision(a):
            if call.causal:
                y, state = chunked_sums(a, b, w, state)
            else:
                total = b.transpose(-1, -2) @ w
                state = total if state is None else state + total
                y = a @ state[:, :, None]
        if cache is not None:
            cache.set_state("linear", state)
        y = y[..., :-1] / (y[..., -1:] + EPS)
        return y.flatten(1, 2).to(call.v.dtype)

    def weights(self, call: Call) -> Tensor:
        """phi(q_i) . phi(k_j) over the sum of its row, (B, H, N, M).

        Raises:
            ZooError: Earlier keys are gone into the state of a cache.
        """
        if call.cache is not None and not call.cross and call.q_start:
            raise ZooError("'linear' keeps the sum of past keys only; no weights with a cache")
        a, b = self._features(call)
        with full_precision(a):
            products = (a @ b.transpose(-1, -2)[:, :, None]).flatten(1, 2)
        if call.causal:
            products = products.tril()
        return products / (products.sum(-1, keepdim=True) + EPS)

    @staticmethod
    def _features(call: Call) -> tuple[Tensor, Tensor]:
        """Of queries (B, G, R, N, D), R query heads to a group, and of keys (B, G, M, D)."""
        a = features(call.q).unflatten(1, (call.k.shape[1], -1))
        b = features(call.k)
        if call.key_mask is not None:
            b = b.masked_fill(~call.key_mask[..., None], 0.0)
        return a, b
