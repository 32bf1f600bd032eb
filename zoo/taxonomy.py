"""The words that mechanisms are described with: kinds, and the axes of a survey.

The axes are those of Chaudhari et al., "An Attentive Survey of Attention Models" (2019), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.errors import ZooError, unknown

SOCKETS = ("project", "position", "score", "select", "normalize", "combine", "attend")
KINDS = (
    *SOCKETS,
    "mixer",
    "feature",
    "slots",
    "cache",
    "parallel",
    "inference",
    "analysis",
    "model",
)

AXES: dict[str, tuple[str, ...]] = {
    "sequences": ("distinctive", "co", "self", "none"),
    "levels": ("single", "multi"),
    "positions": ("global", "local", "hard", "sparse", "none"),
    "representations": ("single", "multi_representational", "multi_dimensional"),
    "alignment": (
        *("similarity", "dot", "scaled_dot", "general", "biased_general", "activated_general"),
        *("kernel", "concat", "additive", "deep", "convolution", "location", "feature"),
        *("distance", "relational", "none"),
    ),
    "distribution": (
        *("softmax", "sparsemax", "sigmoid", "none_linear", "signed", "sinkhorn", "posterior"),
        *("hard_topk", "inherited", "none"),
    ),
    "complexity": ("quadratic", "block_sparse", "linear", "na"),
    "exact": ("yes", "no", "na"),
}
MODALITIES = ("text", "image", "video", "graph", "keypoints", "any")
NEEDS = ("rope", "alibi", "kv_cache", "pattern", "z", "distributed", "cuda", "two_sequences")
FAMILIES = (
    *("token_mixer", "positional", "cross_attention", "conv_attention", "sequence_parallel"),
    *("inference", "kv_cache", "analysis", "kernel", "system"),
)
FAMILY_OF_KIND = {
    **dict.fromkeys(SOCKETS, "token_mixer"),
    "position": "positional",
    "mixer": "token_mixer",
    "feature": "conv_attention",
    "slots": "cross_attention",
    "cache": "kv_cache",
    "parallel": "sequence_parallel",
    "inference": "inference",
    "analysis": "analysis",
    "model": "system",
}


@dataclass(frozen=True)
class Taxonomy:
    """The axes of Chaudhari et al., "An Attentive Survey of Attention Models" (2019), section 3.

    Args:
        sequences: How many sequences meet: distinctive, co, self or none.
        levels: Levels of abstraction: single or multi.
        positions: Which positions a query sees: global, local, hard, sparse or none.
        representations: What is weighted: single, multi_representational, multi_dimensional.
        alignment: The alignment function (score).
        distribution: The distribution function (normalizer).
        complexity: quadratic, block_sparse, linear or na.
        modality: What it was made for.
        needs: What it cannot run without.
        exact: Whether it reproduces softmax attention exactly (yes), approximates it (no) or
            is another function (na).
        trainable_params: Whether the part itself holds parameters.
        family: The survey's kind where it differs from the one the registry kind implies.
    """

    sequences: str
    levels: str
    positions: str
    representations: str
    alignment: str
    distribution: str
    complexity: str
    modality: tuple[str, ...] = ("any",)
    needs: tuple[str, ...] = ()
    exact: str = "na"
    trainable_params: bool = False
    family: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in AXES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise unknown(f"taxonomy {name}", value, allowed)
        for name, allowed in (("modality", MODALITIES), ("needs", NEEDS)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise unknown(f"taxonomy {name}", value, allowed)
        if self.family is not None and self.family not in FAMILIES:
            raise unknown("taxonomy family", self.family, FAMILIES)
        if self.positions == "hard" and self.distribution not in ("hard_topk", "softmax", "none"):
            raise ZooError(
                f"taxonomy distribution {self.distribution!r} does not go with positions='hard'; "
                "allowed: hard_topk, softmax, none"
            )
        if self.sequences in ("distinctive", "co") and "two_sequences" not in self.needs:
            raise ZooError(
                f"taxonomy sequences={self.sequences!r} requires needs to contain 'two_sequences'"
            )
        if (self.complexity, self.distribution, self.exact) == ("linear", "softmax", "yes"):
            raise ZooError("taxonomy: exact softmax attention of linear complexity does not exist")
        if self.family in ("sequence_parallel", "kernel"):
            self.check_exact(self.family)

    def check_exact(self, family: str) -> None:
        """Refuse an exact algorithm that is not exact.

        Args:
            family: The survey's kind, sequence_parallel or kernel.

        Raises:
            ZooError: Another distribution, or an approximation.
        """
        allowed = ("inherited", "softmax", "none_linear")
        if self.exact != "yes" or self.distribution not in allowed:
            raise ZooError(
                f"taxonomy of a {family} needs exact='yes' and distribution one of "
                f"{', '.join(allowed)}; got exact={self.exact!r}, "
                f"distribution={self.distribution!r}"
            )
