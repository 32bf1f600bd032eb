"""A norm over all heads and the gate on it, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attend._lightning_parts import EPS
from zoo.ops.again import differentiate_again
from zoo.parts import full_precision

NORMS = ("srms", "rms", "layer", "none")
# Numbers of a piece that is normed and gated at once; a few of such pieces stay near the core.
PIECE = 1 << 16


def norm_gate(
    y: Tensor,
    gate: Tensor | None,
    norm: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = EPS,
    sigmoid: bool = False,
) -> Tensor:
    """norm(y) * gate along the last axis, on a CPU in one pass with its own backward pass.

    Computed in float32 at least. Saved are y, the gate and one or two numbers a row.

    Args:
        y: (.., C).
        gate: (.., C), or None for none.
        norm: "srms" (no weight), "rms", "layer" or "none".
        weight: (C,) of "rms" and "layer".
        bias: (C,) of "layer".
        eps: Under the root.
        sigmoid: Squash the gate.

    Returns:
        (.., C) in the type of y.
    """
    if norm == "none" and gate is None:
        return y
    fused = (
        y.device.type == "cpu"
        and y.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    form: Any = _NormGate.apply if fused else plain_norm_gate
    found: Tensor = form(y, gate, norm, weight, bias, eps, sigmoid)
    return found


def plain_norm_gate(
    y: Tensor,
    gate: Tensor | None,
    norm: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = EPS,
    sigmoid: bool = False,
) -> Tensor:
    """The same in plain operations."""
    wide = _wide(y)
    x = y.to(wide)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    elif norm != "none":
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
    if gate is not None:
        gate = gate.to(wide)
        x = x * (gate.sigmoid() if sigmoid else gate)
    return x.to(y.dtype)


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


class _NormGate(torch.autograd.Function):
    """The same, so many rows at a time that what is made of them is still near the core."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gate: Tensor | None,
        norm: str,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        sigmoid: bool,
    ) -> Tensor:
        """Normed and gated."""
        width, wide = y.shape[-1], _wide(y)
        rows = y.reshape(-1, width)
        gates = None if gate is None else gate.reshape(-1, width)
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        flat = out.view(-1, width)
        step = max(1, PIECE // width)
        rates = rows.new_empty(len(rows), 1, dtype=wide)  # one over the size of a row
        means = rows.new_empty(len(rows) if norm == "layer" else 0, 1, dtype=wide)
        room = rows.new_empty(min(step, len(rows)), width, dtype=wide)
        with full_precision(y):
            for a in range(0, len(rows), step):
                at = slice(a, a + step)
                x = rows[at].to(wide)
                if norm == "layer":
                    torch.mean(x, -1, keepdim=True, out=means[at])
                if norm != "none":
                    centered = torch.sub(x, means[at], out=room[: len(x)]) if len(means) else x
                    size = torch.linalg.vector_norm(centered, dim=-1, keepdim=True)
                    rates[at] = (size.square_() / width).add_(eps).rsqrt_()
                x = _normed(x, at, norm, rates, means, room[: len(x)])
                x = _weighted(x, weight, bias, room[: len(x)])
                if gates is None:
                    flat[at] = x
                    continue
                g = gates[at].to(wide).sigmoid() if sigmoid else gates[at]
                if x.dtype == g.dtype == flat.dtype:
                    torch.mul(x, g, out=flat[at])
                else:
                    flat[at] = x * g
        ctx.save_for_backward(y, gate, weight, bias, rates, means)
        ctx.norm, ctx.eps, ctx.sigmoid, ctx.step = norm, eps, sigmoid, step
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, the gate, the weight and the bias."""
        y, gate, weight, bias, rates, means = ctx.saved_tensors
        needed = ctx.needs_input_grad
        wanted = (needed[0], needed[1], needed[3], needed[4])
        if torch.is_grad_enabled():  # create_graph: someone wants a second derivative
            made = plain_norm_gate(y, gate, ctx.norm, weight, bias, ctx.eps, ctx.sigmoid)
            found = differentiate_again([made], (y, gate, weight, bias), wanted, grads)
        else:
            with full_precision(y):
                found = _backward(ctx, y, gate, weight, bias, rates, means, grads[0], wanted)
        return (found[0], found[1], None, found[2], found[3], None, None)


def _normed(x: Tensor, at: slice, norm: str, rates: Tensor, means: Tensor, room: Tensor) -> Tensor:
    """Rows normed, without weight; into `room` unless there is nothing to do."""
    if norm == "none":
        return x
    if norm == "layer":
        x = torch.sub(x, means[at], out=room)
    return torch.mul(x, rates[at], out=room)


def _weighted(x: Tensor, weight: Tensor | None, bias: Tensor | None, room: Tensor) -> Tensor:
    """Weight and bias of a norm; into `room` unless there is nothing to do."""
    if weight is None:
        return x
    x = torch.mul(x, weight.to(x.dtype), out=room)
    return x if bias is None else x.add_(bias.to(x.dtype))


def _backward(
    ctx: Any,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rates: Tensor,
    means: Tensor,
    grad: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of y, the gate, the weight and the bias, from that of the output."""
    width, wide, norm = y.shape[-1], _wide(y), ctx.norm
    rows, grads = y.reshape(-1, width), grad.reshape(-1, width)
    gates = None if gate is None else gate.reshape(-1, width)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dg = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    d_rows, d_gates = dy.view(-1, width), None if dg is None else dg.view(-1, width)
    dw = None if weight is None else rows.new_zeros(width, dtype=wide)
    db = None if bias is None else rows.new_zeros(width, dtype=wide)
    rooms = rows.new_empty(3, min(ctx.step, len(rows)), width, dtype=wide)
    for a in range(0, len(rows), ctx.step):
        at = slice(a, a + ctx.step)
        g = grads[at].to(wide)
        one, two, three = rooms[:, : len(g)]
        x = _normed(rows[at].to(wide), at, norm, rates, means, one)
        if gates is not None and d_gates is not None:
            s = gates[at].to(wide)
            s = s.sigmoid() if ctx.sigmoid else s
            if wanted[1]:
                back = torch.mul(g, _weighted(x, weight, bias, two), out=three)
                if ctx.sigmoid:
                    back = torch.ops.aten.sigmoid_backward(back, s)
                d_gates[at] = back
            g = torch.mul(g, s, out=two)
        if dw is not None:
            dw += torch.mul(g, x, out=three).sum(0)
            if db is not None:
                db += g.sum(0)
            g = torch.mul(g, weight.to(wide), out=two)  # type: ignore[union-attr]
        if not wanted[0]:
            continue
        if norm == "none":
            d_rows[at] = g
            continue
        along = torch.mul(g, x, out=three).mean(-1, keepdim=True)
        level = g.mean(-1, keepdim=True) if norm == "layer" else None
        left = torch.mul(x, along, out=three).neg_().add_(g)
        left = left if level is None else left.sub_(level)
        if d_rows.dtype == wide:
            torch.mul(left, rates[at], out=d_rows[at])
        else:
            d_rows[at] = left.mul_(rates[at])
    return [
        d.to(x.dtype) if flag and d is not None and x is not None else None
        for d, x, flag in zip((dy, dg, dw, db), (y, gate, weight, bias), wanted, strict=True)
    ]
