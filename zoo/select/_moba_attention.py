"""MoBA of queries, keys and values: the equations, the choice of blocks, and who computes what.

See `zoo.select.moba`. Legend: B batch, H heads, G key heads, N tokens, D width of q and k, E of v.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.host.refusals import refuse_tracing
from zoo.kernels import refuse
from zoo.parts import check_cu_seqlens, full_precision, repeat_heads
from zoo.select._moba_gate import gate, lay_blocks, visible
from zoo.select._moba_gather import Gather

BACKENDS = ("auto", "reference", "torch", "triton")


def moba_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    topk: int,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The equations line by line, with all N x N scores; any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        block: Tokens of a block.
        topk: Blocks that a query sees, its own one counted.
        cu_seqlens: Bounds of packed sequences, (S + 1,) integers, or None.
        scale: Factor on the scores; default ``1 / sqrt(D)``.

    Returns:
        (B, H, N, E).

    Source: the official repository's ``moba/moba_naive.py``.
    """
    heads, length = q.shape[1], q.shape[2]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    pieces = [q[:, :, :0] @ k[:, :, :0].mT @ v[:, :, :0]]
    for a, b in pairwise(ends):
        if a == b:
            continue
        q_s, k_s, v_s = (x[:, :, a:b] for x in (q, k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        kbar = torch.stack([x.mean(2) for x in k_s.detach().to(wide).split(block, 2)], 2)
        with full_precision(q):
            gates = q_s.detach().to(wide) @ kbar.mT
        index = torch.arange(b - a, device=q.device)
        own, every = index[:, None] // block, torch.arange(kbar.shape[2], device=q.device)
        gates = gates.masked_fill(every > own, -torch.inf).masked_fill(every == own, torch.inf)
        best = gates.sort(dim=-1, descending=True, stable=True)[1][..., :topk]
        selected = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, best, True)
        allowed = selected[..., index // block] & (index <= index[:, None])
        scores = (q_s @ k_s.mT * scale).masked_fill(~allowed, -torch.inf)
        pieces.append(scores.softmax(-1) @ v_s)
    return torch.cat(pieces, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block: int,
    topk: int,
    cu_seqlens: Tensor | None,
) -> None:
    for name, value in (("block", block), ("topk", topk)):
        checks.whole(name, value)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ZooError(f"{name} has shape {tuple(x.shape)}; allowed: (B, heads, N, width)")
        if x is not None and not x.is_floating_point():
            raise ZooError(f"{name} is of {x.dtype}; allowed: floating-point tensors")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ZooError(
            f"k has shape {tuple(k.shape)}, q {tuple(q.shape)}; batch, length and width must agree"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ZooError(f"k has {k.shape[1]} heads; allowed: a divisor of the {q.shape[1]} of q")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ZooError(
            f"v has shape {tuple(v.shape)}; batch, heads and length must be those of k, "
            f"{tuple(k.shape[:3])}"
        )
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ZooError(f"cu_seqlens needs a batch of 1, all packed; q has {q.shape[0]}")
        check_cu_seqlens(cu_seqlens, q.shape[2])


def choose_blocks(
    q: Tensor, k: Tensor, block: int, topk: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The past blocks that each query attends to beside its own one.

    Computed in float32 at least, by strips of queries or by a Triton kernel on a GPU; there is no
    gradient.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        block: Tokens of a block.
        topk: Blocks that a query sees, its own one counted.
        cu_seqlens: Bounds of packed sequences, (S + 1,) integers, or None.

    Returns:
        (B, H, N, topk - 1) int32, counted within the sequence, best first, -1 where
        there are fewer.

    Raises:
        ZooError: Sizes that do not fit, or bounds that are none.
    """
    _check(q, k, None, block, topk, cu_seqlens)
    return _choose(q, k, block, topk, cu_seqlens)


def _choose(
    q: Tensor,
    k: Tensor,
    block: int,
    topk: int,
    cu_seqlens: Tensor | None,
    *,
    by_name: bool = False,
) -> Tensor:
    """`choose_blocks` of checked sizes, in the interpreter too where Triton was asked for."""
    blocks = lay_blocks(q.shape[2], k.shape[2], block, cu_seqlens, q.device)
    return gate(q.detach(), k.detach(), blocks, topk - 1, by_name=by_name)


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    topk: int,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to a query's own block and the topk - 1 past blocks that suit it best.

    Args:
        q: (B, H, N, D).
        k: (B, G, N, D), G dividing H.
        v: (B, G, N, E).
        block: Tokens of a block.
        topk: Blocks that a query sees, its own one counted.
        cu_seqlens: Bounds of packed sequences, (S + 1,) integers with B = 1, or None.
        scale: Factor on the scores; default ``1 / sqrt(D)``.
        backend: "auto" (Triton on CUDA, "torch" elsewhere; "reference" under torch.compile and
            torch.func, unless Triton takes it, and on meta), "reference" (all N x N scores),
            "torch" (gathered queries) or "triton".

    Returns:
        (B, H, N, E).

    Raises:
        ZooError: Sizes that do not fit, bounds that are none, an unknown backend, or one asked for
            by name that cannot take these tensors.
    """
    _check(q, k, v, block, topk, cu_seqlens)
    checks.choice("backend", backend, BACKENDS)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend in ("auto", "triton"):
        by_name = backend == "triton"
        reason = refuse(q, k, v, by_name=by_name)
        if reason is None:
            chosen = _choose(q, k, block, topk, cu_seqlens, by_name=by_name)
            return kernel(q, k, v, chosen, block, scale, cu_seqlens)
        if backend == "triton":
            raise ZooError(f"backend='triton' cannot take this: {reason}")
    reason = opaque() or on_meta(q)
    if backend == "torch" and reason:
        raise ZooError(f"backend='torch' cannot take this: {reason}")
    if backend == "reference" or reason:
        return moba_attention_reference(q, k, v, block, topk, cu_seqlens=cu_seqlens, scale=scale)
    chosen = choose_blocks(q, k, block, topk, cu_seqlens)
    return gathered(q, k, v, chosen, block, scale, cu_seqlens)


def opaque() -> str | None:
    """Why nobody may look into the gathered form right now, or None."""
    return refuse_tracing("its lists have lengths that no compiler knows")


def on_meta(q: Tensor) -> str | None:
    """Why the gathered form cannot take tensors without values, or None."""
    return "tensors on meta have no choices to gather by" if q.is_meta else None


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    moba = import_module("zoo.kernels.moba")  # imports triton
    found: Tensor = moba.moba_attention(q, k, v, chosen, block, scale, cu_seqlens)
    return found


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """MoBA by given choices, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype, (q, k, v) = v.dtype, (x.to(wide) for x in (q, k, v))
    if not scale > 0:  # the fused causal form multiplies -inf by it
        q, scale = q * scale, 1.0
    bounds = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()

    def dense(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        blocks = lay_blocks(q.shape[2], k.shape[2], block, cu_seqlens, q.device)
        index = torch.arange(q.shape[2], device=q.device)
        allowed = index <= index[:, None]
        if blocks.first is not None:
            allowed = allowed & (blocks.first == blocks.first[:, None])
        seen = visible(chosen, blocks.own, blocks.keys, k.shape[2] // block + 1) & allowed
        scores = q @ repeat_heads(k, q.shape[1]).mT * scale
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ repeat_heads(v, q.shape[1])

    return Gather.apply(q, k, v, chosen, block, scale, bounds, dense)[0].to(dtype)
