"""MESH: slot attention whose transport plan has little entropy, which separates equal slots.

Zhang et al. 2023, "Unlocking Slot Attention by Changing Optimal Transport Costs" (arXiv
2301.13197). All is as in `slot` with Sinkhorn's algorithm but for the cost: noise against ties is
added to it once per pass, and in each round n steps lower the entropy of the plan that it leads to,

    C <- C + 0.001 noise,    n times:  C <- C - lr g / |g|,  g = d(mean of -P log P) / dC

(equations and reverse sweep in `_sinkhorn`), before the plan that weighs the inputs is taken. Two
slots that start equal have equal columns of C but for the noise, which the descent drives apart:
a softmax or a plain plan keeps them equal for ever. A step of descent has the length lr, 8,
whatever the sizes. g counts as a constant, so that gradients pass to C unchanged.

Cost: 2 n + 1 times that of a plan, T (2 n + 1) S N K exponentials. The reference takes g from
autograd, as the official code does; ours is the reverse sweep by hand, which works under
`torch.no_grad` and `torch.inference_mode` as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.backends import Backends
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.slots._sinkhorn import mesh, mesh_reference, sinkhorn, sinkhorn_reference
from zoo.slots.slot import SlotAttention


@register(
    "mesh",
    kind="slots",
    paper=Paper("Unlocking Slot Attention by Changing Optimal Transport Costs", 2023, "2301.13197"),
    taxonomy=Taxonomy(
        sequences="distinctive",
        levels="single",
        positions="global",
        representations="single",
        alignment="distance",
        distribution="sinkhorn",
        complexity="linear",
        modality=("image", "video"),
        needs=("two_sequences",),
        trainable_params=True,
    ),
    traits=Traits(
        mask="keys",
        gradient=False,
        cost="iterations * N * K * (D + mesh_steps * sinkhorn_iterations)",
    ),
    parameters=(
        "7 * dim ** 2 + 2 * dim * dim_in + 11 * dim + 2 * dim * hidden + hidden + 2 * dim_in"
        " + {'learned_random': 2, 'fixed_random': 0, 'learned': slots, 'identical': 1}[init] * dim"
        " + (dim + dim_in + 4) * hidden + learn_mesh_lr"
    ),
)
class MESH(Backends, SlotAttention):
    """Slots that compete by a transport plan of little entropy.

    Args:
        dim_in: Channels of the inputs.
        dim: Channels D of a slot.
        slots: Slots K, unless initial ones are given.
        iterations: Rounds T; may be changed between passes.
        hidden: Width of the MLPs.
        distance: How k and q are compared: "l2", "cosine" (the paper's for video, with
            scale_cost=6 and scale_marginals=18) or "dot".
        scale_cost: Factor of the cost.
        scale_marginals: Mass of all inputs, and of all slots; None takes the number of slots.
        sinkhorn_iterations: Rounds S of Sinkhorn's algorithm, of every plan.
        temperature: Of the last plan.
        mesh_steps: Steps n of descent; 0 leaves the plan of the noisy cost.
        mesh_lr: Length of a step; with `learn_mesh_lr` where it starts, None being 8, or 1 when
            it is learned.
        learn_mesh_lr: Train the length of a step.
        reuse_uv: Start each plan where the one before it ended.
        noise_scale: Size of the noise against ties.
        exact: Differentiate through the plans on the way as the official code does; otherwise
            where a plan starts counts as a constant.
        backend: "torch" for the reverse sweep by hand, "reference" for autograd, "auto" for the
            former.
        init: As for `slot`: "learned_random", "fixed_random", "learned" or "identical".
        detach_slots: Cut the gradient between rounds.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size or an option is out of range.
    """

    routes = ("torch", "reference")

    def __init__(
        self,
        dim_in: int,
        dim: int = 64,
        slots: int = 7,
        *,
        iterations: int = 3,
        hidden: int = 128,
        distance: str = "l2",
        scale_cost: float = 1.0,
        scale_marginals: float | None = None,
        sinkhorn_iterations: int = 5,
        temperature: float = 1.0,
        mesh_steps: int = 4,
        mesh_lr: float | None = None,
        learn_mesh_lr: bool = False,
        reuse_uv: bool = True,
        noise_scale: float = 1e-3,
        exact: bool = True,
        backend: str = "auto",
        init: str = "learned_random",
        detach_slots: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim_in,
            dim,
            slots,
            iterations=iterations,
            hidden=hidden,
            normalizer="sinkhorn",
            distance=distance,
            scale_cost=scale_cost,
            scale_marginals=scale_marginals,
            sinkhorn_iterations=sinkhorn_iterations,
            temperature=temperature,
            init=init,
            detach_slots=detach_slots,
            device=device,
            dtype=dtype,
        )
        mesh_steps = checks.whole("mesh_steps", mesh_steps, 0)
        lr = checks.optional(checks.number)("mesh_lr", mesh_lr, above=0)
        noise_scale = checks.number("noise_scale", noise_scale, 0)
        flags = {"learn_mesh_lr": learn_mesh_lr, "reuse_uv": reuse_uv, "exact": exact}
        for name, value in flags.items():
            checks.flag(name, value)
        checks.choice("backend", backend, ("auto", "torch", "reference"))
        if lr is None:
            lr = 1.0 if learn_mesh_lr else 8.0
        if backend == "reference" and not exact:
            raise ZooError("backend='reference' is exact; exact=False is for backend='torch'")
        if learn_mesh_lr and not mesh_steps:
            raise ZooError("learn_mesh_lr=True needs mesh_steps of at least 1 to learn from")
        self.mesh_steps, self.reuse_uv, self.exact = mesh_steps, reuse_uv, exact
        self.noise_scale, self.backend = float(noise_scale), backend
        self.lr: nn.Parameter | float = float(lr)
        if learn_mesh_lr:
            self.lr = nn.Parameter(torch.full((1,), float(lr), device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        slots: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let the slots take in the inputs.

        Args:
            x: Inputs, (B, N, D_in).
            slots: Initial slots (B, K, D) of any number; None draws or takes the module's own.
            mask: True at inputs that count, (B, N), or None.
            noise: Standard normal noise (B, N, K) for all rounds; None draws it.
            generator: What initial slots and noise are drawn from; None takes the global one.
            return_weights: Return the plan of the last round as well.

        Returns:
            Slots (B, K, D), and with `return_weights` the plan (B, N, K).

        Raises:
            ZooError: A shape does not fit, or the reference is asked for gradients under
                `torch.inference_mode`.
        """
        self._check(x, slots, mask)
        if slots is None:
            slots = self.start(len(x), x, generator)
        shape = (*x.shape[:2], slots.shape[1])
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        elif noise.shape != shape:
            raise ZooError(f"noise of shape {tuple(noise.shape)} must be {shape}")
        return self._rounds(x, slots, mask, noise, return_weights)

    def _plan(self, cost: Tensor, log_a: Tensor, log_b: Tensor, noise: Tensor | None) -> Tensor:
        """Plan of little entropy, (B, N, K)."""
        assert noise is not None
        cost = cost + self.noise_scale * noise.to(cost)
        by_autograd = self.backend == "reference"
        if by_autograd and torch.is_inference_mode_enabled():
            raise ZooError(
                "backend='reference' takes gradients inside the forward pass, which "
                "torch.inference_mode forbids; use torch.no_grad "
                "(Lightning: Trainer(inference_mode=False)), or backend='torch'"
            )
        settings = {"iterations": self.sinkhorn_iterations}
        lr = self.lr.to(cost) if isinstance(self.lr, Tensor) else self.lr
        if by_autograd:
            cost, v = mesh_reference(
                cost, log_a, log_b, lr=lr, steps=self.mesh_steps, reuse=self.reuse_uv, **settings
            )
        else:
            cost, v = mesh(
                cost,
                log_a,
                log_b,
                lr=lr,
                steps=self.mesh_steps,
                reuse=self.reuse_uv,
                exact=self.exact,
                **settings,
            )
        last = sinkhorn_reference if by_autograd else sinkhorn
        return last(cost, log_a, log_b, temperature=self.temperature, v=v, **settings)[0]
