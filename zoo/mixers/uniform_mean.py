"""Uniform mean: every token gets the average of all values that it may see.

    causal          y_i = W_O (1 / i) sum_{j <= i} W_V x_j           i = 1 .. N
    bidirectional   y_i = W_O (1 / N) sum_j W_V x_j                  the same for all i

What attention would do with equal weights, so a floor for mechanisms that choose: context is
there, but nothing depends on content. The causal form is the averaging of Zhang, Xiong, Su 2018,
"Accelerating Neural Transformer via an Average Attention Network", whose feed-forward layer and
gate on top of the average are left out. Hidden tokens count neither in the sum nor in the number;
a token that sees none gets zeros. Cost N C for the mean, by a cumulative sum in float32 at least.
Parameters 2 C^2 (+ 2 C with biases), in the shapes of multi-head attention's W_V and W_O. State
while decoding: the sum (C) and the number of tokens seen.
"""

from __future__ import annotations

from torch import Tensor

from zoo.cache import LayerCache
from zoo.mixers._base import ValueMixer
from zoo.parts import widen
from zoo.registry import Paper, Taxonomy, Traits, register


def uniform_mean_reference(v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Attention with equal weights over all keys that are not hidden.

    Args:
        v: Values, (B, N, C).
        causal: Only keys up to the query.
        mask: True at tokens that may be seen, (B, N), or None.
    """
    weights = v.new_ones(len(v), v.shape[1], v.shape[1])
    if causal:
        weights = weights.tril()
    if mask is not None:
        weights = weights * mask[:, None]
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1)) @ v


@register(
    "uniform_mean",
    kind="mixer",
    paper=Paper(
        "Accelerating Neural Transformer via an Average Attention Network", 2018, "1805.00631"
    ),
    traits=Traits(cross=False, mask="keys", bias=False, weights=False, grouped=False, cost="N * D"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="none",
        distribution="none",
        complexity="linear",
        trainable_params=True,
    ),
    parameters="2 * dim ** 2 + 2 * dim * bias",
)
class UniformMean(ValueMixer):
    """Running mean of the values, or their mean over the whole sequence.

    Args:
        dim: Channels C.
        heads: Heads that dropout draws for separately; they must divide `dim`.
        causal: Only tokens up to the own one.
        bias: Biases in the projections.
        dropout: On whole values of a head, so on a token's weight for all others, in training.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size does not fit.
    """

    name = "uniform_mean"

    def mix(self, x: Tensor, seen: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Average the values; the cache keeps the sum and the number of the tokens before these."""
        v = self.v(x)
        total = self.drop_values(widen(v))
        count = total.new_ones(*v.shape[:2], 1)
        if seen is not None:
            hidden = ~seen[..., None]
            total, count = total.masked_fill(hidden, 0.0), count.masked_fill(hidden, 0.0)
        if self.causal:
            total, count = total.cumsum(1), count.cumsum(1)
        else:
            total, count = total.sum(1, keepdim=True), count.sum(1, keepdim=True)
        if cache is not None:
            before = cache.get_state("sum"), cache.get_state("count")
            if before[0] is not None and before[1] is not None:
                total, count = total + before[0], count + before[1]
            cache.set_state("sum", total[:, -1:])
            cache.set_state("count", count[:, -1:])
        mean = total / count.clamp(min=1)
        return self.proj(mean.to(v.dtype).expand_as(v))
