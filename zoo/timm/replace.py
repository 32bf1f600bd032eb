"""Replace the attention of a timm transformer that exists already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import Attention as TimmAttention
from timm.layers import DiffAttention
from timm.models import named_apply
from timm.models import swin_transformer as swin
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from zoo.attention import Attention
from zoo.combine.concat import Concat
from zoo.errors import ZooError
from zoo.parts import Layout
from zoo.project.mha import MHA
from zoo.registry import SOCKETS
from zoo.spec import PartSpec, layout, parse
from zoo.timm.tokens import TokenAttention, bind
from zoo.timm.windows import WindowAttention, check_window


def swap(
    model: nn.Module,
    spec: str | Mapping[str, Any] | Sequence[str],
    *,
    layers: Mapping[str, Any] | None = None,
    copy: bool = True,
    **options: Any,
) -> int:
    """Replace the attention of a timm ViT or Swin that exists already.

    Parts with the options ``grid`` and ``prefix`` are told the model's, unless the spec says
    otherwise; parts that depend on it are told the index of their layer.

    Args:
        model: timm VisionTransformer or SwinTransformer (blocks with timm's attention, or with
            one that was put there before).
        spec: Specification, a layout as in `zoo.spec.layout`, or a list with one for each layer.
        layers: Layout of layers: first, last, every, other.
        copy: Take the weights over wherever the new layer has the same: qkv and the norms of q
            and k where the projection is plain mha, proj where the combination is concat, the
            bias table of a window. The rest starts from timm's initialisation.
        options: As in `bind`, for every layer.

    Returns:
        Number of layers replaced.

    Raises:
        ZooError: Not such a model, or a layer that cannot be replaced; nothing is changed then.
    """
    blocks = _blocks(model)
    if isinstance(spec, str | Mapping):
        specs = layout(spec, len(blocks), layers)
    elif layers is not None or len(spec) != len(blocks):
        raise ZooError(
            f"spec={list(spec)!r} must have one entry for each of the {len(blocks)} layers "
            "and excludes the argument layers"
        )
    else:
        specs = list(spec)
    new = []
    for i, block in enumerate(blocks):
        told = options
        if parse(specs[i])[0].entry.kind in SOCKETS:
            told = {"layers": len(blocks), **options}
        new.append(_replacement(model, block, specs[i], i, copy, told))
    for block, attn in zip(blocks, new, strict=True):
        block.attn = attn
    return len(new)


def _blocks(model: nn.Module) -> list[Any]:
    """Blocks of a ViT or a Swin in order."""
    found: list[Any] = list(getattr(model, "blocks", ()))
    for stage in getattr(model, "layers", ()):
        found += getattr(stage, "blocks", ())
    kinds = (TimmAttention, DiffAttention, TokenAttention, swin.WindowAttention)
    for i, block in enumerate(found):
        attn = getattr(block, "attn", None)
        if not isinstance(attn, kinds):
            raise ZooError(
                f"attention of block {i} is {type(attn).__name__}, which cannot be replaced; "
                f"allowed: {', '.join(kind.__name__ for kind in kinds)} of timm"
            )
    if not found:
        raise ZooError(
            f"{type(model).__name__} has no blocks with attention; swap takes timm's "
            "VisionTransformer and SwinTransformer, a ResNet takes zoo.timm.feature"
        )
    return found


def _replacement(
    model: Any, block: Any, spec: str, depth: int, copy: bool, options: Mapping[str, Any]
) -> nn.Module:
    old = block.attn
    window = isinstance(old, swin.WindowAttention)
    patches = getattr(model, "patch_embed", None)
    grid = old.window_size if window else getattr(patches, "grid_size", None)
    prefix = 0 if window else getattr(model, "num_prefix_tokens", 0)
    inner = old.inner if isinstance(old, WindowAttention) else old
    weight = next(inner.parameters())
    arguments = _arguments(inner)
    width = arguments.pop("head_dim", None)
    if width is not None and parse(spec)[0].entry.kind in SOCKETS:
        options = {"head_dim": width, **options}
    if grid is not None:
        spec = _place(spec, tuple(grid), prefix, options)
        arguments["max_len"] = math.prod(grid) + prefix
    attn = bind(spec, **options)(**arguments, depth=depth, device=weight.device, dtype=weight.dtype)
    named_apply(partial(init_weights_vit_timm, needs_reset=False), attn, include_root=True)
    if copy:
        _copy(inner, attn)
    if not window:
        return attn.train(old.training)
    check_window(attn, block)
    new = WindowAttention(old, attn)
    if copy:
        new.relative_position_bias_table = old.relative_position_bias_table
    return new.train(old.training)


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
        dim = attn.qkv.in_features
        if attn.proj.out_features != dim:
            raise ZooError(
                f"attention that turns {dim} channels into {attn.proj.out_features} cannot be "
                "replaced: a mechanism of the zoo keeps the width"
            )
        norm: Any = getattr(attn, "q_norm", None)
        normed = norm is not None and not isinstance(norm, nn.Identity)
        norm_type: Callable[..., nn.Module] = type(norm)
        found = {
            "dim": dim,
            "num_heads": attn.num_heads,
            "qkv_bias": attn.qkv.bias is not None,
            "qk_norm": normed,
            "proj_bias": attn.proj.bias is not None,
            "attn_drop": attn.attn_drop.p,
            "proj_drop": attn.proj_drop.p,
            "norm_layer": partial(norm_type, eps=norm.eps) if normed else None,
        }
        width = attn.qkv.out_features // 3 // attn.num_heads
    if width is not None and width * found["num_heads"] != found["dim"]:
        found["head_dim"] = width
    return found


def _weights(attn: nn.Module) -> dict[str, nn.Module]:
    """Modules of a layer that mean the same in every plain multi-head attention, by name."""
    found: dict[str, nn.Module] = {}
    if isinstance(attn, TokenAttention):
        host = attn.mixer
        if isinstance(host, Attention):
            h, d = host.heads, host.head_dim
            if type(host.project) is MHA and host.layout == Layout(h, h, h, h, d, d):
                found = {"qkv": host.project.qkv, "q_norm": host.q_norm, "k_norm": host.k_norm}  # type: ignore[dict-item]
            if type(host.combine) is Concat:
                found["proj"] = host.combine.proj
    elif not isinstance(attn, DiffAttention):
        names = ("qkv", "q_norm", "k_norm", "proj")
        found = {name: getattr(attn, name, None) for name in names}  # type: ignore[misc]
    return {name: module for name, module in found.items() if module is not None}


def _copy(old: nn.Module, new: nn.Module) -> None:
    """Copy the weights that both layers have."""
    sources = _weights(old)
    for name, target in _weights(new).items():
        state = sources[name].state_dict() if name in sources else {}
        shapes = {key: value.shape for key, value in target.state_dict().items()}
        if {key: value.shape for key, value in state.items()} == shapes:
            target.load_state_dict(state)
