"""Sinkhorn's algorithm on a cost, and MESH: descent on the entropy of the plan that it finds.

    p = -C / temperature,  u = v = 0 (or a warm start)
    repeat S times:  u = log a - logsumexp_K(p + v),  v = log b - logsumexp_N(p + u)
    P = exp(p + u + v)                                       (Cuturi 2013; columns sum to b exactly)

MESH (Zhang et al. 2023, "Unlocking Slot Attention by Changing Optimal Transport Costs", section on
the minimisation) repeats, for a cost with a little noise against ties,

    H = mean over N, K of -P log P,  g = (dH/dC) / |dH/dC|,  C <- C - lr g,

where g counts as a constant. Both are written as reverse sweeps by hand: no graph of the S rounds
is kept, and gradients inside a forward pass need neither autograd nor a mode in which it is
allowed. After the first round in logarithms a plan takes 2 S products of an N x K matrix with a
vector, its gradient twice as many; MESH n + 1 plans and n gradients. Memory N K.
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


class _Sweep:
    """S rounds of Sinkhorn, and their gradient.

    The first u is taken in logarithms; then the plan M that it leads to, whose rows have their
    mass, is held fixed, and all further rounds are products of M with vectors of factors: u is
    u_1 + log r, v is v_0 + log c. The reverse sweep is such products as well, and one product of
    matrices of rank 2 S. Where the factors leave the range of the type, `_LogSweep` is right.

    Args:
        p: (B, K, N).
        log_a: (B, N).
        log_b: (B, K).
        v: Start, (B, K).
        rounds: S.
    """

    def __init__(self, p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, rounds: int) -> None:
        p = p.contiguous()
        start = p + v[..., None]
        self.u = log_a - start.logsumexp(1)
        self.plan = start.add_(self.u[:, None]).exp_()
        a, b = log_a.exp(), log_b.exp()
        self.inverse_a = torch.where(a > 0, 1 / a, 0.0)
        self.b, self.v = b, v
        self.r, self.c = [torch.ones_like(a)], [torch.ones_like(b)]
        for s in range(rounds):
            if s:
                row = (self.c[-1][:, None] @ self.plan)[:, 0]
                self.r.append(torch.where(a > 0, a / row, 0.0))
            self.c.append(b / (self.plan @ self.r[-1][..., None])[..., 0])

    def sound(self) -> bool:
        """All factors are numbers, and none is near the end of the range."""
        least, most = 1e-15, 1e15
        c, r = self.c[-1], self.r[-1]
        inside = (c > least) & (c < most)
        return bool(inside.all()) and bool((r < most).all())

    def last(self) -> tuple[Tensor, Tensor]:
        """The last u (B, N) and v (B, K)."""
        return self.u + self.r[-1].log(), self.v + self.c[-1].log()

    def entropy_gradient(self, p: Tensor) -> Tensor:
        """Gradient of the entropy of the plan with respect to p, (B, K, N)."""
        plan = self.plan * self.c[-1][..., None] * self.r[-1][:, None]
        grown = _entropy_growth(plan)
        return self.back(grown.sum(1), grown.sum(2))[0].add_(grown)

    def back(self, du: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of p, log a, log b and the start from those of the last u and v."""
        d_log_a, d_log_b = torch.zeros_like(du), torch.zeros_like(dv)
        left, right = [], []
        for s in reversed(range(len(self.r))):
            r, c, before = self.r[s], self.c[s + 1], self.c[s]
            d_log_b = d_log_b + dv
            flow = c * dv / self.b
            left.append(flow)
            right.append(r)
            du = du - r * (flow[:, None] @ self.plan)[:, 0]
            d_log_a = d_log_a + du
            flow = r * du * self.inverse_a
            left.append(before)
            right.append(flow)
            dv = -before * (self.plan @ flow[..., None])[..., 0]
            du = torch.zeros_like(du)
        dp = torch.stack(left, 2) @ torch.stack(right, 1)
        return dp.mul_(self.plan).neg_(), d_log_a, d_log_b, dv


