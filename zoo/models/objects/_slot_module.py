"""The slots inside a model: built from a specification, and what they draw from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.factory import create
from zoo.host.spec import parse

SEED = 0
"""Of what is drawn outside training."""


def slot_module(
    spec: str,
    dim_in: int,
    dim: int,
    slots: int,
    *,
    iterations: int | None = None,
    hidden: int | None = None,
) -> nn.Module:
    """Build a module of kind "slots" from its specification.

    Args:
        spec: Such as "slot", "slot(normalizer=sinkhorn)", "mesh" or a dotted path.
        dim_in: Channels of the inputs.
        dim: Channels of a slot.
        slots: Slots K.
        iterations: Rounds; None leaves them to the specification.
        hidden: Width of its MLPs; None leaves it to the specification.

    Raises:
        ZooError: It is of another kind, an option is wrong, or given twice.
    """
    parts = parse(spec)
    if parts[0].entry.kind != "slots":
        raise ZooError(f"attention={spec!r} is of kind {parts[0].entry.kind!r}; allowed: 'slots'")
    options = {"iterations": iterations, "hidden": hidden}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name in parts[0].options:
            raise ZooError(f"{name!r} is an option of the model and of attention={spec!r}; say one")
    return create(spec, dim_in, dim, slots, **given)


def slot_count(slots: int | None, max_objects: int, background: int) -> int:
    """Return the number of slots K.

    Args:
        slots: What was asked for; None takes as many as there may be objects, and `background`.
        max_objects: Most objects of an example.
        background: Slots for what is no object.

    Raises:
        ZooError: There are fewer slots than objects.
    """
    checks.whole("max_objects", max_objects)
    count = max_objects + background if slots is None else slots
    checks.whole("slots", count)
    if count < max_objects:
        more = f", better {max_objects + background} with one for the background"
        raise ZooError(
            f"slots={count} cannot hold the max_objects={max_objects} objects of the data; "
            f"allowed: at least {max_objects}{more if background else ''}"
        )
    return count


def chance(module: nn.Module, like: Tensor) -> torch.Generator | None:
    """Return what slots are drawn from: the global generator in training, one seed outside.

    Evaluation then gives the same figures every time, and leaves the random numbers of training
    as they were.

    Args:
        module: The model.
        like: A tensor on the device where they are drawn.
    """
    if module.training or like.is_meta:
        return None
    return torch.Generator(like.device).manual_seed(SEED)
