"""Sinkhorn's algorithm on a cost, and MESH: descent on the entropy of the plan that it finds.

    p = -C / temperature,  u = v = 0 (or a warm start)
    repeat S times:  u = log a - logsumexp_K(p + v),  v = log b - logsumexp_N(p + u)
    P = exp(p + u + v)                                       (Cuturi 2013; columns sum to b exactly)

MESH (Zhang et al. 2023, "Unlocking Slot Attention by Changing Optimal Transport Costs", section on
the minimisation) repeats, for a cost with a little noise against ties,

    H = mean over N, K of -P log P,  g = (dH/dC) / |dH/dC|,  C <- C - lr g,

where g counts as a constant. Both are written as reverse sweeps by hand: a step of the sweep is
one softmax-weighted sum over each axis, so that no graph of the S steps is kept, and gradients
inside a forward pass need neither autograd nor a mode in which it is allowed. Cost of a plan
2 S N K exponentials, of MESH (2 n + 1) times as much; memory N K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 1e-30
"""Marginals are at least this, where an input is not hidden."""
_LOW = 1e-20


def log_marginal(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logarithm of a marginal, -inf where it is hidden.

    Args:
        weight: (B, N), not negative.
        mask: True where there is mass, (B, N), or None.
    """
    log = weight.clamp(min=LEAST).log()
    return log if mask is None else log.masked_fill(~mask, -torch.inf)


