"""Scaled dot product: s_ij = q_i . k_j / sqrt(D) (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

from torch import Tensor

from zoo.parts import Score, Strip, grouped_matmul
from zoo.registry import Paper, Taxonomy, register


@register(
    "dot",
    kind="score",
    paper=Paper("Attention Is All You Need", 2017, "1706.03762"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
    ),
)
class Dot(Score):
    """Dot product of query and key times the host's scale."""

    def forward(self, strip: Strip) -> Tensor:
        """Scores (B, score_heads, R, M); the scale goes onto q, the smaller operand."""
        return grouped_matmul(strip.q * strip.scale, strip.k.transpose(-1, -2))
