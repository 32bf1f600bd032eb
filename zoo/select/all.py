"""Every pair may meet, as far as causality and the caller's mask let it.

Plain attention (Vaswani et al. 2017, section 3.2).
"""

from __future__ import annotations

from torch import Tensor

from zoo.parts import Select, Strip
from zoo.registry import Paper, Taxonomy, register


@register(
    "all",
    kind="select",
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
class All(Select):
    """Hides nothing."""

    def allow(self, strip: Strip) -> Tensor | None:
        """None: all pairs."""
        return None
