"""Partial softmax results: attention to some of the keys, and putting the pieces together.

For rows i and a set P of keys, a partial result is an output and the logarithm of its denominator,

    out_i = sum_{j in P} exp(s_ij - lse_i) v_j       lse_i = log sum_{j in P} exp(s_ij)

and results for disjoint sets merge into that of their union:

    lse = log sum_P exp(lse_P)                       out = sum_P exp(lse_P - lse) out_P

A row that sees nothing has the output 0 and the lse -inf. Going back, the share of a set in the
gradients follows from the *merged* output and lse alone: with p_ij = exp(s_ij - lse_i),

    ds_ij = p_ij (do_i . v_j - do_i . out_i + dlse_i)

so no piece has to be kept. Blocks that are gathered, devices that pass keys around and caches that
are retrieved from all rest on this.

Legend: B batch, H heads, N queries, M keys, D width of q and k, E width of v, P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import full_precision

HALF = (torch.float16, torch.bfloat16)


def merge(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge partial results for disjoint sets of keys.

    Args:
        outs: (P, B, H, N, E), or as many tensors (B, H, N, E).
        lses: (P, B, H, N), or as many tensors (B, H, N); natural logarithms, -inf where a row
            sees nothing.

    Returns:
        out (B, H, N, E) in the type of `outs`, and lse (B, H, N) in that of `lses`.

    Raises:
        ZooError: No piece, or pieces whose shapes do not belong together.
    """
    if len(outs) < 1 or len(outs) != len(lses):
        raise ZooError(f"{len(outs)} outputs and {len(lses)} lses; as many of both, at least 1")
    shape = outs[0].shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != shape or lse.shape != shape[:-1]:
            raise ZooError(
                f"an output of shape {tuple(shape)} needs an lse of shape {tuple(shape[:-1])} and "
                f"others of its shape, got {tuple(lse.shape)} and {tuple(out.shape)}"
            )
    every = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    top = every.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    shares = (every - top).exp()
    total = shares.sum(0)
    empty = total == 0
    # A number in place of the zero, so that neither the quotient nor its gradient is NaN.
    total = total.masked_fill(empty, 1.0)
    shares = shares / total
    out = sum(
        (share[..., None] * x for share, x in zip(shares[1:], outs[1:], strict=True)),
        start=shares[0][..., None] * outs[0],
    )
    lse = (total.log() + top).masked_fill(empty, -torch.inf)
    return out.to(outs[0].dtype), lse


