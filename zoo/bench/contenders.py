"""What is measured: any token mixer of the zoo, and attention written by hand without a host.

A specification may name the route that its host has to take: ``cog@reference`` is the
straightforward form of ``cog``, ``cog@engine`` the strip engine's.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.host.attention import Attention
from zoo.host.factory import create
from zoo.host.spec import canonical, parse, split
from zoo.registry import SOCKETS, list_names

HANDWRITTEN = "handwritten"


class Handwritten(nn.Module):
    """Softmax attention in four lines, the yardstick of what the host costs on top.

    Args:
        dim: Channels C.
        heads: Heads H, a divisor of `dim`.
        causal: Query i sees keys 0..i only.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # (B, H, 3, N, D)
        q, k, v = heads.unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(2))


class Core(nn.Module):
    """What a host does between its projections: from q, k and v, which are leaves, to the heads.

    Args:
        host: The host.
        x: Its input (B, N, C), from which it makes q, k and v once.

    Raises:
        ZooError: The contender is no host.
    """

    def __init__(self, host: nn.Module, x: Tensor) -> None:
        super().__init__()
        if not isinstance(host, Attention):
            raise ZooError(f"{type(host).__name__} is no host of parts and has no core")
        self.host = host
        with torch.no_grad():
            self.call = host.begin(x)
        self.leaves = nn.ParameterList(getattr(self.call, name).clone() for name in ("q", "k", "v"))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the heads (B, H, N, D); `x` only says what the pass is for."""
        q, k, v = self.leaves
        call = replace(self.call, q=q, k=k, v=v, prepared={})
        return self.host.mix(self.host.prepare(call))


def resolve(name: str) -> str:
    """Canonical spelling of a contender.

    Raises:
        ZooError: Unknown, or not something that turns (B, N, C) into (B, N, C).
    """
    if name == HANDWRITTEN:
        return name
    name, at, forced = split_route(name)
    parts = parse_or_suggest(name)
    if at and parts[0].entry.kind not in SOCKETS:
        raise ZooError(f"{name!r} is a {parts[0].entry.kind}: it has no routes to choose from")
    for part in parts:
        if part.entry.kind not in (*SOCKETS, "mixer"):
            raise ZooError(
                f"{part.name!r} is a {part.entry.kind}; bench takes token mixers (sockets and "
                f"mixers) and {HANDWRITTEN!r}"
            )
    return canonical(name) + at + forced if parts[0].entry.kind in SOCKETS else str(parts[0])


def split_route(name: str) -> tuple[str, str, str]:
    """Specification, "@" and route of a contender; the latter two are empty without a route."""
    pieces = split(name, "@")
    if len(pieces) > 2 or (len(pieces) == 2 and not pieces[1]):
        raise ZooError(f"{name!r}: a route is written SPEC@ROUTE, such as mha@engine")
    return (pieces[0], "@", pieces[1]) if len(pieces) == 2 else (name, "", "")


def parse_or_suggest(name: str) -> list[Any]:
    """Read a specification; an unknown single word is also compared with `handwritten`."""
    try:
        return parse(name)
    except ZooError:
        if name.isidentifier() and name not in list_names(name):
            raise unknown("mechanism", name, [*list_names(), HANDWRITTEN]) from None
        raise


def build(name: str, facts: dict[str, Any]) -> nn.Module:
    """Make a contender.

    Args:
        name: What `resolve` returned.
        facts: Host facts: dim, heads, causal, max_len, device, dtype.

    Raises:
        ZooError: It cannot be built with these facts.
    """
    if name == HANDWRITTEN:
        if facts["dim"] % facts["heads"]:
            raise ZooError(f"dim={facts['dim']} is not divisible by heads={facts['heads']}")
        cls: Any = Handwritten
        return cls(**{k: v for k, v in facts.items() if k in inspect.signature(cls).parameters})
    name, _, forced = split_route(name)
    entry = parse(name)[0].entry
    wanted = facts
    if entry.kind == "mixer":
        if facts["causal"] and not entry.traits.causal:
            raise ZooError(f"{entry.name!r} cannot be causal")
        if not facts["causal"] and not entry.traits.bidirectional:
            raise ZooError(f"{entry.name!r} is defined for causal mixing only")
        known = inspect.signature(entry.cls).parameters
        wanted = {key: value for key, value in facts.items() if key in known}
    module = create(name, **wanted)
    if forced:
        assert isinstance(module, Attention)
        module.route = forced
    return module


def route(module: nn.Module, x: Tensor) -> str:
    """Route that a module takes for this input; a dash for modules without routes."""
    if isinstance(module, Attention):
        return module.explain(x).route
    routes: tuple[str, ...] = getattr(module, "routes", ("-",))
    return str(getattr(module, "route", None) or routes[0])