def sinkhorn_reference(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    *,
    iterations: int = 5,
    temperature: float = 1.0,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn as it is written above, for autograd to differentiate.

    Args:
        cost: C, (B, N, K).
        log_a: Logarithms of the masses of the inputs, (B, N).
        log_b: Logarithms of the masses of the slots, (B, K).
        iterations: S.
        temperature: Of the plan.
        v: Warm start, (B, K); u follows from it.

    Returns:
        Plan (B, N, K), u (B, N), v (B, K).
    """
    p = -cost / temperature
    u = torch.zeros_like(log_a)
    v = torch.zeros_like(log_b) if v is None else v
    for _ in range(iterations):
        u = log_a - (p + v[:, None]).logsumexp(2)
        v = log_b - (p + u[..., None]).logsumexp(1)
    return (p + u[..., None] + v[:, None]).exp(), u, v


def mesh_reference(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    *,
    lr: float | Tensor = 8.0,
    steps: int = 4,
    iterations: int = 5,
    reuse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """MESH with the gradient of the entropy from autograd.

    Args:
        cost: C with its noise, (B, N, K).
        log_a: (B, N).
        log_b: (B, K).
        lr: Length of a step.
        steps: Steps of descent.
        iterations: S of every plan on the way.
        reuse: Start each plan at the v of the one before.

    Returns:
        The cost after the last step, and the v to start the final plan at, or None.
    """
    v = None
    with torch.enable_grad():
        for _ in range(steps):
            here = cost if cost.requires_grad else cost.detach().requires_grad_()
            plan, _, last = sinkhorn_reference(
                here, log_a, log_b, iterations=iterations, v=v if reuse else None
            )
            (gradient,) = torch.autograd.grad(_entropy(plan), here, retain_graph=True)
            cost = cost - lr * _unit(gradient)
            v = last
    return cost, v if reuse and steps else None


def _entropy(plan: Tensor) -> Tensor:
    """Sum over samples of the mean of -P log P."""
    return torch.special.entr(plan.clamp(_LOW, 1.0)).mean((1, 2)).sum()


def _unit(gradient: Tensor) -> Tensor:
    """Gradient of unit Frobenius norm in every sample."""
    gradient = gradient.detach() + _LOW
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
    return gradient / norm[:, None, None]


def _sweep(
    p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    """All u and v on the way, the v of the start first."""
    us, vs = [], [v]
    for _ in range(iterations):
        us.append(log_a - (p + vs[-1][:, None]).logsumexp(2))
        vs.append(log_b - (p + us[-1][..., None]).logsumexp(1))
    return us, vs


def _sweep_back(
    p: Tensor, us: list[Tensor], vs: list[Tensor], log_b: Tensor, du: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of p, log a, log b and the first v from those of the last u and v."""
    dp = torch.zeros_like(p)
    d_log_a, d_log_b = torch.zeros_like(us[-1]), torch.zeros_like(dv)
    for s in reversed(range(len(us))):
        u, v, last = us[s], vs[s + 1], vs[s]
        # v = log b - lse(p + u): its softmax over the inputs is exp(p + u + v - log b).
        w = (p + u[..., None] + (v - log_b)[:, None]).exp_()
        d_log_b += dv
        flow = w.mul_(dv[:, None])
        dp -= flow
        du = du - flow.sum(2)
        # u = log a - lse(p + v): a softmax over the slots, in which a hidden input has no u.
        r = (p + last[:, None]).softmax(2)
        d_log_a += du
        flow = r.mul_(du[..., None])
        dp -= flow
        dv = -flow.sum(1)
        du = torch.zeros_like(du)
    return dp, d_log_a, d_log_b, dv


class _Potentials(torch.autograd.Function):
    """u and v of Sinkhorn, with the reverse sweep as their gradient."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        us, vs = _sweep(p, log_a, log_b, v, iterations)
        ctx.save_for_backward(p, log_b, *us, *vs)
        ctx.iterations = iterations
        return us[-1].clone(), vs[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        p, log_b, *rest = ctx.saved_tensors
        us, vs = rest[: ctx.iterations], rest[ctx.iterations :]
        return (*_sweep_back(p, us, vs, log_b, du, dv), None)


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    *,
    iterations: int = 5,
    temperature: float = 1.0,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sinkhorn_reference` with its gradient by hand, which keeps no graph of the iterations.

    Args:
        cost: C, (B, N, K).
        log_a: Logarithms of the masses of the inputs, (B, N).
        log_b: Logarithms of the masses of the slots, (B, K).
        iterations: S.
        temperature: Of the plan.
        v: Warm start, (B, K); u follows from it.

    Returns:
        Plan (B, N, K), u (B, N), v (B, K).
    """
    p = -cost / temperature
    v = torch.zeros_like(log_b) if v is None else v
    u, v = _Potentials.apply(p, log_a, log_b, v, iterations)
    return (p + u[..., None] + v[:, None]).exp(), u, v


def _entropy_back(p: Tensor, us: list[Tensor], vs: list[Tensor], log_b: Tensor) -> Tensor:
    """Gradient of the entropy of the plan at the end of a sweep with respect to the cost."""
    log_plan = p + us[-1][..., None] + vs[-1][:, None]
    plan = log_plan.exp()
    inside = (plan >= _LOW) & (plan <= 1.0)
    d_log_plan = torch.where(inside, -(log_plan + 1) * plan, 0.0) / (p.shape[1] * p.shape[2])
    dp, *_ = _sweep_back(p, us, vs, log_b, d_log_plan.sum(2), d_log_plan.sum(1))
    return -(dp + d_log_plan)


class _Step(torch.autograd.Function):
    """The v at the end of a plan, and the direction in which its entropy grows, a constant."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor]:
        us, vs = _sweep(p, log_a, log_b, v, iterations)
        ctx.save_for_backward(p, log_b, *us, *vs)
        ctx.iterations = iterations
        direction = _unit(_entropy_back(p, us, vs, log_b))
        ctx.mark_non_differentiable(direction)
        return vs[-1].clone(), direction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dv: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        p, log_b, *rest = ctx.saved_tensors
        us, vs = rest[: ctx.iterations], rest[ctx.iterations :]
        return (*_sweep_back(p, us, vs, log_b, torch.zeros_like(us[-1]), dv), None)


def _compiled_step(
    p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """`_Step` in operations that torch.compile can differentiate by itself."""
    with torch.no_grad():
        us, vs = _sweep(p, log_a, log_b, v, iterations)
        direction = _unit(_entropy_back(p, us, vs, log_b))
    _, vs = _sweep(p, log_a, log_b, v, iterations)
    return vs[-1], direction


def mesh(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    *,
    lr: float | Tensor = 8.0,
    steps: int = 4,
    iterations: int = 5,
    reuse: bool = True,
    exact: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`mesh_reference` with the gradient of the entropy by hand.

    Args:
        cost: C with its noise, (B, N, K).
        log_a: (B, N).
        log_b: (B, K).
        lr: Length of a step.
        steps: Steps of descent.
        iterations: S of every plan on the way.
        reuse: Start each plan at the v of the one before.
        exact: Keep the graph of v from plan to plan, as the official code does; otherwise the
            warm start counts as a constant, like the steps.

    Returns:
        The cost after the last step, and the v to start the final plan at, or None.
    """
    zero = torch.zeros_like(log_b)
    v = zero
    for _ in range(steps):
        facts: tuple[Tensor, ...] = (-cost, log_a, log_b, v if reuse else zero)
        if not (exact and reuse):
            facts = tuple(fact.detach() for fact in facts)
        step = _compiled_step if torch.compiler.is_compiling() else _Step.apply
        v, direction = step(*facts, iterations)
        cost = cost - lr * direction
    return cost, v if reuse and steps else None
