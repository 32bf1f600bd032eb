"""A set of vectors through slots and back: the smallest task that slots which begin equal fail.

    y = MLP(slots(MLP(x))),   (B, N, P) to (B, K, P)

Slots that begin equal stay equal in slot attention, so that all K answers are the mean of the set;
MESH (Zhang et al. 2023, arXiv 2301.13197) separates them. The task is the zoo's own.
"""

from __future__ import annotations

from torch import nn

from zoo import checks
from zoo.models import model
from zoo.models.objects._slot_module import slot_count, slot_module
from zoo.models.objects.set_prediction import SetModel


@model("set_autoencoder", kinds=("slots",), facts=("max_objects", "properties"))
def set_autoencoder(
    attention: str = "slot(init=identical)",
    *,
    max_objects: int,
    properties: int,
    slots: int | None = None,
    dim: int = 32,
    hidden: int | None = None,
    iterations: int | None = None,
    width: int = 64,
) -> SetModel:
    """Build a model that reproduces a set of vectors.

    Args:
        attention: A mechanism of kind "slots".
        max_objects: Vectors of a set.
        properties: Numbers P of a vector.
        slots: Slots K, at least `max_objects`; None takes as many.
        dim: Channels D of a slot.
        hidden: Width of the slots' MLPs; None leaves it to `attention`.
        iterations: Rounds of the slots; None leaves them to `attention`.
        width: Of the MLPs in front of and behind the slots, and of the inputs of the slots.

    Raises:
        ZooError: A size does not fit, there are fewer slots than vectors, or a name is unknown.
    """
    for name, size in {"dim": dim, "width": width, "properties": properties}.items():
        checks.whole(name, size)
    count = slot_count(slots, max_objects, background=0)
    module = slot_module(attention, width, dim, count, iterations=iterations, hidden=hidden)
    encoder, head = (
        nn.Sequential(nn.Linear(before, width), nn.ReLU(), nn.Linear(width, after))
        for before, after in ((properties, width), (dim, properties))
    )
    return SetModel(encoder, module, head, (None, properties))
