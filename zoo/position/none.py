"""No positions (NoPE): order is known through causality alone.

Bidirectional attention without positions is permutation equivariant; a causal decoder can still
count its predecessors (Kazemnejad et al. 2023).
"""

from __future__ import annotations

from zoo.parts import Position
from zoo.registry import Paper, Taxonomy, register


@register(
    "none",
    kind="position",
    paper=Paper(
        "The Impact of Positional Encoding on Length Generalization in Transformers",
        2023,
        "2305.19466",
    ),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
    ),
    aliases=("nope",),
)
class NoPosition(Position):
    """Leaves queries, keys and scores as they are."""
