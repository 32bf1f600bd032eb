"""Reasons why a route cannot take a pass, where the routes of several mechanisms share them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zoo.parts import Call, Host


def refuse_parts(host: Host, wanted: Mapping[str, str]) -> str | None:
    """Reason why a route made for certain parts cannot stand for those of a host, or None.

    Args:
        host: The layer.
        wanted: Names of parts by socket; the first one that differs is the reason.
    """
    for kind, name in wanted.items():
        found = host.part_names[kind]
        if found != name:
            return f"{kind} is {found!r}, not {name!r}"
    return None


def refuse_position(host: Host) -> str | None:
    """Reason why a route that adds nothing to the scores cannot take a host, or None."""
    if host.position.biases:
        return f"position {host.part_names['position']!r} biases the scores"
    return None


def refuse_extras(call: Call, *, mask: bool = False) -> str | None:
    """Reason why a route for the bare q, k and v cannot take a pass, or None.

    Args:
        call: The pass.
        mask: The route takes a mask.
    """
    if call.bias is not None:
        return "it takes no bias on the scores"
    if call.mask is not None and not mask:
        return "it takes no mask"
    return "it has no dropout on the weights" if call.dropout else None


def refuse_masks(call: Call) -> str | None:
    """Reason why one fused call cannot take the masks and biases of a pass, or None."""
    rows, keys = call.q.shape[2], call.k.shape[2]
    if call.causal and rows > 1:
        if not call.scale > 0:
            return f"its causal form multiplies -inf by the scale, which is {call.scale:g}"
        if rows != keys:
            return "its causal mask starts top-left, but there are cached keys"
        if call.mask is not None or call.bias is not None:
            return "it takes no mask or bias beside is_causal"
    if call.mask is not None and call.bias is not None:
        return "it takes a mask or a bias, not both"
    if call.mask is not None and call.mask.shape[2] > 1:
        return "rows of the mask may be empty"
    return None


def refuse_tracing(
    compiling: str = "its own backward is not for compilers",
    transforming: str = "torch.func cannot look into its own backward",
) -> str | None:
    """Reason why a form with a backward of its own cannot be traced right now, or None.

    Args:
        compiling: What to say to `torch.compile`.
        transforming: What to say to the transforms of `torch.func`.
    """
    if torch.compiler.is_compiling():
        return compiling
    return transforming if torch._C._are_functorch_transforms_active() else None
