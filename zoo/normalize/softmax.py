"""Softmax over the keys: w_ij = exp(s_ij) / sum_j' exp(s_ij') (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.parts import Normalize, mask_scores
from zoo.registry import Paper, Taxonomy, register


@register(
    "softmax",
    kind="normalize",
    paper=Paper("Attention Is All You Need", 2017, "1706.03762"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="softmax",
        complexity="quadratic",
        exact="yes",
    ),
)
class Softmax(Normalize):
    """Positive weights that sum to one, computed in at least float32."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, H, R, M)."""
        half = scores.dtype in (torch.float16, torch.bfloat16)
        return mask_scores(scores, mask).softmax(-1, dtype=torch.float32 if half else None)
