"""Multi-head, grouped-query and multi-query projections.

    q = x W_Q,  k = z W_K,  v = z W_V        with z = x, or the context

H query heads of width D; G key/value heads, G dividing H. Query head h uses key/value head
``h // (H // G)`` (consecutive groups). G = H is multi-head attention (Vaswani et al. 2017), G = 1
multi-query (Shazeer 2019), anything between grouped-query attention (Ainslie et al. 2023).
Parameters (H + 2 G) D C, plus (H + 2 G) D with biases. The rows of the fused weight are q, k, v,
each head by head, as in timm. Cache 2 G D per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.errors import ZooError
from zoo.parts import Layout, Project
from zoo.registry import Paper, Taxonomy, register

_TAXONOMY = Taxonomy(
    sequences="self",
    levels="single",
    positions="global",
    representations="single",
    alignment="scaled_dot",
    distribution="softmax",
    complexity="quadratic",
    exact="yes",
    trainable_params=True,
)
_PARAMETERS = (
    "dim * (score_heads * qk_dim + k_heads * qk_dim + v_heads * v_dim)"
    " + bias * (score_heads * qk_dim + k_heads * qk_dim + v_heads * v_dim)"
)


@register(
    "mha",
    kind="project",
    paper=Paper("Attention Is All You Need", 2017, "1706.03762"),
    taxonomy=_TAXONOMY,
    parameters=_PARAMETERS,
)
class MHA(Project):
    """Linear q, k, v for every head (with `kv_heads` of the host: for groups of heads).

    Args:
        dim: Channels.
        layout: Head counts and widths.
        bias: Add biases.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        layout: Layout,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.sizes = (
            layout.score_heads * layout.qk_dim,
            layout.k_heads * layout.qk_dim,
            layout.v_heads * layout.v_dim,
        )
        self.qkv = nn.Linear(dim, sum(self.sizes), bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, context: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Project.forward`."""
        layout, rows = self.layout, self.sizes[0]
        if context is None and layout.qk_dim == layout.v_dim:
            # One view of all heads: half the fixed cost of cutting channels first.
            counts = (layout.score_heads, layout.k_heads, layout.v_heads)
            heads = self._heads(self.qkv(x), sum(counts))
            q, k, v = heads.split_with_sizes(counts, 1)
            return q, k, v
        if context is None:
            q, kv = self.qkv(x).split((rows, sum(self.sizes) - rows), -1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = self._linear(x, slice(None, rows))
            kv = F.linear(context, weight[rows:], None if bias is None else bias[rows:])
        k, v = kv.split(self.sizes[1:], -1)
        return (
            self._heads(q, layout.score_heads),
            self._heads(k, layout.k_heads),
            self._heads(v, layout.v_heads),
        )

    def queries(self, x: Tensor) -> Tensor:
        """See `Project.queries`."""
        return self._heads(self._linear(x, slice(None, self.sizes[0])), self.layout.score_heads)

    def _linear(self, x: Tensor, rows: slice) -> Tensor:
        bias = self.qkv.bias
        return F.linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, N, D)


@register(
    "gqa",
    kind="project",
    paper=Paper("GQA: Training Generalized Multi-Query Transformer Models", 2023, "2305.13245"),
    taxonomy=_TAXONOMY,
    parameters=_PARAMETERS,
)
class GQA(MHA):
    """Grouped queries: `kv_heads` key/value heads, by default a quarter of the heads."""

    @classmethod
    def choose_kv_heads(cls, heads: int, kv_heads: int | None) -> int:
        """A quarter of the heads, rounded down to a divisor, unless told otherwise."""
        if kv_heads is not None:
            return kv_heads
        return max(g for g in range(1, max(1, heads // 4) + 1) if heads % g == 0)


@register(
    "mqa",
    kind="project",
    paper=Paper("Fast Transformer Decoding: One Write-Head is All You Need", 2019, "1911.02150"),
    taxonomy=_TAXONOMY,
    parameters=_PARAMETERS,
)
class MQA(MHA):
    """Multi-query: all heads share one key/value head."""

    @classmethod
    def choose_kv_heads(cls, heads: int, kv_heads: int | None) -> int:
        """Always one.

        Raises:
            ZooError: Another number was asked for.
        """
        if kv_heads not in (None, 1):
            raise ZooError(f"mqa has kv_heads=1, not {kv_heads!r}; use 'gqa' for groups")
        return 1
