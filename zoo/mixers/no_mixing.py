"""No mixing: every token sees its own value alone, the floor that any mixer has to beat.

    y_i = W_O W_V x_i

What attention would do with the identity as its weights: the value and output projections of
multi-head attention are kept, with the same shapes, and nothing passes between tokens. The
identity as a token mixer is the baseline of Yu et al. 2022, "MetaFormer Baselines for Vision"
(IdentityFormer), which has no projections at all; here they stay, so that a host differs from
`mha` by the mixing and W_Q, W_K only. Cost N C^2. Parameters 2 C^2 (+ 2 C with biases). No state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.cache import LayerCache
from zoo.mixers._base import ValueMixer
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
class NoMixing(ValueMixer):
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

    name = "no_mixing"

    def mix(self, x: Tensor, seen: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Project each token; a hidden one gets a zero value, and the cache only counts them."""
        v = self.drop_values(self.v(x))
        if seen is not None:
            v = v.masked_fill(~seen[..., None], 0.0)
        return self.proj(v)
