"""Slot attention: a few slots compete for many inputs, over a few rounds.

Locatello et al. 2020, "Object-Centric Learning with Slot Attention", algorithm 1, for inputs
x (B, N, D_in) and slots s (B, K, D), T rounds:

    x = LN(x),  k = x W_k,  v = x W_v                                       once
    q = LN(s) W_q
    A = softmax over the K slots of k q^T / sqrt(D),  A = (A + eps) / sum over the N inputs
    s = GRU(A^T v, s),  s = s + MLP(LN(s))

The softmax over slots makes these compete, the division makes each slot's update a weighted mean.
With `normalizer="sinkhorn"` (Zhang et al. 2023, arXiv 2301.13197) A is a transport plan instead:
for a cost C, by default the distance of k and q, and the masses

    a = m softmax over N of MLP_a(x),   b = m softmax over K of MLP_b(LN(s)),   m = K

A is what S rounds of Sinkhorn's algorithm find; its columns sum to b exactly, its rows to a nearly.
One such round with unit masses and the cost -k q^T / sqrt(D) is the softmax above.

Slots that start equal stay equal for ever, in both forms: see `mesh`. Cost T N K D. The initial
slots are drawn unless they are given. A mask of the inputs is not in the paper: hidden inputs get
no weight (and no mass).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.parts import widen
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.slots._sinkhorn import log_marginal, sinkhorn

NORMALIZERS = ("softmax", "sinkhorn")
DISTANCES = ("dot", "l2", "cosine")
INITS = ("learned_random", "fixed_random", "learned", "identical")


def slot_attention_reference(
    k: Tensor, q: Tensor, v: Tensor, mask: Tensor | None = None, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """The update of one round, softmax over slots.

    Args:
        k: Keys of the inputs, (B, N, D).
        q: Queries of the slots, (B, K, D).
        v: Values of the inputs, (B, N, D).
        mask: True at inputs that count, (B, N), or None.
        eps: Added to every weight.

    Returns:
        Update (B, K, D) and weights (B, N, K).
    """
    scores = torch.einsum("bnd,bkd->bnk", k, q) / math.sqrt(q.shape[-1])
    weights = scores.softmax(2) + eps
    if mask is not None:
        weights = weights * mask[..., None]
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("bnk,bnd->bkd", weights, v), weights


@register(
    "slot",
    kind="slots",
    paper=Paper("Object-Centric Learning with Slot Attention", 2020, "2006.15055"),
    taxonomy=Taxonomy(
        sequences="distinctive",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="softmax",
        complexity="linear",
        modality=("image", "video"),
        needs=("two_sequences",),
        trainable_params=True,
    ),
    traits=Traits(mask="keys", cost="iterations * N * K * D"),
    parameters=(
        "7 * dim ** 2 + 2 * dim * dim_in + 11 * dim + 2 * dim * hidden + hidden + 2 * dim_in"
        " + {'learned_random': 2, 'fixed_random': 0, 'learned': slots, 'identical': 1}[init] * dim"
        " + (normalizer == 'sinkhorn') * (dim + dim_in + 4) * hidden"
    ),
)
class SlotAttention(nn.Module):
    """Slots that compete for inputs by a softmax or by a transport plan.

    Args:
        dim_in: Channels of the inputs.
        dim: Channels D of a slot.
        slots: Slots K, unless initial ones are given.
        iterations: Rounds T; may be changed between passes.
        hidden: Width of the MLPs.
        normalizer: "softmax" over the slots, or "sinkhorn".
        distance: How k and q are compared: "dot", "l2" or "cosine"; None takes dot for softmax and
            l2 for sinkhorn. A distance counts with a minus sign in a softmax, a product in a cost.
        scale_cost: Factor of the cost, or of the scores.
        scale_marginals: Mass m of all inputs, and of all slots, of a plan; None takes the number
            of slots.
        sinkhorn_iterations: Rounds S of Sinkhorn's algorithm; None takes 5.
        temperature: Of the plan, or of the softmax.
        init: How slots begin: "learned_random" draws from a learned normal distribution that all
            share, "fixed_random" from one that is not trained, "learned" has a vector for each
            slot, "identical" one vector for all.
        detach_slots: Cut the gradient between rounds.
        eps: Added to the weights of a softmax; None takes 1e-8.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size or an option is out of range, or belongs to the other normalizer.
    """

    kind = "slots"
    slots_mu: Tensor
    slots_log_sigma: Tensor

    def __init__(
        self,
        dim_in: int,
        dim: int = 64,
        slots: int = 7,
        *,
        iterations: int = 3,
        hidden: int = 128,
        normalizer: str = "softmax",
        distance: str | None = None,
        scale_cost: float = 1.0,
        scale_marginals: float | None = None,
        sinkhorn_iterations: int | None = None,
        temperature: float = 1.0,
        init: str = "learned_random",
        detach_slots: bool = False,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plan = normalizer == "sinkhorn"
        of_plans = {"scale_marginals": scale_marginals, "sinkhorn_iterations": sinkhorn_iterations}
        for name, given in ({"eps": eps} if plan else of_plans).items():
            if given is not None and normalizer in NORMALIZERS:
                raise ZooError(f"{name}={given!r} does nothing with normalizer={normalizer!r}")
        rounds = 5 if sinkhorn_iterations is None else sinkhorn_iterations
        self.dim_in = dim_in = checks.whole("dim_in", dim_in)
        self.dim = dim = checks.whole("dim", dim)
        self.slots = slots = checks.whole("slots", slots)
        hidden = checks.whole("hidden", hidden)
        self.iterations = checks.whole("iterations", iterations)
        self.sinkhorn_iterations = checks.whole("sinkhorn_iterations", rounds)
        self.normalizer = checks.choice("normalizer", normalizer, NORMALIZERS)
        self.distance = "dot" if normalizer == "softmax" else "l2"
        if distance is not None:
            self.distance = checks.choice("distance", distance, DISTANCES)
        self.init = checks.choice("init", init, INITS)
        self.scale_cost = checks.number("scale_cost", scale_cost, above=0)
        self.temperature = checks.number("temperature", temperature, above=0)
        self.eps = checks.number("eps", 1e-8 if eps is None else eps, above=0)
        positive = checks.optional(checks.number)
        self.scale_marginals = positive("scale_marginals", scale_marginals, above=0)
        self.detach_slots = checks.flag("detach_slots", detach_slots)
        made: Any = {"device": device, "dtype": dtype}
        self.norm_inputs = nn.LayerNorm(dim_in, **made)
        self.norm_slots = nn.LayerNorm(dim, **made)
        self.norm_mlp = nn.LayerNorm(dim, **made)
        self.project_q = nn.Linear(dim, dim, bias=False, **made)
        self.project_k = nn.Linear(dim_in, dim, bias=False, **made)
        self.project_v = nn.Linear(dim_in, dim, bias=False, **made)
        self.gru = nn.GRUCell(dim, dim, **made)
        self.mlp = _mlp(dim, hidden, dim, True, made)
        if normalizer != "softmax":
            self.mlp_input_marginals = _mlp(dim_in, hidden, 1, False, made)
            self.mlp_slot_marginals = _mlp(dim, hidden, 1, False, made)
        if init in ("learned_random", "fixed_random"):
            for name in ("slots_mu", "slots_log_sigma"):
                start = torch.empty(1, 1, dim, **made)
                if init == "learned_random":
                    self.register_parameter(name, nn.Parameter(start))
                else:
                    self.register_buffer(name, start)
        else:
            rows = slots if init == "learned" else 1
            self.slots_start = nn.Parameter(torch.empty(1, rows, dim, **made))
        self.reset_start()

    def reset_start(self) -> None:
        """Draw what slots begin with anew, Xavier uniform over the width as the paper does."""
        for name in ("slots_mu", "slots_log_sigma", "slots_start"):
            start = getattr(self, name, None)
            if start is not None:
                nn.init.uniform_(start, -math.sqrt(3 / self.dim), math.sqrt(3 / self.dim))

    def start(self, batch: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Initial slots (B, K, D).

        Args:
            batch: Samples B.
            like: A tensor of the type and device that they shall have.
            generator: What they are drawn from; None takes the global one.
        """
        if self.init in ("learned", "identical"):
            return self.slots_start.to(like).expand(batch, self.slots, -1)
        shape = (batch, self.slots, self.dim)
        drawn = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        return self.slots_mu + self.slots_log_sigma.exp() * drawn

    def forward(
        self,
        x: Tensor,
        slots: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let the slots take in the inputs.

        Args:
            x: Inputs, (B, N, D_in).
            slots: Initial slots (B, K, D) of any number; None draws or takes the module's own.
            mask: True at inputs that count, (B, N), or None.
            generator: What initial slots are drawn from; None takes the global one.
            return_weights: Return the weights of the last round as well.

        Returns:
            Slots (B, K, D), and with `return_weights` the weights (B, N, K).

        Raises:
            ZooError: A shape does not fit.
        """
        self._check(x, slots, mask)
        slots = self.start(len(x), x, generator) if slots is None else slots
        return self._rounds(x, slots, mask, None, return_weights)

    def _rounds(
        self,
        x: Tensor,
        slots: Tensor,
        mask: Tensor | None,
        noise: Tensor | None,
        return_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm_inputs(x)
        k, v = self._project(self.project_k, x), self.project_v(x)
        seen = None if mask is None else _seen(mask)
        log_a = self._input_mass(x, slots.shape[1], seen)
        weights = k  # replaced in the first of at least one round
        for _ in range(self.iterations):
            before = slots.detach() if self.detach_slots else slots
            normed = self.norm_slots(before)
            q = self._project(self.project_q, normed)
            weights = self._weigh(k, q, normed, log_a, seen, noise)
            if mask is not None:  # a sample without inputs takes nothing
                weights = weights * mask[..., None]
            update = weights.to(v.dtype).mT @ v
            slots = self.gru(update.flatten(0, 1), before.flatten(0, 1).to(update.dtype))
            slots = slots.unflatten(0, before.shape[:2])
            slots = slots + self.mlp(self.norm_mlp(slots))
        return (slots, weights) if return_weights else slots

    def _project(self, project: nn.Linear, x: Tensor) -> Tensor:
        """Queries or keys; those of a plan in full precision, which decides between near ties."""
        if self.normalizer == "softmax":
            return project(x)
        with torch.autocast(x.device.type, enabled=False):
            return project(x.to(project.weight.dtype))

    def _weigh(
        self,
        k: Tensor,
        q: Tensor,
        normed: Tensor,
        log_a: Tensor | None,
        mask: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        """Weights (B, N, K) of one round."""
        if log_a is None:
            scores = -self._cost(k, q) / self.temperature
            weights = scores.softmax(2) + self.eps
            if mask is not None:
                weights = weights * mask[..., None]
            return weights / weights.sum(1, keepdim=True)
        log_b = log_marginal(self._mass(self.mlp_slot_marginals(normed), q.shape[1]))
        with torch.autocast(k.device.type, enabled=False):
            cost = self._cost(widen(k), widen(q))
            return self._plan(cost, log_a, log_b, noise)

    def _plan(self, cost: Tensor, log_a: Tensor, log_b: Tensor, noise: Tensor | None) -> Tensor:
        """Transport plan (B, N, K)."""
        found = sinkhorn(
            cost, log_a, log_b, iterations=self.sinkhorn_iterations, temperature=self.temperature
        )
        return found[0]

    def _cost(self, k: Tensor, q: Tensor) -> Tensor:
        """Cost (B, N, K) of giving an input to a slot."""
        if self.distance == "dot":
            return (q @ k.mT).mT * (-self.scale_cost / math.sqrt(self.dim))
        if self.distance == "cosine":
            return self.scale_cost * (1 - F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).mT
        # Exact differences: the form with products loses the small distances that decide ties.
        distance = torch.cdist(widen(q), widen(k), compute_mode="donot_use_mm_for_euclid_dist")
        return self.scale_cost * distance.mT

    def _input_mass(self, x: Tensor, slots: int, mask: Tensor | None) -> Tensor | None:
        """Logarithms of the masses of the inputs (B, N); None for a softmax."""
        if self.normalizer == "softmax":
            return None
        logits = self.mlp_input_marginals(x)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., None], -torch.inf)
        return log_marginal(self._mass(logits, slots), mask)

    def _mass(self, logits: Tensor, slots: int) -> Tensor:
        """Masses (B, M) from logits (B, M, 1)."""
        total = float(slots) if self.scale_marginals is None else self.scale_marginals
        return total * widen(logits).squeeze(-1).softmax(1)

    def _check(self, x: Tensor, slots: Tensor | None, mask: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim_in or not x.shape[1]:
            raise ZooError(
                f"x of shape {tuple(x.shape)} must be (batch, inputs >= 1, dim_in={self.dim_in})"
            )
        wanted = (len(x), self.dim)
        if slots is not None and (
            slots.ndim != 3 or (slots.shape[0], slots.shape[2]) != wanted or not slots.shape[1]
        ):
            raise ZooError(
                f"slots of shape {tuple(slots.shape)} must be (batch={len(x)}, slots >= 1, "
                f"dim={self.dim})"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ZooError(
                f"mask of shape {tuple(mask.shape)} and type {mask.dtype} must be boolean, "
                f"{tuple(x.shape[:2])}"
            )


def _mlp(dim_in: int, hidden: int, dim: int, bias: bool, made: Any) -> nn.Sequential:
    first = nn.Linear(dim_in, hidden, **made)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, dim, bias=bias, **made))


def _seen(mask: Tensor) -> Tensor:
    """A mask in which a sample without inputs sees all, so that nothing divides by zero."""
    return mask | ~mask.any(1, keepdim=True)
