"""No mixing: every token sees its own value alone, the floor that any mixer has to beat.

    y_i = W_O W_V x_i

What attention would do with the identity as its weights: the value and output projections of
multi-head attention are kept, with the same shapes, and nothing passes between tokens. The
identity as a token mixer is the baseline of Yu et al. 2022, "MetaFormer Baselines for Vision"
(IdentityFormer), which has no projections at all; here they stay, so that a host differs from
`mha` by the mixing and W_Q, W_K only. Cost N C^2. Parameters 2 C^2 (+ 2 C with biases). No state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.mixers._base import check_input, check_sizes
from zoo.registry import Paper, Taxonomy, Traits, register


def no_mixing_reference(v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention with identity weights.

    Args:
        v: Values, (B, N, C).
        mask: True at tokens that may be seen, (B, N), or None.
    """
    weights = torch.eye(v.shape[1], dtype=v.dtype, device=v.device).expand(len(v), -1, -1)
    if mask is not None:
        weights = weights * mask[:, None]
    return weights @ v


@register(
    "no_mixing",
    kind="mixer",
    paper=Paper("MetaFormer Baselines for Vision", 2022, "2210.13452"),
    traits=Traits(cross=False, mask="keys", bias=False, weights=False, grouped=False, cost="N * D"),
    taxonomy=Taxonomy(
        sequences="none",
        levels="single",
        positions="none",
        representations="single",
        alignment="none",
        distribution="none",
        complexity="linear",
        trainable_params=True,
    ),
    parameters="2 * dim ** 2 + 2 * dim * bias",
)
class NoMixing(nn.Module):
    """The values of multi-head attention, each token keeping its own.

    Args:
        dim: Channels C.
        heads: Heads that dropout draws for separately; they must divide `dim`.
        causal: Either way: a token sees nothing but itself.
        bias: Biases in the projections.
        dropout: On the weights, so on whole values of a head, in training.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size does not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, heads, dropout)
        self.dim, self.heads, self.causal, self.dropout = dim, heads, causal, dropout
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.v = nn.Linear(dim, dim, **made)
        self.proj = nn.Linear(dim, dim, **made)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Project each token.

        Args:
            x: (B, N, C).
            mask: Boolean, True may be seen, (B|1, 1, 1, N); a hidden token gets a zero value.
            positions: Of no effect, as in a host without a position part.
            cache: Counts the tokens; nothing else is kept.

        Raises:
            ZooError: `x` or `mask` has the wrong shape or type.
        """
        seen = check_input("no_mixing", self.dim, x, mask, cache)
        v = self.v(x)
        if self.training and self.dropout:
            kept = F.dropout(v.new_ones(*v.shape[:2], self.heads, 1), self.dropout)
            v = (v.unflatten(-1, (self.heads, -1)) * kept).flatten(2)
        if seen is not None:
            v = v.masked_fill(~seen[..., None], 0.0)
        if cache is not None:
            cache.length += x.shape[1]
        return self.proj(v)
