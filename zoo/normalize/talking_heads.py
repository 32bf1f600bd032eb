"""Talking-heads attention (Shazeer et al. 2020): heads mix before and after the softmax.

    J  = q k^T * scale                               (B, H, N, M)
    L  = sum_g J[g] P_l[g, h]                        logits of head h from the scores of all heads
    W  = softmax over the keys of L
    W' = sum_g W[g] P_w[g, h]                        weights of head h from those of all heads
    o  = W' v

P_l, P_w (H, H) without bias: 2 H^2 parameters. Cost: 2 H multiplications per pair beside the 2 D
of attention itself; no fused softmax can do it, as the heads of a pair have to meet. Rows of W'
sum to the column sums of P_w and may hold negative weights.

The paper allows different head counts for keys, softmax and values; here all are H. Where things
are left open or differ:

- P_l and P_w start as the identity, so that training starts at multi-head attention. The
  authors' code (mesh-tensorflow) draws them with variance-scaling, as it does every projection;
  at H of 4 to 16 heads that hands each head a random blend of the others.
- The mask comes after the first mixing, as there. Where the mask differs between heads, it is
  applied once more after the second, so that a pair hidden from a head stays hidden from its
  values; with a mask shared by the heads this changes nothing.
- A position's bias is added by the host to J, before the mixing; the authors add theirs to L.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.parts import Layout, Normalize, mask_scores
from zoo.registry import Paper, Taxonomy, register


def talking_heads_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits_mix: Tensor,
    weights_mix: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Talking-heads attention line by line, any dtype.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        logits_mix: P_l, (H, H), from scores' head to softmax' head.
        weights_mix: P_w, (H, H), from softmax' head to values' head.
        mask: Boolean, True may attend, broadcastable to (B, 1, N, M), no row empty; or None.
        scale: Default 1 / sqrt(D).
    """
    scores = torch.einsum("bgnd,bgmd->bgnm", q, k) * (scale or q.shape[-1] ** -0.5)
    logits = torch.einsum("bgnm,gh->bhnm", scores, logits_mix)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = torch.einsum("bgnm,gh->bhnm", logits.softmax(-1), weights_mix)
    return weights @ v


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """Mix the heads of x (B, G, R, M) by a matrix (G, H): one product of (H, G) and (G, R M)."""
    return (matrix.to(x.dtype).t() @ x.flatten(2)).unflatten(2, x.shape[2:])


@register(
    "talking_heads",
    kind="normalize",
    paper=Paper("Talking-Heads Attention", 2020, "2003.02436"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="signed",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters="2 * heads ** 2",
    notes="the mixed weights are no distribution: they need not be positive or sum to one",
)
class TalkingHeads(Normalize):
    """Softmax between two learned mixings of the heads.

    Args:
        layout: Head counts and widths.
        device: Where parameters are made.
        dtype: Their type.
    """

    special_init = True

    def __init__(
        self,
        layout: Layout,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (layout.heads, layout.heads)
        self.logits_mix = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weights_mix = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity: each head keeps to itself."""
        nn.init.eye_(self.logits_mix)
        nn.init.eye_(self.weights_mix)

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, H, R, M)."""
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        weights = mask_scores(_mix(scores, self.logits_mix), mask).softmax(-1)
        if mask is None:
            return _mix(weights, self.weights_mix)
        # A row that is empty for one head only would hand uniform weights to the others.
        weights = _mix(weights.masked_fill(~mask, 0.0), self.weights_mix)
        return weights.masked_fill(~mask, 0.0) if mask.shape[1] > 1 else weights
