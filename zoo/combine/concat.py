"""Concatenate the heads and project: y = [o_1 ... o_H] W_O (Vaswani et al. 2017, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.parts import Combine, Layout
from zoo.registry import Paper, Taxonomy, register


@register(
    "concat",
    kind="combine",
    paper=Paper("Attention Is All You Need", 2017, "1706.03762"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="none",
        distribution="inherited",
        complexity="linear",
        trainable_params=True,
    ),
    parameters="heads * v_dim * dim + bias * dim",
)
class Concat(Combine):
    """Output projection over the concatenated heads.

    Args:
        dim: Channels.
        layout: Head counts and widths.
        bias: Add a bias.
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
        self.proj = nn.Linear(
            layout.heads * layout.v_dim, dim, bias=bias, device=device, dtype=dtype
        )

    def forward(
        self, y: Tensor, x: Tensor, prepared: Mapping[str, Any] = MappingProxyType({})
    ) -> Tensor:
        """(B, N, C) from (B, H, N, v_dim)."""
        return self.proj(y.transpose(1, 2).flatten(2))