@cache
def _fused() -> bool:
    """Whether this version of torch has the CPU's flash kernel, and it does what is needed here.

    The operators are private: they may go or change at any release.
    """
    try:
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v = torch.eye(6).reshape(3, 1, 1, 3, 4).unbind(0)
        with torch.no_grad():
            out, lse = forward(q, k, v, 0.0, True, scale=1.0)
            wanted = _plain(q, k, v, 1.0, True, None)
            grads = backward(v, q, k, v, out, lse, 0.0, True, scale=1.0)
            dq, dk, dv = _plain_backward(v, q, k, v, out, lse, 1.0, True, None)
        found = (out, lse, *grads)
        return all(
            torch.allclose(a, b, atol=1e-5)
            for a, b in zip(found, (*wanted, dq, dk, dv), strict=True)
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


def _takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the CPU's flash kernel takes these; it dies of empty tensors."""
    if torch.compiler.is_compiling():
        return False  # a compiler cannot see whether the kernel is what it should be
    if q.device.type != "cpu" or not (q.numel() and k.numel() and v.numel()):
        return False
    return q.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype and _fused()


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial attention without autograd: on a CPU in memory O(N), elsewhere plainly.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, E).
        scale: Factor on the scores.
        causal: Row i sees keys 0 .. i.
        mask: Boolean, True may attend, broadcastable to (B, H, N, M), or None.

    Returns:
        out (B, H, N, E), and lse (B, H, N) of at least float32.
    """
    with torch.no_grad(), full_precision(q):
        if not _takes(q, k, v):
            return _plain(q, k, v, scale, causal, mask)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal and mask is None, attn_mask=_added(q, k, mask, causal), scale=scale
        )
        if mask is not None:
            empty = ~_together(mask, causal, q, k).any(-1)
            out = out.masked_fill(empty[..., None], 0.0)
            lse = lse.masked_fill(empty, -torch.inf)
        return out, lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by these keys, without autograd.

    Args:
        grad: Gradient of the output, (B, H, N, E).
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, E).
        out: Output, (B, H, N, E): the merged one where these keys are but a piece.
        lse: Its log-sum-exp, (B, H, N): the merged one likewise.
        scale: Factor on the scores.
        causal: Row i sees keys 0 .. i.
        mask: Boolean, True may attend, broadcastable to (B, H, N, M), or None.
    """
    with torch.no_grad(), full_precision(q):
        same = grad.dtype == out.dtype == q.dtype
        if not (same and _takes(q, k, v)):
            return _plain_backward(grad, q, k, v, out, lse, scale, causal, mask)
        if mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, 0.0)  # all of such a row is hidden anyway
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            0.0,
            causal and mask is None,
            attn_mask=_added(q, k, mask, causal),
            scale=scale,
        )


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and the logarithm of its denominator.

    Gradients flow through both results.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, E).
        scale: Factor on the scores; default ``1 / sqrt(D)``.
        causal: Row i sees keys 0 .. i.
        mask: Boolean, True may attend, broadcastable to (B, H, N, M), or None.

    Returns:
        out (B, H, N, E), and lse (B, H, N) of at least float32, -inf for rows that see nothing.

    Raises:
        ZooError: Shapes that do not belong together; in the backward pass, a second derivative.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[:2] != q.shape[:2] or x.ndim != 4:
            raise ZooError(
                f"{name} of shape {tuple(x.shape)} must have batch and heads of q, "
                f"{tuple(q.shape[:2])}"
            )
    if k.shape[2] != v.shape[2] or k.shape[3] != q.shape[3]:
        raise ZooError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together"
        )
    if mask is not None:
        wanted = (*q.shape[:3], k.shape[2])
        sizes = (*[1] * (4 - mask.ndim), *mask.shape)
        fits = len(sizes) == 4 and all(a in (1, b) for a, b in zip(sizes, wanted, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise ZooError(
                f"mask of shape {tuple(mask.shape)} and type {mask.dtype}; allowed: torch.bool "
                f"that broadcasts to {wanted}"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Partial.apply(q, k, v, mask, scale, causal)


class _Partial(torch.autograd.Function):
    """Partial attention that keeps its inputs and results only."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The result and its lse."""
        return flash(q, k, v, scale=scale, causal=causal, mask=mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass recomputes from."""
        q, k, v, mask, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        if torch.is_grad_enabled():  # create_graph: its graph would lack what is done here
            raise ZooError("partial attention has no second derivative; leave out create_graph")
        q, k, v, mask, out, lse = ctx.saved_tensors
        grad, grad_lse = grads
        given = {"scale": ctx.scale, "causal": ctx.causal, "mask": mask}
        found: list[Tensor | None] = [None, None, None]
        if grad is not None:
            found = list(flash_backward(grad.to(q.dtype), q, k, v, out, lse, **given))
        if grad_lse is not None:
            # p_ij dlse_i on its own: the mean of the keys, and as many values that are queries.
            with full_precision(q):
                wide = grad_lse[..., None]
                keys, _ = flash(q, k, k, **given)
                rows = (wide * q).to(q.dtype)
                _, _, dk = flash_backward(rows, q, k, torch.zeros_like(k), 0 * q, lse, **given)
                dq = (ctx.scale * wide * keys).to(q.dtype)
                dk = ctx.scale * dk
            found[0] = dq if found[0] is None else found[0] + dq
            found[1] = dk if found[1] is None else found[1] + dk
        return (*found, None, None, None)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """Row i sees keys 0 .. i, (N, M)."""
    shape = q.shape[2], k.shape[2]
    return torch.ones(shape, dtype=torch.bool, device=q.device).tril()


def _together(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """Both masks as one that has all N x M pairs."""
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
    shape = (*((1, 1) if mask is None else mask.shape[:2]), q.shape[2], k.shape[2])
    if not causal:
        assert mask is not None
        return mask.expand(shape)
    seen = _causal(q, k)
    return seen.expand(shape) if mask is None else mask & seen


def _added(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The masks as the CPU's flash kernel wants them: numbers that are added."""
    if mask is None:
        return None
    seen = _together(mask, causal, q, k)
    return seen.new_zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with -inf for hidden pairs, and q and k, all at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    scores = q @ k.mT * scale
    if causal or mask is not None:
        scores = scores.masked_fill(~_together(mask, causal, q, k), -torch.inf)
    return scores, q, k


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores, _, _ = _scores(q, k, scale, causal, mask)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.sum(-1) - torch.inf
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return (weights @ v.to(weights.dtype)).to(v.dtype), lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, wide_q, wide_k = _scores(q, k, scale, causal, mask)
    lse = lse.to(scores.dtype)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    grad, out = grad.to(p.dtype), out.to(p.dtype)
    ds = p * (grad @ v.to(p.dtype).mT - (grad * out).sum(-1, keepdim=True)) * scale
    return (ds @ wide_k).to(q.dtype), (ds.mT @ wide_q).to(k.dtype), (p.mT @ grad).to(v.dtype)
