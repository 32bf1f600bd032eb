"""The start of a pass: the journey of x up to the scores.

    x (B, N, C) -> place -> embed -> project -> norm -> rotate -> remember -> read -> prepare

Legend: B batch, N query length, M key length, C channels, D head dim. What comes then, from the
scores to the heads' outputs, is the business of a route; `Attention.forward` joins the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.cache import LayerCache
from zoo.call import Call
from zoo.errors import ZooError
from zoo.host import checks
from zoo.parts import Host, Part


def begin(
    host: Host,
    x: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    positions: Tensor | None,
    context_positions: Tensor | None,
    cache: LayerCache | None,
    cu_seqlens: Tensor | None,
) -> Call:
    """Project, place and collect everything that the parts may ask for.

    Args:
        host: The layer.
        x: (B, N, C).
        context: (B, M, C) for cross-attention, or None.
        mask: Boolean, as `Attention.forward` takes it.
        bias: Floating point, as `Attention.forward` takes it.
        positions: (N,) or (B, N) int64; None counts on from the cache.
        context_positions: (M,) or (B, M) int64; None counts from 0.
        cache: The layer's cache, which takes in the new keys and values.
        cu_seqlens: Bounds of packed sequences, (S + 1,), or None.

    Raises:
        ZooError: Positions, mask or bias do not fit, or a context where the past is recalled.
    """
    for part in host.socket_parts():
        part.aux_losses.clear()
    if host.recalls(cache) and context is not None:
        raise ZooError(f"{host.spec!r} recalls its own past; it takes no context with a cache")
    k_start = q_start = cache.length if cache is not None else 0
    q_pos, documents = _place(host, x, positions, cache, cu_seqlens)
    k_pos = q_pos
    if context is not None:
        k_start, k_pos = 0, _place_context(context, context_positions)
    elif context_positions is not None:
        raise ZooError("context_positions are given, but there is no context")
    position = host.position
    if position.embeds:
        x = position.embed(x, q_pos)
    if cache is not None and context is not None and cache.get("cross_k") is not None:
        q, k, v = _ask(host, x, q_pos, k_pos, cache)
    else:
        if position.embeds and context is not None:
            context = position.embed(context, k_pos)
        q, k, v = host.project(x, context, cache)
        if host.q_norm is not None and host.k_norm is not None:
            q, k = host.q_norm(q), host.k_norm(k)
        if host.attend is None:
            k = host.select.change_keys(k, cache, cu_seqlens)
        # Who recalls turns its keys anew in each pass, who fills the three sockets keeps its own.
        if position.rotates and not host.recalls(cache):
            q, k = position.rotate(q, k, q_pos, k_pos)
        if cache is not None and host.attend is None and not host.recalls(cache):
            if context is None:
                k, v, k_pos, k_start = _remember(host, k, v, k_pos, cache)
            else:
                k, v = cache.extend("cross_k", k), cache.extend("cross_v", v)
    k, v = host.project.read(k, v)
    if host.attend is None:
        k = host.normalize.share_keys(k)
    call = Call(
        x=x,
        q=q,
        k=k,
        v=v,
        q_pos=q_pos,
        k_pos=k_pos,
        q_start=q_start,
        k_start=k_start,
        causal=host.causal,
        scale=host.scale,
        cross=context is not None,
        mask=checks.spread(host, mask, "mask", q, k, k_start),
        bias=checks.spread(host, bias, "bias", q, k, k_start),
        dropout=host.dropout if host.training else 0.0,
        cache=cache,
        cu_seqlens=cu_seqlens,
        documents=documents,
    )
    return prepare(host, call)


def prepare(host: Host, call: Call) -> Call:
    """Let the parts prepare a pass, whose q, k and v are what they should be."""
    for part in host.socket_parts():
        if type(part).prepare is not Part.prepare:
            call.prepared[part.kind] = part.prepare(call)
    return call


def _place(
    host: Host,
    x: Tensor,
    positions: Tensor | None,
    cache: LayerCache | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Positions of the tokens, (N,) or (B, N), and the packed sequence of each, (N,)."""
    samples, length = x.shape[:2]
    start = cache.length if cache is not None else 0
    index = torch.arange(start, start + length, device=x.device)
    documents = None
    if cu_seqlens is not None:
        documents = torch.bucketize(index, cu_seqlens[1:], right=True)
        index = index - cu_seqlens.long()[documents]
    if positions is not None:
        checks.check_positions(positions, "positions", samples, length)
        return positions, documents
    for part in host.socket_parts():
        if type(part).place is not Part.place:
            index = part.place(index, samples, cache is None and cu_seqlens is None)
    return index, documents


def _place_context(context: Tensor, positions: Tensor | None) -> Tensor:
    """Positions of a context, (M,) or (B, M)."""
    samples, length = context.shape[:2]
    if positions is None:
        return torch.arange(length, device=context.device)
    checks.check_positions(positions, "context_positions", samples, length)
    return positions


def _ask(
    host: Host, x: Tensor, q_pos: Tensor, k_pos: Tensor, cache: LayerCache
) -> tuple[Tensor, Tensor, Tensor]:
    """New queries, with the keys and values of a context that the cache holds."""
    q, k, v = host.project.queries(x), cache.get("cross_k"), cache.get("cross_v")
    assert k is not None
    assert v is not None
    if q.dtype != k.dtype:
        raise ZooError(
            f"cache entry 'cross_k' holds {k.dtype}, but the new queries are {q.dtype}; go on as "
            "the cache was filled, under the same autocast, or convert it with cache.to(dtype)"
        )
    if host.q_norm is not None:
        q = host.q_norm(q)
    if host.position.rotates:
        q, _ = host.position.rotate(q, k[:, :, :0], q_pos, k_pos[..., :0])
    return q, k, v


def _remember(
    host: Host, k: Tensor, v: Tensor, positions: Tensor, cache: LayerCache
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Put new keys and values into the cache; all that are held, and the index of the first."""
    keep = host.select.window()
    total = cache.length + positions.shape[-1]
    k = cache.extend("k", k, keep=keep)
    v = cache.extend("v", v, keep=keep)
    batched = positions.ndim == 2
    held = cache.extend("positions", positions, dim=-1, keep=keep, batched=batched)
    return k, v, held, total - k.shape[2]
