"""Slots over the frames of a video: each frame's slots begin where those of the last one ended.

Zhang et al. 2023 (arXiv 2301.13197), the section on video. Slots of things that have not appeared
yet are alike, so that a new object is a tie among them: MESH breaks it, a softmax cannot unless
noise is added to the slots between frames, the paper's baseline.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError

NOISES = ("none", "fixed", "learned")


class SlotVideo(nn.Module):
    """Carries the slots of a module of kind "slots" from frame to frame.

    Args:
        slots: The module.
        noise: What is added to the slots between frames: "none"; "fixed" for a normal noise of
            deviation `sigma`; "learned" for one whose mean and log-variance are linear in the
            slot, with a divergence from N(0, `sigma`^2) as the auxiliary loss "slot_noise".
        sigma: Deviation of the noise, or of what it should be like.
        kl_weight: Factor of the auxiliary loss.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: An option is out of range.
    """

    def __init__(
        self,
        slots: nn.Module,
        *,
        noise: str = "none",
        sigma: float = 0.1,
        kl_weight: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.slots, self.noise = slots, checks.choice("noise", noise, NOISES)
        self.sigma = checks.number("sigma", sigma, above=0)
        self.kl_weight = checks.number("kl_weight", kl_weight, above=0)
        self.aux_losses: dict[str, Tensor] = {}
        if noise == "learned":
            dim: int = slots.dim  # type: ignore[assignment]
            self.spread = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        slots: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Follow the slots through the frames.

        Args:
            x: Inputs, (B, T, N, D_in).
            slots: Those of the first frame (B, K, D); None lets the module begin.
            mask: True at inputs that count, (B, T, N), or None.
            generator: What is drawn is drawn from it; None takes the global one.
            return_weights: Return the weights as well.

        Returns:
            Slots (B, T, K, D), and with `return_weights` the weights (B, T, N, K).

        Raises:
            ZooError: A shape does not fit.
        """
        if x.ndim != 4 or not x.shape[1]:
            raise ZooError(f"x of shape {tuple(x.shape)} must be (batch, frames >= 1, inputs, C)")
        if mask is not None and mask.shape != x.shape[:3]:
            raise ZooError(f"mask of shape {tuple(mask.shape)} must be {tuple(x.shape[:3])}")
        self.aux_losses = {}
        found: list[Tensor] = []
        weights: list[Tensor] = []
        for t in range(x.shape[1]):
            if t:
                slots = self._disturb(found[-1], generator)
            seen = None if mask is None else mask[:, t]
            out, w = self.slots(x[:, t], slots, mask=seen, generator=generator, return_weights=True)
            found.append(out)
            weights.append(w)
        y = torch.stack(found, 1)
        return (y, torch.stack(weights, 1)) if return_weights else y

    def _disturb(self, slots: Tensor, generator: torch.Generator | None) -> Tensor:
        """Slots that the next frame begins with."""
        if self.noise == "none":
            return slots
        drawn = torch.randn(
            slots.shape, generator=generator, device=slots.device, dtype=slots.dtype
        )
        if self.noise == "fixed":
            return slots + self.sigma * drawn
        mean, log_var = self.spread(slots).chunk(2, -1)
        prior = 2 * math.log(self.sigma)
        ratio = (log_var - prior).exp() + mean.square() / self.sigma**2
        loss = self.kl_weight * 0.5 * (ratio - 1 - log_var + prior).mean()
        self.aux_losses["slot_noise"] = self.aux_losses.get("slot_noise", 0.0) + loss
        return slots + mean + (0.5 * log_var).exp() * drawn