class _LogSweep:
    """The same in logarithms throughout, for costs of any size.

    Args:
        p: (B, K, N).
        log_a: (B, N).
        log_b: (B, K).
        v: Start, (B, K).
        rounds: S.
    """

    def __init__(self, p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, rounds: int) -> None:
        self.p, self.log_b = p, log_b
        self.us: list[Tensor] = []
        self.vs = [v]
        for _ in range(rounds):
            self.us.append(log_a - (p + self.vs[-1][..., None]).logsumexp(1))
            self.vs.append(log_b - (p + self.us[-1][:, None]).logsumexp(2))

    def last(self) -> tuple[Tensor, Tensor]:
        """The last u (B, N) and v (B, K)."""
        return self.us[-1], self.vs[-1]

    def entropy_gradient(self, p: Tensor) -> Tensor:
        """Gradient of the entropy of the plan with respect to p, (B, K, N)."""
        u, v = self.last()
        grown = _entropy_growth((p + u[:, None] + v[..., None]).exp())
        return self.back(grown.sum(1), grown.sum(2))[0] + grown

    def back(self, du: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of p, log a, log b and the start from those of the last u and v."""
        dp = torch.zeros_like(self.p)
        d_log_a, d_log_b = torch.zeros_like(du), torch.zeros_like(dv)
        for s in reversed(range(len(self.us))):
            # v = log b - lse(p + u): its softmax over the inputs is exp(p + u + v - log b).
            weights = self.p + self.us[s][:, None] + (self.vs[s + 1] - self.log_b)[..., None]
            flow = weights.exp() * dv[..., None]
            d_log_b = d_log_b + dv
            dp = dp - flow
            du = du - flow.sum(1)
            # u = log a - lse(p + v): a softmax over the slots.
            flow = (self.p + self.vs[s][..., None]).softmax(1) * du[:, None]
            d_log_a = d_log_a + du
            dp = dp - flow
            dv = -flow.sum(2)
            du = torch.zeros_like(du)
        return dp, d_log_a, d_log_b, dv


def _swept(p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, rounds: int) -> _Sweep | _LogSweep:
    """The sweep in factors where it is sound, else in logarithms."""
    sweep = _Sweep(p, log_a, log_b, v, rounds)
    return sweep if sweep.sound() else _LogSweep(p, log_a, log_b, v, rounds)


def _entropy_growth(plan: Tensor) -> Tensor:
    """Gradient of the entropy of a plan with respect to its logarithm."""
    inside = (plan >= _LOW) & (plan <= 1.0)
    grown = torch.where(inside, -(plan.clamp(min=_LOW).log() + 1) * plan, 0.0)
    return grown.div_(plan.shape[1] * plan.shape[2])


class _Potentials(torch.autograd.Function):
    """u and v of Sinkhorn, with the reverse sweep as their gradient."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, rounds: int
    ) -> tuple[Tensor, Tensor]:
        ctx.sweep = _swept(p, log_a, log_b, v, rounds)
        return ctx.sweep.last()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.sweep.back(du, dv), None)


class _Step(torch.autograd.Function):
    """The v at the end of a plan, and the direction in which its entropy grows, a constant."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, rounds: int
    ) -> tuple[Tensor, Tensor]:
        ctx.sweep = _swept(p, log_a, log_b, v, rounds)
        direction = _unit(ctx.sweep.entropy_gradient(p).neg())
        ctx.mark_non_differentiable(direction)
        return ctx.sweep.last()[1], direction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dv: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        u = ctx.sweep.last()[0]
        return (*ctx.sweep.back(torch.zeros_like(u), dv), None)


def _traced() -> bool:
    """Whether a compiler or a transform of torch.func looks on, which wants plain operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _compiled_step(
    p: Tensor, log_a: Tensor, log_b: Tensor, v: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """`_Step` in operations that torch.compile and torch.func take and differentiate."""
    with torch.no_grad():
        direction = _unit(_LogSweep(p, log_a, log_b, v, rounds).entropy_gradient(p).neg())
    return _LogSweep(p, log_a, log_b, v, rounds).last()[1], direction


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

    Arguments and results are those of the reference.
    """
    p = cost.mT / -temperature
    v = torch.zeros_like(log_b) if v is None else v
    if _traced():
        u, v = _LogSweep(p, log_a, log_b, v, iterations).last()
    else:
        u, v = _Potentials.apply(p, log_a, log_b, v, iterations)
    return (p + u[:, None] + v[..., None]).exp().mT, u, v


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

    Arguments and results are those of the reference. With `exact` the graph of v is kept from plan
    to plan, as the official code does; without it a warm start counts as a constant, like a step.
    """
    zero = torch.zeros_like(log_b)
    v = zero
    for _ in range(steps):
        facts: Any = (-cost.mT, log_a, log_b, v if reuse else zero)
        if not (exact and reuse):
            facts = [fact.detach() for fact in facts]
        step: Any = _compiled_step if _traced() else _Step.apply
        v, direction = step(*facts, iterations)
        cost = cost - lr * direction.mT
    return cost, v if reuse and steps else None
