"""Which parts fit together: what a combination promises, and what it cannot be asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from zoo.errors import CompatibilityError
from zoo.host.spec import PartSpec
from zoo.parts import Host
from zoo.registry import Traits

MASKS = ("any", "keys", "none")
"""Masks that a mechanism may take, the most general first."""
# Outside the function, since no compiler reads the fields of a class.
_FLAGS = tuple(item.name for item in fields(Traits) if isinstance(item.default, bool))


def common(found: Sequence[Traits]) -> Traits:
    """What all of several parts promise.

    Args:
        found: Traits of each.
    """
    values: dict[str, Any] = {name: all(getattr(t, name) for t in found) for name in _FLAGS}
    values["mask"] = max((t.mask for t in found), key=MASKS.index)
    costs = {t.cost for t in found} - {Traits().cost}
    return Traits(**values, cost=" + ".join(sorted(costs)) or Traits().cost)


def check_causality(filled: Mapping[str, PartSpec], causal: bool) -> None:
    """Refuse a causal host of parts that see everything, and the reverse.

    Args:
        filled: The parts that were asked for, by socket.
        causal: What the host is to be.

    Raises:
        CompatibilityError: Names the part.
    """
    for part in filled.values():
        traits = part.entry.traits
        if causal and not traits.causal:
            raise CompatibilityError(
                f"{part.name!r} cannot be causal: it mixes all positions; pass causal=False"
            )
        if not causal and not traits.bidirectional:
            raise CompatibilityError(
                f"{part.name!r} is defined for causal attention only; pass causal=True"
            )


def check_groups(filled: Mapping[str, PartSpec], heads: int, kv_heads: int) -> None:
    """Refuse fewer key/value heads than a part can do with.

    Args:
        filled: The parts that were asked for, by socket.
        heads: Heads of the host.
        kv_heads: Its key/value heads.

    Raises:
        CompatibilityError: Names the part.
    """
    for part in filled.values():
        if kv_heads < heads and not part.entry.traits.grouped:
            raise CompatibilityError(
                f"{part.name!r} needs a key/value head for each query head, "
                f"but kv_heads={kv_heads} < heads={heads}"
            )


def check_parts(host: Host, filled: Mapping[str, PartSpec]) -> None:
    """Refuse parts that cannot work beside each other.

    Args:
        host: The host with its parts in place.
        filled: Those that were asked for, by socket.

    Raises:
        CompatibilityError: Names both and says why.
    """
    biased = {"position": host.position.biases}
    if host.attend is None:
        biased["select"] = host.select.biases
    for kind, biases in biased.items():
        for part in filled.values():
            if biases and not part.entry.traits.bias:
                hint = "; use a position that rotates or embeds" if kind == "position" else ""
                raise CompatibilityError(
                    f"{host.part_names[kind]!r} adds a bias to the scores, which "
                    f"{part.name!r} cannot take{hint}"
                )
    for filling in host.socket_parts():
        reason = filling.incompatible(host)
        if reason:
            raise CompatibilityError(reason)
