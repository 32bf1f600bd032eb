"""T5's relative position bias (Raffel et al. 2019, section 2.1; bucketing as in the released code).

    s_ij <- s_ij + E[bucket(i - j), h],    E (buckets, H), learned

Causal attention gives all buckets to the past. Bidirectional attention gives one half to keys at or
before the query and the other half to keys behind it. Of the n buckets of a side the first
x = n // 2 hold one distance each, and the rest grow logarithmically up to `max_distance`:

    bucket(d) = d                                              d < x
                min(n - 1, x + floor((n - x) ln(d / x) / ln(max_distance / x)))   otherwise

with the logarithm in float32, as released, which decides the distances that fall on an edge. Of
the half for later keys the first bucket (distance 0) is never met.
Parameters buckets * H, cost N * M.

Differences: T5 leaves 1/sqrt(D) out of its scores and puts it into the initialisation of W_Q; here
the bias joins scores that are scaled, as everywhere in the zoo (``scale=1.0`` of the host restores
T5). T5 has one table for all layers, here each layer has its own. Entries start from a normal
distribution of standard deviation C^(-1/2), as in the Transformers library. T5's cross-attention
has no bias; here it has the bidirectional one. Where two maps of scores make one head (differential
attention) both take that head's column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.parts import Call, Layout, Position, Strip
from zoo.registry import Paper, Taxonomy, Traits, register


def t5_buckets(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Bucket of each distance.

    Args:
        distance: Query position minus key position, int64, any shape.
        buckets: Number of buckets.
        max_distance: Distance from which on all share the last bucket.
        causal: All buckets for the past; keys behind the query fall into bucket 0.
    """
    side = buckets if causal else buckets // 2
    exact = side // 2
    past = distance.clamp(min=0) if causal else distance.abs()
    grown = (past.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (grown * (side - exact)).long()).clamp(max=side - 1)
    found = torch.where(past < exact, past, far)
    return found if causal else found + side * (distance < 0)


def t5_reference(
    scores: Tensor, table: Tensor, q_pos: Tensor, k_pos: Tensor, max_distance: int, causal: bool
) -> Tensor:
    """Scores with the bias looked up for every pair.

    Args:
        scores: (B, H, N, M).
        table: (buckets, H).
        q_pos: (N,).
        k_pos: (M,).
        max_distance: Distance from which on all share the last bucket.
        causal: As in `t5_buckets`.
    """
    distance = q_pos[:, None] - k_pos
    return scores + table[t5_buckets(distance, len(table), max_distance, causal)].permute(2, 0, 1)


@register(
    "t5",
    kind="position",
    paper=Paper(
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        2019,
        "1910.10683",
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
        trainable_params=True,
    ),
    parameters="buckets * heads",
)
class T5Bias(Position):
    """A learned bias on the scores for each head and logarithmic bucket of distances.

    Args:
        dim: Channels, for the initialisation.
        layout: Head counts.
        causal: Buckets for the past only.
        buckets: Rows of the table: at least 2, bidirectional an even number of at least 4.
        max_distance: Distance in tokens from which on all share the last bucket.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: `buckets` or `max_distance` is impossible.
    """

    biases = True
    static = True
    special_init = True

    def __init__(
        self,
        dim: int,
        layout: Layout,
        causal: bool,
        buckets: int = 32,
        max_distance: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if causal:
            buckets = checks.whole("buckets", buckets, 2, of="t5", also="where causal=True")
        else:
            also = "as many for each side (bidirectional)"
            buckets = checks.multiple("buckets", buckets, 2, 4, of="t5", also=also)
        exact = (buckets if causal else buckets // 2) // 2
        also = f"since with buckets={buckets} distances below {exact} have their own"
        max_distance = checks.whole("max_distance", max_distance, exact + 1, of="t5", also=also)
        self.layout, self.causal = layout, causal
        self.buckets, self.max_distance = buckets, max_distance
        self.std = dim**-0.5
        self.table = nn.Parameter(torch.empty(buckets, layout.heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a normal distribution of standard deviation dim^(-1/2)."""
        nn.init.normal_(self.table, std=self.std)

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """The bias of every distance that matters, (score_heads, 2 * max_distance + 1)."""
        reach = self.max_distance
        distances = torch.arange(-reach, reach + 1, device=self.table.device)
        rows = self.table[t5_buckets(distances, self.buckets, reach, self.causal)]
        maps = self.layout.score_heads // self.layout.heads
        return {"values": rows.t().repeat_interleave(maps, 0)}

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        """Scores (B, score_heads, R, M) with the term, or the term (B|1, score_heads, R, M)."""
        values = strip.prepared("position")["values"]
        distance = strip.distance()
        index = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        # One flat index for all heads: several times as fast as indexing by a matrix.
        term = values.index_select(1, index.flatten()).view(len(values), *index.shape)
        term = term[None] if distance.ndim == 2 else term.squeeze(2).transpose(0, 1)
        return term if scores is None else scores + term

    def extra_repr(self) -> str:
        """Size of the table."""
        return f"buckets={self.buckets}, max_distance={self.max_distance}, causal={self.causal}"
