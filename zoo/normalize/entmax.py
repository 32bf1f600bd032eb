"""Entmax (Peters, Niculae, Martins 2019) and sparsemax (Martins, Astudillo 2016): sparse weights.

    entmax_a(z) = [(a - 1) z - tau]_+ ^ (1 / (a - 1))       tau such that the weights sum to one

over the keys of each row, z = s (B, H, R, M). a = 1 is softmax, a = 2 is sparsemax, the Euclidean
projection onto the simplex; every a > 1 gives exact zeros, more of them the larger a. With
p = entmax_a(z), u = p^(2 - a) on the support and 0 outside, a cotangent g goes back as

    dz = u * (g - sum(u * g) / sum(u))

Cost: a sort of each row for a = 1.5 and 2 (both exact), `STEPS` passes of bisection over the row
for any other a. Extra memory: p alone is kept for the backward pass.

Both papers put -inf where a pair is hidden. Here rows are shifted by their maximum and scores
more than 2 / (a - 1) below it are cut there: their weight is zero anyway, as only scores within
1 / (a - 1) of the maximum can have one, and the sums stay finite and accurate. The authors'
package does the bisection in the type of its input; here half precision is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.parts import Normalize, mask_scores
from zoo.registry import Paper, Taxonomy, register

# Halvings of the bracket of tau, which is at most 1 wide: beyond the rounding of the type.
STEPS = {torch.float32: 50, torch.float64: 80}


def entmax_reference(scores: Tensor, alpha: float = 1.5) -> Tensor:
    """Entmax over the last axis by plain bisection, differentiated by autograd (the oracle).

    Args:
        scores: (..., M), finite.
        alpha: Larger than 1.
    """
    z = (alpha - 1) * scores.double()
    top = z.detach().amax(-1, keepdim=True)
    low, high = top - 1, top
    for _ in range(200):
        middle = (low + high) / 2
        total = ((z.detach() - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True)
        low, high = torch.where(total >= 1, middle, low), torch.where(total >= 1, high, middle)
    # A Newton step at the solution moves nothing, but ties tau to the scores for autograd.
    tau = (low + high) / 2
    support = z.detach() > tau
    gap = torch.where(support, z - tau, 1.0)
    p = torch.where(support, gap ** (1 / (alpha - 1)), 0.0)
    slope = torch.where(support, gap ** ((2 - alpha) / (alpha - 1)), 0.0).sum(-1, keepdim=True)
    tau = tau + (alpha - 1) * (p.sum(-1, keepdim=True) - 1) / slope.detach()
    gap = torch.where(support, z - tau, 1.0)
    return torch.where(support, gap ** (1 / (alpha - 1)), 0.0).to(scores.dtype)


def _sparsemax(x: Tensor) -> Tensor:
    """Projection of x (..., M) onto the simplex, by the sorted prefix that stays positive."""
    ordered = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    excess = ordered.cumsum(-1) - 1
    size = (count * ordered > excess).sum(-1, keepdim=True)
    tau = excess.gather(-1, size - 1) / size
    return (x - tau).clamp(min=0)


def _entmax15(x: Tensor) -> Tensor:
    """Entmax with a = 1.5 of x = z / 2 (..., M): tau solves a quadratic over the support."""
    ordered = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = ordered.cumsum(-1) / count
    spread = (ordered.square().cumsum(-1) / count - mean.square()) * count  # sum of squares
    tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    return (x - tau.gather(-1, size - 1)).clamp(min=0).square()


def _bisect(x: Tensor, alpha: float) -> Tensor:
    """Entmax of x = (a - 1) z (..., M) with maximum 0."""
    power = 1 / (alpha - 1)
    low = x.new_full((*x.shape[:-1], 1), -1.0)
    # With all M scores equal, tau is highest.
    width = 1 - float(x.shape[-1]) ** (1 - alpha)
    for _ in range(STEPS[x.dtype]):
        width /= 2
        middle = low + width
        total = ((x - middle).clamp(min=0) ** power).sum(-1, keepdim=True)
        low = torch.where(total >= 1, middle, low)
    p = (x - low).clamp(min=0) ** power
    return p / p.sum(-1, keepdim=True)


class _Entmax(torch.autograd.Function):
    """Entmax of float32 or float64 scores over the last axis, a > 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, alpha: float) -> Tensor:
        """Weights of the same shape."""
        # A row of -inf alone must not become NaN.
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        top = scores.amax(-1, keepdim=True)
        # No threshold solves a row with NaN or +inf: it becomes NaN, as that of a softmax does.
        solvable = top < torch.inf
        x = ((alpha - 1) * (scores - top)).clamp(min=-2.0).where(solvable, 0.0)
        forms = {2: _sparsemax, 1.5: _entmax15}
        p = forms[alpha](x) if alpha in forms else _bisect(x, alpha)
        return p.where(solvable, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the weights."""
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gradient of the scores."""
        (p,), (grad,) = ctx.saved_tensors, grads
        support = p > 0
        # Powers of exact zeros, which would be infinite for alpha > 2, are never formed.
        u = torch.where(support, torch.where(support, p, 1.0) ** (2 - ctx.alpha), 0.0)
        mean = (u * grad).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)
        return u * (grad - mean), None


def _check(alpha: float) -> float:
    return checks.number("alpha", alpha, 1, also="where 1 is softmax and 2 is sparsemax")


def entmax(scores: Tensor, alpha: float = 1.5) -> Tensor:
    """Sparse alternative to softmax over the last axis.

    Args:
        scores: (..., M); -inf where there is nothing to weigh.
        alpha: 1 is softmax, 2 sparsemax; larger is sparser.

    Returns:
        (..., M), at least float32, rows sum to 1.

    Raises:
        ZooError: `alpha` is no number from 1 on.

    Source: Peters, Niculae, Martins 2019, equations 3, 10 and 14.
    """
    alpha = _check(alpha)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return scores.softmax(-1) if alpha == 1 else _Entmax.apply(scores, float(alpha))


_TAXONOMY = Taxonomy(
    sequences="self",
    levels="single",
    positions="global",
    representations="single",
    alignment="scaled_dot",
    distribution="sparsemax",
    complexity="quadratic",
)


@register(
    "entmax",
    kind="normalize",
    paper=Paper("Sparse Sequence-to-Sequence Models", 2019, "1905.05702"),
    taxonomy=_TAXONOMY,
    notes="alpha = 1 is softmax",
)
class Entmax(Normalize):
    """Weights that sum to one and are exactly zero for low scores.

    Args:
        alpha: 1 is softmax, 2 sparsemax; larger is sparser.

    Raises:
        ZooError: `alpha` is no number from 1 on.
    """

    def __init__(self, alpha: float = 1.5) -> None:
        super().__init__()
        self.alpha = _check(alpha)

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, H, R, M)."""
        return entmax(mask_scores(scores, mask), self.alpha)

    def extra_repr(self) -> str:
        """The option."""
        return f"alpha={self.alpha}"


@register(
    "sparsemax",
    kind="normalize",
    paper=Paper(
        "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
        2016,
        "1602.02068",
    ),
    taxonomy=_TAXONOMY,
)
class Sparsemax(Entmax):
    """Euclidean projection of the scores onto the simplex: entmax with alpha 2."""

    def __init__(self) -> None:
        super().__init__(alpha=2.0)
