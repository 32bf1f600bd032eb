"""Modules on feature maps for the blocks of timm's convolutional networks.

timm asks for such a module in two ways:

    ResNet, ResNeXt, Res2Net   attn_layer(channels, device=, dtype=)       in block_args
    EfficientNet, MobileNet    se_layer(channels, act_layer=, rd_ratio=, device=, dtype=)

The second tells what the network would give its squeeze and excitation. `rd_ratio`, the width of
the bottleneck over the channels, goes to mechanisms that have an option of this name, unless it is
set already; others refuse it with a TypeError, which is how timm finds out that it must not say it.
`act_layer` likewise, but timm says it to everyone, and a mechanism without this option has the
activations of its paper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_act_layer, get_attn
from torch import nn

from zoo.errors import ZooError, unknown
from zoo.host.attention import Attention
from zoo.registry import list_names
from zoo.timm.tokens import TokenAttention, parse_given

# timm's own modules that keep the shape of a map; "ge" is left out: it fails in timm 1.0.31.
TIMM_FEATURES = (
    *("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam"),
    *("coord", "scoord", "ela", "strip"),
)


@dataclass(frozen=True)
class FeatureFactory:
    """Builds a module on feature maps for a block of a timm network; made by `feature`.

    Args:
        make: Class, called with the channels and the options.
        options: Options.
    """

    make: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        channels: int,
        *,
        rd_ratio: float | None = None,
        act_layer: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Build the module for so many channels.

        Args:
            channels: Channels C.
            rd_ratio: Width of a bottleneck over C, for mechanisms that have one.
            act_layer: Activation of the block, for mechanisms that take it.
            device: Where parameters are made.
            dtype: Their type.

        Raises:
            TypeError: The mechanism has no option `rd_ratio`; timm tries and catches this.
        """
        known = _named(self.make)
        if rd_ratio is not None and "rd_ratio" not in known:
            raise TypeError(f"{_name(self.make)} has no option rd_ratio")
        said = {"rd_ratio": rd_ratio, "act_layer": get_act_layer(act_layer)}
        told = {k: v for k, v in said.items() if v is not None and k in known}
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if known.keys() >= made.keys():
            return self.make(channels, **{**told, **self.options}, **made)
        return self.make(channels, **{**told, **self.options}).to(**made)


def _named(make: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
    """Parameters that can be given by name."""
    found = inspect.signature(make).parameters
    return {name: p for name, p in found.items() if p.kind is not p.VAR_KEYWORD}


def _name(make: Callable[..., nn.Module]) -> str:
    return getattr(make, "__name__", str(make))


def feature(spec: str | type[nn.Module], /, **options: Any) -> FeatureFactory:
    """Make what ``block_args=dict(attn_layer=...)`` and ``se_layer=...`` of timm's models want.

    It is no class, but timm's ResNets, ResNeXts, Res2Nets, EfficientNets and MobileNets only call
    it. A Res2Net keeps its ``scale`` in `block_args` as well; say it again beside `attn_layer`.

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
    allowed = {*list(_named(make))[1:]} - {"device", "dtype"}
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
