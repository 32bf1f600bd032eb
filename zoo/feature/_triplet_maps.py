"""Passes over whole feature maps for triplet attention: pooling along an axis, and the gating.

Both are bound by the bytes that they move, so on a CPU they go through a few samples at a time,
small enough for every reduction of a lot to find it in the cache. The backward pass keeps x, the
gates and the places of the maxima, and writes one gradient of the size of x: the pooling adds its
share to what the gating has written.

A maximum by halves (`torch.maximum` of two halves of an axis) is vectorised along whichever axis is
contiguous; `amax` is so in a few layouts only, and `max` with indices goes element by element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.parts import widen

# Bytes of x in a lot. A handful of buffers of that size stay in a core's own and shared cache.
LOT_BYTES = 2**21
# Along memory, axes shorter than this are quicker element by element, and so are maps with fewer
# elements than that.
SHORT = 32
SMALL = 2**15
# Elements that `amax` takes at once; along memory it wants a multiple of them.
LANES = 32


def _plain(x: Tensor) -> bool:
    """Whether to write the passes down as formulas: for compilers, torch.func, other devices."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or x.device.type != "cpu"


def _lots(x: Tensor) -> Iterator[slice]:
    """Samples that are worked on together."""
    size = max(1, x[0].numel() * max(4, x.element_size()))
    step = max(1, LOT_BYTES // size)
    for i in range(0, x.shape[0], step):
        yield slice(i, min(i + step, x.shape[0]))


def _max(x: Tensor, dim: int) -> Tensor:
    """Maximum along an axis, which is kept."""
    n = x.shape[dim]
    across = dim == 1 and x.is_contiguous() and x.stride(1) >= 2 * LANES
    if x.numel() < SMALL or across or (x.stride(dim) == 1 and n % LANES == 0):
        return x.amax(dim, keepdim=True)
    while n > 1:
        half = (n + 1) // 2  # the halves of an odd axis share its middle
        x = torch.maximum(x.narrow(dim, 0, half), x.narrow(dim, n - half, half))
        n = half
    return x


def _sum(x: Tensor, dim: int) -> Tensor:
    """Sum along an axis, which is kept."""
    if dim == 1 or x.is_contiguous():
        return x.sum(dim, keepdim=True)
    n = x.shape[dim]
    while n > 1:
        half = n // 2
        y = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if n % 2:
            y.narrow(dim, 0, 1).add_(x.narrow(dim, n - 1, 1))
        x, n = y, half
    return x


def _max_and_place(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and the index of its first occurrence along an axis, which is kept."""
    n = x.shape[dim]
    if x.numel() < SMALL or (x.stride(dim) == 1 and n < SHORT):
        return x.max(dim, keepdim=True)
    top = _max(x, dim)
    # Where x is the maximum, how far it is from the end; the first of them is the farthest.
    rank = torch.arange(n, 0, -1, dtype=x.dtype).view([n if d == dim else 1 for d in range(4)])
    far = torch.eq(x, top, out=torch.empty_like(x)).mul_(rank)
    return top, (n - _max(far, dim)).clamp_(max=n - 1)  # a row with a NaN has no maximum


class _Pool(torch.autograd.Function):
    """Hands x on, with the maximum and the mean of it along some axes.

    What comes back to x through the output x and through the pooled planes is summed up in place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...], places: bool) -> tuple[Tensor, ...]:
        """X, planes (B, 2, P, Q) of at least float32 for each axis, and places (B, P, Q)."""
        if _plain(x):
            planes, found = [], []
            for dim in axes:
                top, place = x.max(dim)
                planes.append(torch.stack((widen(top), widen(x).mean(dim)), 1))
                found.append(place.to(torch.int32))
            return (x, *planes, *found)
        shapes = [
            [x.shape[0], *(n for d, n in enumerate(x.shape) if d not in (0, a))] for a in axes
        ]
        kind = torch.promote_types(x.dtype, torch.float32)
        planes = [x.new_empty(s[0], 2, *s[1:], dtype=kind) for s in shapes]
        found = [x.new_empty(s if places else 0, dtype=torch.int32) for s in shapes]
        for lot in _lots(x):
            part = widen(x[lot])
            for dim, plane, place in zip(axes, planes, found, strict=True):
                if places:
                    top, where = _max_and_place(part, dim)
                    place[lot] = where.squeeze(dim)
                else:
                    top = _max(part, dim)
                plane[lot, 0] = top.squeeze(dim)
                torch.div(_sum(part, dim).squeeze(dim), x.shape[dim], out=plane[lot, 1])
        return (x, *planes, *found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the places."""
        _, ctx.axes, _ = inputs
        found = output[1 + len(ctx.axes) :]
        ctx.mark_non_differentiable(*found)
        ctx.save_for_backward(*found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        dx, planes, found = grads[0], grads[1 : 1 + len(ctx.axes)], ctx.saved_tensors
        plain = _plain(dx) or torch.is_grad_enabled()
        for dim, plane, place in zip(ctx.axes, planes, found, strict=True):
            at = place.to(torch.int64).unsqueeze(dim)
            top, mean = (p.unsqueeze(dim).to(dx.dtype) for p in plane.unbind(1))
            mean = mean / dx.shape[dim]
            if plain:
                dx = (dx + mean).scatter_add(dim, at, top)
            else:
                for lot in _lots(dx):
                    dx[lot].add_(mean[lot]).scatter_add_(dim, at[lot], top[lot])
        return dx, None, None


class _Gate(torch.autograd.Function):
    """x times the mean of gates, each of which is spread along one axis."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...], *gates: Tensor) -> Tensor:
        """X (B, C, H, W) and gates with one axis of length 1 to (B, C, H, W)."""
        if _plain(x):
            return (widen(x) * _factor(gates)).to(x.dtype)
        y = torch.empty_like(x)
        for lot in _lots(x):
            torch.mul(x[lot], _factor([g[lot] for g in gates]), out=y[lot])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep x and the gates."""
        x, ctx.axes, *gates = inputs
        ctx.save_for_backward(x, *gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the gates."""
        (dy,) = grads
        x, *gates = ctx.saved_tensors
        n = len(gates)
        if _plain(x) or torch.is_grad_enabled():
            product = widen(dy) * widen(x) / n
            sums = [product.sum(dim, keepdim=True).to(gates[0].dtype) for dim in ctx.axes]
            return (widen(dy) * _factor(gates)).to(x.dtype), None, *sums
        dx = torch.empty_like(x)
        sums = [torch.empty_like(g) for g in gates]
        for lot in _lots(x):
            part = dy[lot]
            torch.mul(part, _factor([g[lot] for g in gates]), out=dx[lot])
            product = widen(part) * x[lot]
            for dim, total in zip(ctx.axes, sums, strict=True):
                torch.div(_sum(product, dim), n, out=total[lot])
        return dx, None, *sums


def _factor(gates: Any) -> Tensor:
    """Mean of the gates, (B, C, H, W)."""
    first, *rest = gates
    for gate in rest:
        first = first + gate
    return first / len(gates)


def pool(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Maximum and mean of x along each of some axes.

    Args:
        x: (B, C, H, W).
        axes: Axes of C, H and W, each at most once.

    Returns:
        x, to go on with, and planes (B, 2, P, Q): maxima first, of at least float32, with the axes
        that remain in their order.
    """
    places = torch.is_grad_enabled() and x.requires_grad
    x, *found = _Pool.apply(x, axes, places)
    return x, found[: len(axes)]


def gate(x: Tensor, axes: tuple[int, ...], gates: list[Tensor]) -> Tensor:
    """Multiply x by the mean of gates.

    Args:
        x: (B, C, H, W).
        axes: The axis along which each gate is spread.
        gates: (B, P, Q) each, with the axes that remain in their order.
    """
    spread = [g.unsqueeze(dim) for g, dim in zip(gates, axes, strict=True)]
    return _Gate.apply(x, axes, *spread)
