"""Weights that plain multi-head attention and a mechanism of the zoo have in common.

Projections are compared head by head: a weight (G, D, C) of G heads goes to G' heads of the same
width D as it is (G' = G), repeated (G divides G'), or as the mean of each group of G / G' heads in
a row (G' divides G), which is how Ainslie et al. (2023) turn the keys and values of a trained model
into shared ones. Queries are never averaged. A bias that the old layer lacks is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import DiffAttention
from torch import Tensor, nn

from zoo.combine.concat import Concat
from zoo.host.attention import Attention
from zoo.project.mha import MHA
from zoo.timm.tokens import TokenAttention


@dataclass
class Heads:
    """The projection to q, k or v: a weight (G, D, C) and a bias (G, D), or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Common:
    """What a layer has of plain multi-head attention.

    Args:
        heads: Projections by the names q, k and v; views of the parameters.
        modules: Norms of q and k and the output projection, by name.
    """

    heads: dict[str, Heads] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)


def common(attn: Any) -> Common:
    """Find the common weights of a layer of timm's or of a `TokenAttention`."""
    found = Common()
    if isinstance(attn, TokenAttention):
        host = attn.mixer
        if not isinstance(host, Attention):
            return found
        if isinstance(host.project, MHA):
            layout, qkv = host.layout, host.project.qkv
            counts = (layout.score_heads, layout.k_heads, layout.v_heads)
            found.heads = _split(qkv.weight, qkv.bias, counts, host.project.sizes)
            norms = {"q_norm": host.q_norm, "k_norm": host.k_norm}
            found.modules |= {name: norm for name, norm in norms.items() if norm is not None}
        if isinstance(host.combine, Concat):
            found.modules["proj"] = host.combine.proj
        return found
    if isinstance(attn, DiffAttention):
        return found  # its q and k are pairs, and its outputs are normed
    if getattr(attn, "qkv", None) is not None:
        weight, heads = attn.qkv.weight, attn.num_heads
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:  # BEiT and EVA: keys without a bias
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]).detach()
        found.heads = _split(weight, bias, (heads,) * 3, (len(weight) // 3,) * 3)
    else:
        groups = getattr(attn, "num_kv_heads", attn.num_heads)
        for name, count in (("q", attn.num_heads), ("k", groups), ("v", groups)):
            linear = getattr(attn, f"{name}_proj")
            (found.heads[name],) = _split(
                linear.weight, linear.bias, (count,), (len(linear.weight),)
            ).values()
    for name in ("q_norm", "k_norm", "proj"):
        module = getattr(attn, name, None)
        if module is not None and not isinstance(module, nn.Identity):
            found.modules[name] = module
    return found


def _split(
    weight: Tensor, bias: Tensor | None, counts: tuple[int, ...], sizes: tuple[int, ...]
) -> dict[str, Heads]:
    weights = weight.split(sizes)
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return {
        name: Heads(w.unflatten(0, (g, -1)), None if b is None else b.unflatten(0, (g, -1)))
        for name, w, b, g in zip("qkv", weights, biases, counts, strict=False)
    }


@torch.no_grad()
def copy_weights(old: nn.Module, new: TokenAttention) -> tuple[list[str], list[str]]:
    """Copy the weights that both layers have.

    Returns:
        Names of what was copied, and of what was averaged over groups of heads.
    """
    source, target = common(old), common(new)
    copied: list[str] = []
    averaged: list[str] = []
    for name, heads in target.heads.items():
        if name not in source.heads:
            continue
        given = source.heads[name]
        weight = _fit(given.weight, heads.weight, name)
        if weight is None:
            continue
        heads.weight.copy_(weight)
        if heads.bias is not None:
            bias = None if given.bias is None else _fit(given.bias, heads.bias, name)
            heads.bias.copy_(torch.zeros_like(heads.bias) if bias is None else bias)
        (averaged if len(heads.weight) < len(given.weight) else copied).append(name)
    for name, module in target.modules.items():
        known = source.modules.get(name)
        if known is None or (name != "proj" and name[0] not in copied + averaged):
            continue
        state = known.state_dict()
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        if {key: value.shape for key, value in state.items()} == shapes:
            module.load_state_dict(state)
            copied.append(name)
    return copied, averaged


def _fit(given: Tensor, wanted: Tensor, name: str) -> Tensor | None:
    """Bring (G, D, ...) to other heads of the same width, or return None."""
    if given.shape[1:] != wanted.shape[1:]:
        return None
    old, new = len(given), len(wanted)
    if old == new:
        return given
    if name == "q":
        return None
    if new % old == 0:
        return given.repeat_interleave(new // old, 0)
    if old % new == 0:
        return given.unflatten(0, (new, -1)).mean(1)
    return None


def fresh(new: TokenAttention, taken: list[str]) -> list[str]:
    """Names of the parameters that were not taken over."""
    known = common(new)
    covered: dict[int, str] = {}
    for name, module in known.modules.items():
        if name in taken:
            covered |= {id(p): "" for p in module.parameters()}
    left = [name for name in known.heads if name not in taken]
    if known.heads:
        mixer: Any = new.mixer
        rest = f" ({', '.join(left)})" if 0 < len(left) < len(known.heads) else ""
        if len(left) < len(known.heads):
            covered |= {id(p): rest for p in mixer.project.qkv.parameters()}
    names = []
    for name, parameter in new.named_parameters():
        said = covered.get(id(parameter), None)
        if said != "":
            names.append(name + (said or ""))
    return names
