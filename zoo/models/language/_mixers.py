"""From the specifications of the layers to their mixers and the positions of the embedding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from zoo.errors import ZooError
from zoo.host.factory import create
from zoo.host.spec import DEFAULTS, PartSpec, parse, without
from zoo.parts import Part, Position, build
from zoo.registry import info


def split_positions(specs: Sequence[str], position: str) -> tuple[list[str], PartSpec | None]:
    """Fill in the default position and take out the one that embeds.

    Positions are added to the embeddings once for all layers, so every layer that embeds has to
    agree on the part.

    Args:
        specs: Specification of each layer.
        position: Position part for every specification that names none.

    Returns:
        The specifications of the layers' mixers, and the part that embeds, if any does.

    Raises:
        ZooError: `position` is no position part, or layers disagree.
    """
    default = parse(position)
    if len(default) != 1 or default[0].entry.kind != "position":
        raise ZooError(f"position={position!r} must be one position part, e.g. 'rope'")
    rest: list[str] = []
    found: dict[str, PartSpec] = {}
    for spec in specs:
        whole = parse(spec)[0].entry.kind == "mixer"
        bare, part = (spec, None) if whole else without(spec, "position")
        part = part or default[0]
        embeds = issubclass(part.entry.cls, Position) and part.entry.cls.embeds
        if embeds:
            found[str(part)] = part
            rest.append(bare)
        else:
            rest.append(bare if whole or part.name == DEFAULTS["position"] else f"{bare}+{part}")
    if len(found) > 1:
        names = " and ".join(repr(name) for name in found)
        raise ZooError(f"layers disagree on the positions of the embedding: {names}")
    return rest, next(iter(found.values()), None)


def make_mixers(
    specs: Sequence[str], facts: Mapping[str, Any], only: Mapping[str, Any], max_len: int
) -> list[nn.Module]:
    """Make the mixer of every layer.

    Args:
        specs: Specification of each layer.
        facts: Options of all mixers.
        only: Options that a whole module may lack; a value other than None, 0 and False is then
            refused.
        max_len: Longest sequence.

    Raises:
        ZooError: A whole module is given an option that it lacks.
    """
    mixers = []
    for i, spec in enumerate(specs):
        entry = info(parse(spec)[0].name)
        told = {**only, "max_len": max_len, "depth": i, "layers": len(specs)}
        if entry.kind == "mixer":
            wanted = inspect.signature(entry.cls).parameters
            for key, value in only.items():
                if value and key not in wanted:
                    raise ZooError(
                        f"{key}={value!r}: {entry.name!r} is a whole module and has no such "
                        "option; leave it out, or use a mechanism in sockets"
                    )
            told = {key: value for key, value in told.items() if key in wanted}
        mixers.append(create(spec, **{**facts, **told}))
    return mixers


def embedding_position(
    part: PartSpec | None, dim: int, max_len: int, made: Mapping[str, Any]
) -> Position | None:
    """Make the part that adds positions to the embeddings, if there is one.

    Args:
        part: The part.
        dim: Channels C.
        max_len: Longest sequence.
        made: Device and type of its parameters.
    """
    if part is None:
        return None
    facts = {"dim": dim, "max_len": max_len, **made}
    position = build(part.entry.cls, facts, part.options)
    assert isinstance(position, Position)
    return position


def agreed(mixers: Sequence[nn.Module], name: str) -> int | None:
    """Return what the parts of all layers say that say anything.

    Args:
        mixers: The mixers of the layers.
        name: Attribute of the parts.

    Raises:
        ZooError: They disagree.
    """
    parts = [m for mixer in mixers for m in mixer.modules() if isinstance(m, Part)]
    said: set[Any] = {getattr(part, name, None) for part in parts}
    found = sorted(said - {None})
    if len(found) > 1:
        raise ZooError(f"layers disagree on {name}: {' and '.join(map(str, found))}")
    return found[0] if found else None
