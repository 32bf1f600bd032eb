"""What a host refuses before it computes anything: sizes, shapes and types that do not fit.

Legend: B batch, N query length, M key length, H heads, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo import inputs
from zoo.cache import LayerCache
from zoo.checks import flag, number, optional, whole
from zoo.errors import ZooError
from zoo.parts import Host, check_cu_seqlens


def check_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts with their numbers in one form, unless no layer can have such."""
    found = dict(facts)
    found |= {name: whole(name, facts[name]) for name in ("dim", "heads")}
    found["depth"] = whole("depth", facts["depth"], 0)
    for name in ("head_dim", "max_len", "layers"):
        found[name] = optional(whole)(name, facts[name])
    if found["layers"] is not None and found["depth"] >= found["layers"]:
        raise ZooError(
            f"depth={found['depth']!r} is the index of a layer; it must be below "
            f"layers={found['layers']!r}"
        )
    inputs.placed(facts["device"], facts["dtype"])
    found |= {name: flag(name, facts[name]) for name in ("causal", "bias")}
    found["dropout"] = number("dropout", facts["dropout"], 0, below=1)
    return found


def check_positions(positions: Tensor, name: str, samples: int, length: int) -> None:
    """Refuse positions that are neither (N,) nor (B, N) int64."""
    inputs.tensor(name, positions)
    if positions.dtype != torch.int64:
        raise ZooError(f"{name} has dtype {positions.dtype}; allowed: torch.int64")
    if tuple(positions.shape) not in ((length,), (samples, length)):
        raise ZooError(
            f"{name} of shape {tuple(positions.shape)} does not fit; allowed: ({length},) or "
            f"({samples}, {length})"
        )


def check_input(
    host: Host,
    x: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Refuse arguments of `forward` that the host or its parts cannot take.

    Returns:
        The mask with all that the bias hides, and the bias without it (`inputs.split_bias`).
    """
    inputs.tensor("x", x)
    inputs.tensors(context=context, mask=mask, bias=bias)
    for name, item in (("x", x), ("context", context)):
        if item is None:
            continue
        if item.ndim != 3 or item.shape[-1] != host.dim:
            raise ZooError(
                f"{name} of shape {tuple(item.shape)} must be (batch, tokens, dim={host.dim})"
            )
        inputs.like_weights(host.module, name, item)
    if context is not None:
        if host.causal:
            raise ZooError("context given to causal attention: causality needs one sequence")
        if context.shape[0] != x.shape[0]:
            raise ZooError(f"context has batch {context.shape[0]}, but x has batch {x.shape[0]}")
    if mask is None and bias is None and context is None and not need_weights:
        return None, None
    traits = host.traits
    if context is not None and not traits.cross:
        raise ZooError(f"{host.spec!r} cannot attend to a context")
    if need_weights and not traits.weights:
        raise ZooError(f"{host.spec!r} forms no attention weights; need_weights is not possible")
    if mask is not None:
        _check_mask(mask)
    if bias is not None:
        if not bias.is_floating_point() or bias.ndim not in (2, 4):
            raise ZooError(
                f"bias of dtype {bias.dtype} and rank {bias.ndim}; allowed: floating point of "
                "rank 2 (queries, keys) or 4 (batch, heads, queries, keys)"
            )
        seen, bias = inputs.split_bias(bias)
        mask = inputs.both(mask, seen)
        if bias is not None and not traits.bias:
            raise ZooError(f"{host.spec!r} forms no scores that a bias could be added to")
    if mask is not None:
        _check_hidden(host, mask)
    return mask, bias


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ZooError(
            f"mask has dtype {mask.dtype}; allowed: torch.bool with True = may attend "
            f"(an additive mask is the argument 'bias', where entries of at most "
            f"{inputs.HIDDEN:g} hide a pair)"
        )
    if mask.ndim not in (2, 4):
        raise ZooError(
            f"mask has rank {mask.ndim}; allowed: 2 (queries, keys) or "
            "4 (batch, heads, queries, keys)"
        )


def _check_hidden(host: Host, mask: Tensor) -> None:
    """Refuse masks that the parts cannot honour."""
    found = host.traits.mask
    if found == "none":
        raise ZooError(f"{host.spec!r} takes no mask")
    if found == "keys" and not (mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1):
        raise ZooError(
            f"{host.spec!r} can hide keys only: mask must have shape (batch, 1, 1, keys), "
            f"got {tuple(mask.shape)}"
        )
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return
    counting = [part for part in host.socket_parts() if part.counts]
    if counting and inputs.begins_hidden(mask):
        name = host.part_names[counting[0].kind]
        raise ZooError(
            f"mask hides the first keys of a sample, but {name!r} counts tokens from the first "
            "one; pad on the right"
        )


def check_cache(host: Host, cache: LayerCache) -> None:
    """Refuse a cache that is not of one layer, or for parts that cannot decode."""
    inputs.layer_cache(cache)
    if not host.traits.decode:
        raise ZooError(f"{host.spec!r} cannot decode step by step; it takes no cache")


def check_packed(
    host: Host, cu_seqlens: Tensor, x: Tensor, context: Tensor | None, cache: LayerCache | None
) -> None:
    """Refuse bounds of packed sequences that are none."""
    if not host.traits.packed:
        raise ZooError(f"{host.spec!r} takes no packed sequences (cu_seqlens)")
    for name, given in (("context", context), ("cache", cache)):
        if given is not None:
            raise ZooError(f"cu_seqlens packs whole sequences; there can be no {name} beside")
    if x.shape[0] != 1:
        raise ZooError(f"x has batch {x.shape[0]}; with cu_seqlens allowed: 1, all packed")
    check_cu_seqlens(cu_seqlens, x.shape[1])


def spread(
    host: Host, given: Tensor | None, name: str, q: Tensor, k: Tensor, k_start: int
) -> Tensor | None:
    """Check a mask or bias against the scores and bring it to rank 4."""
    if given is None:
        return None
    heads, rows, keys = host.heads, q.shape[2], k.shape[2]
    x = given[None, None] if given.ndim == 2 else given
    if x.shape[3] == keys + k_start:
        x = x[..., k_start:]  # the window has let the first keys go
    wanted = (q.shape[0], heads, rows, keys)
    if any(a not in (1, b) for a, b in zip(x.shape, wanted, strict=True)):
        raise ZooError(
            f"{name} of shape {tuple(given.shape)} does not fit; allowed: "
            f"({rows}, {keys}) or anything that broadcasts to {wanted} (batch, heads, "
            "queries, keys); padding of shape (batch, keys) becomes mask[:, None, None, :]"
        )
    if x.shape[3] != keys:
        x = x.expand(-1, -1, -1, keys)
    if x.shape[1] == heads and heads != host.layout.score_heads and heads > 1:
        x = x.repeat_interleave(host.layout.score_heads // heads, 1)
    return x


def spread_gate(host: Host, gate: Tensor, y: Tensor) -> Tensor:
    """Bring a head gate to (B|1, H, N|1, 1)."""
    inputs.tensor("head_gate", gate)
    samples, heads, length, _ = y.shape
    shapes = {1: (heads,), 2: (samples, heads), 3: (samples, heads, length)}
    if shapes.get(gate.ndim) != tuple(gate.shape):
        raise ZooError(
            f"head_gate of shape {tuple(gate.shape)} does not fit; allowed: "
            f"{', '.join(str(s) for s in shapes.values())}"
        )
    if gate.ndim == 1:
        return gate[None, :, None, None]
    return gate[:, :, None, None] if gate.ndim == 2 else gate[..., None]
