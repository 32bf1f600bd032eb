"""Which heads are on for a token, their gates, the balance loss: routers of `zoo.combine.moh`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import Call, widen

ROUTERS = ("linear", "query_norm")


def moh_gates_reference(
    x: Tensor,
    heads: int,
    shared_heads: int,
    top_k: int,
    w_routed: Tensor | None = None,
    w_shared: Tensor | None = None,
    w_balance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gates of the two-stage router, token by token; any dtype.

    Args:
        x: (B, N, C).
        heads: Heads H.
        shared_heads: Heads Hs that are always on.
        top_k: Routed heads that are on for a token.
        w_routed: W_g (H - Hs, C), or None without routed heads.
        w_shared: W_1 (Hs, C), or None for Hs < 2.
        w_balance: W_0 (2, C), or None without one of the groups.

    Returns:
        Gates (B, H, N), and the balance loss without its weight (None without routed heads).
    """
    routed = heads - shared_heads
    rows, chosen, scores = [], [], []
    for token in x.flatten(0, 1):
        if w_shared is not None:
            shared = shared_heads * (w_shared @ token).softmax(0)
        else:
            shared = torch.ones_like(token[:shared_heads])
        gates, on = token.new_zeros(routed), token.new_zeros(routed)
        if w_routed is not None:
            p = (w_routed @ token).softmax(0)
            best = p.argsort(descending=True)[:top_k]
            on[best] = 1
            gates = on * p / p[best].sum() * top_k
            chosen.append(on)
            scores.append(p)
        if w_balance is not None:
            a = 2 * (w_balance @ token).softmax(0)
            shared, gates = a[0] * shared, a[1] * gates
        rows.append(torch.cat([shared, gates]))
    loss = None
    if scores:
        f, p = torch.stack(chosen).mean(0), torch.stack(scores).mean(0)
        loss = (f * p).mean() * routed**2
    return torch.stack(rows).unflatten(0, x.shape[:2]).transpose(1, 2), loss


def query_norm_gates_reference(q: Tensor, shared_heads: int, top_k: int) -> Tensor:
    """Gates (B, H, N) of the router without parameters from q (B, H, N, D), token by token."""
    gates = torch.ones_like(q[..., 0])
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            norms = torch.stack([head[t].square().sum().sqrt() for head in q[b, shared_heads:]])
            p = (norms / norms.std()).softmax(0)
            on = torch.zeros_like(p)
            on[p.argsort(descending=True)[:top_k]] = 1
            gates[b, shared_heads:, t] = on * (1 + (p - p.detach()))
    return gates


def token_scores(router: nn.Linear, x: Tensor) -> Tensor:
    """Softmax (B, N, rows) over what a stage of the router "linear" says of tokens (B, N, C)."""
    return F.linear(x, router.weight.to(x.dtype)).softmax(-1)


def query_scores(q: Tensor, heads: int, shared_heads: int) -> Tensor:
    """Softmax (B, N, He) over the norms of the routed heads' queries.

    Args:
        q: (B, H or a multiple, N, D). A normalizer may give a head several score heads: their
            queries count as one vector.
        heads: Heads H.
        shared_heads: Heads Hs that are always on, the first ones.
    """
    q = q.unflatten(1, (heads, -1))[:, shared_heads:]  # (B, He, S, N, D)
    q = widen(q).transpose(2, 3)
    norms = torch.linalg.vector_norm(q, dim=(3, 4)).transpose(1, 2)
    if norms.shape[2] > 1 and norms.numel():
        spread = norms.std(-1, keepdim=True)
        # Equal norms have no spread to divide by, only rounding that would blow up gradients.
        least = torch.finfo(norms.dtype).eps * norms.mean(-1, keepdim=True)
        norms = norms / torch.where(spread > least, spread, 1.0)
    return norms.softmax(-1)


def linear_gates(p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates k p / (sum of the k largest), and which heads are on, both (B, N, He), from p."""
    best, chosen = _choose(p, top_k)
    if top_k == 1:
        return chosen + 0 * p, chosen  # p_e / p_e without rounding: the gradient is a true zero
    total = best.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
    return chosen * p * (top_k / total), chosen


def query_norm_gates(p: Tensor, top_k: int, training: bool) -> tuple[Tensor, Tensor]:
    """Gates of 0 or 1, and which heads are on, both (B, N, He), from p.

    Training sends the gradient of the gates that are 1 straight through to p.
    """
    _, chosen = _choose(p, top_k)
    gates = chosen.to(p.dtype)
    return (gates * (1 + (p - p.detach())) if training else gates), chosen


def _choose(p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest p of each token (B, N, k), and which ones they are (B, N, He)."""
    best = p.topk(top_k, -1)
    return best.values, torch.zeros_like(p, dtype=torch.bool).scatter(-1, best.indices, True)


def balance_loss(on: Tensor, p: Tensor, real: Tensor | None) -> Tensor:
    """He^2 mean_e(f_e P_e) from what is on and p, both (B, N, He), over the real tokens."""
    weight = torch.ones_like(p[..., :1]) if real is None else real[..., None].to(p.dtype)
    weight = weight / weight.sum().clamp(min=1)
    f, mean = (weight * on).sum((0, 1)), (weight * p).sum((0, 1))
    return (f * mean).mean() * p.shape[-1] ** 2


def real_tokens(call: Call) -> Tensor | None:
    """Tokens (B, N) that are no padding, or None for all.

    A mask speaks of keys: a token is padding if nobody may attend to it. Where the keys are not
    the tokens (a context), none is.
    """
    before = call.q_start - call.k_start
    length = call.x.shape[1]
    if call.mask is None or call.cross or call.mask.shape[3] != before + length:
        return None
    seen = call.mask.any(1).any(1)  # (B|1, M)
    return seen[:, before:].expand(len(call.x), -1)
