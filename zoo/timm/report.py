"""What `swap` did, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class SwappedLayer:
    """One place of a model and what came of the weights there.

    Args:
        name: Path of the module in the model, e.g. ``"blocks.0.attn"``.
        spec: What stands there now.
        copied: Weights taken over as they were, e.g. ``("q", "k", "v", "proj")``.
        averaged: Weights taken over as the mean of a group of heads.
        fresh: Parameters that start anew.
    """

    name: str
    spec: str
    copied: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {"copied": self.copied, "averaged": self.averaged, "fresh": self.fresh}
        said = [f"{name} {', '.join(items)}" for name, items in parts.items() if items]
        return f"{self.name}: {self.spec}; " + ("; ".join(said) or "no parameters")


@dataclass(frozen=True)
class Swapped:
    """Layers that `swap` replaced, in the order of the model.

    Args:
        layers: One record for each; ``len`` counts them, and printing shows them.
    """

    layers: tuple[SwappedLayer, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[SwappedLayer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> SwappedLayer:
        return self.layers[index]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))
