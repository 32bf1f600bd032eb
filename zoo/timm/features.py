"""Modules on feature maps for the blocks of timm's ResNets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_attn
from torch import nn

from zoo.attention import Attention
from zoo.errors import ZooError, unknown
from zoo.registry import list_names
from zoo.timm.tokens import TokenAttention, parse_given

# timm's own modules that keep the shape of a map; "ge" is left out: it fails in timm 1.0.31.
TIMM_FEATURES = (
    *("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam"),
    *("coord", "scoord", "ela", "strip"),
)


@dataclass(frozen=True)
class FeatureFactory:
    """Builds a module on feature maps for a block of a timm ResNet; made by `feature`.

    Args:
        make: Class, called with the channels and the options.
        options: Options.
    """

    make: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Build the module for so many channels."""
        made = {"device": device, "dtype": dtype}
        known = inspect.signature(self.make).parameters
        if all(name in known for name in made):
            return self.make(channels, **self.options, **made)
        return self.make(channels, **self.options).to(device=device, dtype=dtype)


def feature(spec: str | type[nn.Module], /, **options: Any) -> FeatureFactory:
    """Make what ``block_args=dict(attn_layer=...)`` of timm's ResNets wants.

    Args:
        spec: A mechanism of kind "feature", the name of one of timm's own (`TIMM_FEATURES`), or
            a class whose first argument is the number of channels.
        options: Its options.

    Raises:
        ZooError: Unknown name or option, or not a module on feature maps.
    """
    name, kind, make, given = _find(spec)
    if kind != "feature":
        names = [*list_names(kind="feature"), *TIMM_FEATURES]
        raise ZooError(
            f"{name!r} is of kind {kind!r}, but a ResNet needs a module on feature maps: "
            f"{', '.join(names)}; give it to a ViT by zoo.timm.bind"
        )
    known = list(inspect.signature(make).parameters.values())
    allowed = {p.name for p in known[1:] if p.kind is not p.VAR_KEYWORD} - {"device", "dtype"}
    for option in [*given, *options]:
        if option not in allowed:
            raise unknown(f"option of {name!r}", option, allowed)
    for option in options:
        if option in given:
            raise ZooError(f"option {option!r} is given twice, in {spec!r} and beside it")
    return FeatureFactory(make, {**given, **options})


def _find(spec: object) -> tuple[str, str, Callable[..., nn.Module], Mapping[str, Any]]:
    """Name, kind, class and options of what a user gave."""
    if isinstance(spec, type) and issubclass(spec, nn.Module):
        mixes = issubclass(spec, Attention | TokenAttention)
        return spec.__name__, getattr(spec, "kind", "mixer" if mixes else "feature"), spec, {}
    features = list_names(kind="feature")
    if isinstance(spec, str) and spec in TIMM_FEATURES and spec not in features:
        return spec, "feature", get_attn(spec), {}
    try:
        part = parse_given(spec, "feature")[0]
    except ZooError:
        if isinstance(spec, str) and spec.isidentifier():
            raise unknown("feature mechanism", spec, [*features, *TIMM_FEATURES]) from None
        raise
    return part.name, part.entry.kind, part.entry.cls, part.options
