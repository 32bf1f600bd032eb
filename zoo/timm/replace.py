"""Replace the attention of a timm model that exists already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, DiffAttention
from timm.models import beit, named_apply
from timm.models import swin_transformer as swin
from timm.models import vision_transformer_relpos as relpos
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from zoo.errors import ZooError
from zoo.host.spec import PartSpec, layout, parse
from zoo.parts import tie_layers
from zoo.registry import SOCKETS
from zoo.timm.features import TIMM_FEATURES
from zoo.timm.places import HOSTS, places, swap_features
from zoo.timm.report import Swapped, SwappedLayer
from zoo.timm.tokens import TokenAttention, bind, parse_given
from zoo.timm.variants import (
    BeitAttention,
    RelPosAttention,
    RotaryAttention,
    check_bias,
    check_rotary,
    rotary_spec,
)
from zoo.timm.weights import copy_weights, fresh
from zoo.timm.windows import WindowAttention, check_window

# Layers that can be replaced; the zoo's own are subclasses, or stand at the end.
_LAYERS = (
    *(TimmAttention, DiffAttention, swin.WindowAttention, relpos.RelPosAttention),
    *(beit.Attention, EvaAttention, AttentionRope, TokenAttention, RotaryAttention),
)
_ROTARY = (EvaAttention, AttentionRope, RotaryAttention)


def swap(
    model: nn.Module,
    spec: str | type[nn.Module] | Mapping[str, Any] | Sequence[Any],
    *,
    layers: Mapping[str, Any] | None = None,
    copy: bool = True,
    **options: Any,
) -> Swapped:
    """Put a mechanism into a timm model that exists already, in place.

    Token mixers take the place of the attention in a VisionTransformer (DeiT and the rest of its
    family), VisionTransformerRelPos, Beit, Eva or SwinTransformer. Parts with the options ``grid``
    and ``prefix`` are told the model's, unless the spec says otherwise; parts that depend on it
    are told the index of their layer. What the model adds to the scores (Swin, Beit, RelPos) or
    does to q and k (Eva) stays.

    Modules on feature maps go into the blocks of ResNet, ResNeXt, Res2Net, SKNet, SENet, RegNet,
    EfficientNet and MobileNet: in place of the gates there are, or into every block of a network
    without any. Nothing else changes there.

    Args:
        model: The model.
        spec: Specification, a layout as in `zoo.host.spec.layout`, or a list with one for each
            layer; for feature maps also what `zoo.timm.feature` takes.
        layers: Layout of layers: first, last, every, other.
        copy: Take the weights over wherever the new layer has the same: q, k, v and their norms
            where the projection is plain (keys and values as the mean of the heads that share
            them), proj where the combination is concat or weighs its heads, the bias table of a
            window; of a feature module, all if it is of the same class and settings. The rest
            starts from timm's initialisation.
        options: As in `bind` or `feature`, for every layer.

    Returns:
        What was replaced, layer by layer, and which weights were copied; ``len`` counts.

    Raises:
        ZooError: Not such a model, or a layer that cannot be replaced; nothing is changed then.
    """
    if _on_maps(spec):
        return swap_features(model, spec, layers, copy, options)
    if not isinstance(spec, str | Mapping | Sequence):
        raise ZooError(
            f"swap takes a name, not {spec!r}; allowed: a specification such as 'mha', a list of "
            "them, a layout of layers, or a class of modules on feature maps"
        )
    slots = _slots(model, spec)
    if isinstance(spec, str | Mapping):
        specs = layout(spec, len(slots), layers)
    elif layers is not None or len(spec) != len(slots):
        raise ZooError(
            f"spec={list(spec)!r} must have one entry for each of the {len(slots)} layers "
            "and excludes the argument layers"
        )
    else:
        specs = list(spec)
    new: list[nn.Module] = []
    said: list[SwappedLayer] = []
    for i, (name, block) in enumerate(slots):
        told = options
        if parse_given(specs[i], "swap")[0].entry.kind in SOCKETS:
            told = {"layers": len(slots), **options}
        attn, record = _replacement(model, name, block, specs[i], i, copy, told)
        new.append(attn)
        said.append(record)
    for (_, block), attn in zip(slots, new, strict=True):
        block.attn = attn
    tie_layers(model)
    return Swapped(tuple(said))


def _on_maps(spec: object) -> bool:
    """Whether a spec, or the first of several, is a module on feature maps."""
    if isinstance(spec, Mapping):
        spec = spec.get("default")
    elif not isinstance(spec, str) and isinstance(spec, Sequence) and spec:
        spec = spec[0]
    if isinstance(spec, type) and issubclass(spec, nn.Module):
        return not issubclass(spec, TokenAttention) and getattr(spec, "kind", "feature") not in (
            *SOCKETS,
            "mixer",
        )
    if not isinstance(spec, str):
        return False
    return spec in TIMM_FEATURES or any(part.entry.kind == "feature" for part in parse(spec))


def _slots(model: nn.Module, spec: object) -> list[tuple[str, Any]]:
    """Names of the attention layers of a transformer, and the modules that hold them as `attn`."""
    blocks = [(f"blocks.{i}", b) for i, b in enumerate(getattr(model, "blocks", ()))]
    for s, stage in enumerate(getattr(model, "layers", ())):
        known = getattr(stage, "blocks", ())
        blocks += [(f"layers.{s}.blocks.{i}", b) for i, b in enumerate(known)]
    found = []
    for name, block in blocks:
        if hasattr(block, "attns"):  # several side by side
            found += [(f"{name}.attns.{i}.attn", b) for i, b in enumerate(block.attns)]
        else:
            found.append((f"{name}.attn", block))
    attentive = any(isinstance(getattr(b, "attn", None), nn.Module) for _, b in found)
    if not found or (places(model) and not attentive):
        raise ZooError(
            f"{type(model).__name__} has no blocks with attention that {spec!r} could replace; "
            "swap puts token mixers into timm's VisionTransformer, VisionTransformerRelPos, Beit, "
            "Eva and SwinTransformer, and modules on feature maps (see zoo.timm.feature) into "
            f"{HOSTS}"
        )
    for i, (_, block) in enumerate(found):
        attn = getattr(block, "attn", None)
        if not isinstance(attn, _LAYERS):
            cls = type(attn)
            what = f"{cls.__name__} of {cls.__module__}"
            if attn is None:
                what = f"part of its {type(block).__name__}, not a module of its own"
            kinds = ", ".join(dict.fromkeys(k.__name__ for k in _LAYERS[:-2]))
            raise ZooError(
                f"attention of block {i} is {what}, which cannot be replaced; "
                f"allowed: {kinds} of timm's ViT, RelPos, Beit, Eva and Swin (version 1)"
            )
    return found


def _replacement(
    model: Any,
    name: str,
    block: Any,
    spec: str,
    depth: int,
    copy: bool,
    options: Mapping[str, Any],
) -> tuple[nn.Module, SwappedLayer]:
    old = block.attn
    window = isinstance(old, swin.WindowAttention)
    patches = getattr(model, "patch_embed", None)
    grid = old.window_size if window else getattr(patches, "grid_size", None)
    prefix = 0 if window else getattr(model, "num_prefix_tokens", 0)
    inner = getattr(old, "inner", old)
    weight = next(inner.parameters())
    arguments = _arguments(inner)
    width = arguments.pop("head_dim", None)
    full = spec
    if width is not None and parse(spec)[0].entry.kind in SOCKETS:
        options = {"head_dim": width, **options}
    if grid is not None:
        full = _place(full, tuple(grid), prefix, options)
        arguments["max_len"] = math.prod(grid) + prefix
    if isinstance(old, _ROTARY) and getattr(model, "rope", None) is not None:
        full = rotary_spec(full, model, old)
    attn = bind(full, **options)(**arguments, depth=depth, device=weight.device, dtype=weight.dtype)
    named_apply(partial(init_weights_vit_timm, needs_reset=False), attn, include_root=True)
    copied: list[str] = []
    averaged: list[str] = []
    if copy:
        copied, averaged = copy_weights(inner, attn)
    left = fresh(attn, copied + averaged)
    new = _wrapped(model, block, attn)
    if window:
        if copy:
            new.relative_position_bias_table = old.relative_position_bias_table
        (copied if copy else left).append("relative_position_bias_table")
    record = SwappedLayer(name, spec, tuple(copied), tuple(averaged), tuple(left))
    return new.train(old.training), record


def _wrapped(model: Any, block: Any, attn: TokenAttention) -> Any:
    """Give a mixer the signature of the layer whose place it takes."""
    old = block.attn
    if isinstance(old, swin.WindowAttention):
        check_window(attn, block)
        return WindowAttention(old, attn)
    if isinstance(old, relpos.RelPosAttention):
        check_bias(attn, model)
        return RelPosAttention(old, attn)
    if isinstance(old, beit.Attention):
        if old.relative_position_bias_table is not None or model.rel_pos_bias is not None:
            check_bias(attn, model)
        return BeitAttention(old, attn)
    if isinstance(old, _ROTARY):
        if getattr(model, "rope", None) is not None:
            check_rotary(attn, model)
        return RotaryAttention(attn)
    return attn


def _place(spec: str, grid: tuple[int, ...], prefix: int, given: Mapping[str, Any]) -> str:
    """Tell the grid to the parts of a spec that ask for it and were not told."""
    known = {"grid": grid, "prefix": prefix}
    parts = []
    for part in parse(spec):
        told = {}
        if "grid" not in part.options and "grid" not in given:
            told = {k: v for k, v in known.items() if k in part.entry.options and k not in given}
        parts.append(PartSpec(part.name, {**told, **part.options}))
    return "+".join(map(str, parts))


def _arguments(attn: Any) -> dict[str, Any]:
    """Arguments of a `TokenAttention` that takes the place of a layer."""
    if isinstance(attn, TokenAttention):
        found = {"dim": attn.dim, **attn.settings}
        width = getattr(attn.mixer, "head_dim", None)
    else:
        for name in ("norm", "gate"):
            extra = getattr(attn, name, None)
            if extra is not None and not isinstance(extra, nn.Identity):
                raise ZooError(f"attention with a {name!r} (scale_norm, gated) cannot be replaced")
        fused = getattr(attn, "qkv", None)
        linear = attn.q_proj if fused is None else fused
        dim = linear.in_features
        if attn.proj.out_features != dim:
            raise ZooError(
                f"attention that turns {dim} channels into {attn.proj.out_features} cannot be "
                "replaced: a mechanism of the zoo keeps the width"
            )
        norm: Any = getattr(attn, "q_norm", None)
        normed = norm is not None and not isinstance(norm, nn.Identity)
        norm_type: Callable[..., nn.Module] = type(norm)
        biased = linear.bias is not None or getattr(attn, "q_bias", None) is not None
        found = {
            "dim": dim,
            "num_heads": attn.num_heads,
            "qkv_bias": biased,
            "qk_norm": normed,
            "proj_bias": attn.proj.bias is not None,
            "attn_drop": attn.attn_drop.p,
            "proj_drop": attn.proj_drop.p,
            "norm_layer": partial(norm_type, eps=norm.eps) if normed else None,
        }
        width = linear.out_features // (1 if fused is None else 3) // attn.num_heads
    if width is not None and width * found["num_heads"] != found["dim"]:
        found["head_dim"] = width
    return found
