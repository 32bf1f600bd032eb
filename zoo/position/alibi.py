"""ALiBi: attention with linear biases (Press, Smith and Lewis 2021, section 3).

    s_ij <- s_ij - m_h |i - j|

on the scores after their 1/sqrt(D), and no positions anywhere else. The slope m_h of head h is
fixed. For a power of two heads it is m_h = 2^(-8h/H), h = 1 .. H. For any other H the paper's code,
followed here, takes the slopes of the largest smaller power of two n, and for the remaining heads
every other slope (the 1st, 3rd, 5th ...) of 2n heads. The paper is causal, where |i - j| = i - j;
bidirectional attention falls off equally to both sides. Where two maps of scores make one head
(differential attention) both take that head's slope. No parameters and no state: the slopes are
computed anew for each pass, so that moving or loading a model cannot lose them. The term is
computed in float32 at least, because bfloat16 cannot tell large distances apart. Cost N * M.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.ops.slopes import alibi_slopes as alibi_slopes
from zoo.parts import Call, Layout, Position, Strip
from zoo.registry import Paper, Taxonomy, Traits, register


def alibi_reference(scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Scores with the bias, head by head and row by row.

    Args:
        scores: (B, H, N, M).
        q_pos: (N,).
        k_pos: (M,).
    """
    out = scores.clone()
    for h, slope in enumerate(alibi_slopes(scores.shape[1], torch.float64).tolist()):
        for i, t in enumerate(q_pos.tolist()):
            out[:, h, i] -= slope * (t - k_pos).abs()
    return out


@register(
    "alibi",
    kind="position",
    paper=Paper(
        "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        2021,
        "2108.12409",
    ),
    traits=Traits(equivariant=False),
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
class ALiBi(Position):
    """A fixed penalty on the scores that grows linearly with distance.

    Args:
        layout: Head counts.
    """

    biases = True
    static = True

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """Minus the slope of each map of scores, (1, score_heads, 1, 1)."""
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        slopes = alibi_slopes(self.layout.heads, dtype, call.q.device)
        maps = self.layout.score_heads // self.layout.heads
        return {"slopes": -slopes.repeat_interleave(maps)[None, :, None, None]}

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        """Scores (B, score_heads, R, M) with the term, or the term (B|1, score_heads, R, M)."""
        slopes = strip.prepared("position")["slopes"]
        distance = strip.distance().abs().to(slopes.dtype)
        if scores is None:
            return distance * slopes
        return torch.addcmul(scores.to(slopes.dtype), distance, slopes)
