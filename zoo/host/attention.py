"""The host: multi-head attention whose every station is a socket.

    x (B, N, C) -> project -> position -> score -> select -> normalize -> combine -> y (B, N, C)

Legend: B batch, N query length, M key length, H heads, D head dim, C channels. Between functions
always (B, H, N, D). Masks are boolean with True = may attend, as in scaled_dot_product_attention.
A query that may attend to nothing gets zeros from its heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.checks import flag, number, optional, whole
from zoo.errors import ZooError, unknown
from zoo.host import checks, engine, fit, journey, routes
from zoo.host.spec import DEFAULTS, PartSpec, canonical, parse, sockets
from zoo.parts import (
    Attend,
    Call,
    Combine,
    Layout,
    Normalize,
    Part,
    Position,
    Project,
    Score,
    Select,
    Stations,
    build,
)
from zoo.registry import SOCKETS, Traits


@dataclass
class Captured:
    """One pass of one layer, as analysis tools want it.

    Args:
        x: Input of the layer, (B, N, C).
        pattern: Attention weights, (B, heads, N, M), or None where a part forms none.
        heads: Output of each head before the output projection, (B, heads, N, v_dim).
        norm_input: Input of the norm in front of the layer, (B, N, C), where the model has one.
    """

    x: Tensor
    pattern: Tensor | None
    heads: Tensor
    norm_input: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention put together from parts.

    Args:
        dim: Channels C of input and output.
        heads: Heads H.
        spec: Parts by name, e.g. ``"sliding_window(window=64)+rope"``; empty sockets get the
            defaults mha, none, dot, all, softmax, concat.
        kv_heads: Key/value heads, a divisor of `heads`; None leaves it to the projection.
        head_dim: Width of a head; default ``dim // heads``.
        causal: Query i sees keys 0..i only.
        bias: Biases in the projections.
        dropout: On the attention weights, in training.
        qk_norm: RMSNorm over each head of q and k before positions.
        scale: Factor on dot products; default ``1 / sqrt(qk width)``.
        max_len: Longest sequence, for parts that need to know (learned positions).
        depth: Index of the layer, from 0, for parts that depend on it (differential).
        layers: Number of layers of the model, for parts that depend on it (lightning).
        route: "auto", or a route by name (sdpa, sdpa_strips, engine, dense, or a part's own).
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
        CompatibilityError: Parts that cannot work together, or with `causal`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        spec: str = "mha",
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        qk_norm: bool = False,
        scale: float | None = None,
        max_len: int | None = None,
        depth: int = 0,
        layers: int | None = None,
        route: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        facts: dict[str, Any] = {
            "dim": dim,
            "heads": heads,
            "head_dim": head_dim,
            "max_len": max_len,
            "depth": depth,
            "layers": layers,
            "causal": causal,
            "bias": bias,
            "dropout": dropout,
            "device": device,
            "dtype": dtype,
        }
        facts = checks.check_facts(facts)
        dim, heads, head_dim = facts["dim"], facts["heads"], facts["head_dim"]
        scale = optional(number, "for 1 / sqrt(width)")("scale", scale)
        flag("qk_norm", qk_norm)
        if head_dim is None:
            if dim % heads:
                near = [h for h in range(1, dim + 1) if dim % h == 0]
                best = min(near, key=lambda h: abs(h - heads))
                raise ZooError(
                    f"dim={dim} is not divisible by heads={heads}; nearest allowed heads={best}, "
                    "or give head_dim"
                )
            head_dim = dim // heads
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.causal, self.dropout = causal, facts["dropout"]
        self.spec = canonical(spec)
        filled = sockets(parse(spec))
        fit.check_causality(filled, causal)

        project = filled.get("project", PartSpec(DEFAULTS["project"]))
        kv_heads = project.options.get("kv_heads", kv_heads)
        kv_heads = optional(whole)("kv_heads", kv_heads, None, also="a divisor of heads")
        self.kv_heads = project.entry.cls.choose_kv_heads(heads, kv_heads)  # type: ignore[attr-defined]
        if not 1 <= self.kv_heads <= heads or heads % self.kv_heads:
            raise ZooError(f"kv_heads={self.kv_heads!r} must divide heads={heads}")
        facts |= {"head_dim": head_dim, "kv_heads": self.kv_heads}
        facts["layout"] = Layout(heads, heads, self.kv_heads, self.kv_heads, head_dim, head_dim)
        fit.check_groups(filled, heads, self.kv_heads)
        # The normalizer decides the head layout, so it is built before the others.
        skipped = ("score", "select", "normalize") if "attend" in filled else ()
        order = ("normalize", "attend", *(k for k in SOCKETS if k not in ("normalize", "attend")))
        for kind in order:
            part = filled.get(kind) or (PartSpec(DEFAULTS[kind]) if kind in DEFAULTS else None)
            if part is None or kind in skipped:
                setattr(self, kind, None)
                continue
            options = {k: v for k, v in part.options.items() if k in part.entry.options}
            setattr(self, kind, build(part.entry.cls, facts, options))
            if kind == "normalize":
                facts["layout"] = self.normalize.change_layout(facts["layout"])
        self.layout: Layout = facts["layout"]
        self.part_names = {
            kind: (filled[kind].name if kind in filled else DEFAULTS[kind])
            for kind in SOCKETS
            if getattr(self, kind) is not None
        }
        self.scale = self.layout.qk_dim**-0.5 if scale is None else scale
        norm: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.layout.qk_dim, eps=1e-6, **norm)
            self.k_norm = nn.RMSNorm(self.layout.qk_dim, eps=1e-6, **norm)
        self.head_gate: Tensor | None = None
        self._recorder: list[Captured] | None = None
        for filling in self.socket_parts():
            filling.attach(self)
        fit.check_parts(self, filled)
        self.route = route

    # The sockets; `attend` excludes score, select and normalize.
    project: Project
    position: Position
    score: Score
    select: Select
    normalize: Normalize
    combine: Combine
    attend: Attend | None

    @property
    def traits(self) -> Traits:
        """What this combination of parts promises: what all of them do."""
        return fit.common([PartSpec(name).entry.traits for name in self.part_names.values()])

    @property
    def route(self) -> str:
        """Route to take: "auto" or a name."""
        return self._route

    @route.setter
    def route(self, name: str) -> None:
        allowed = routes.names(self)
        if name not in allowed:
            raise unknown("route", name, allowed)
        self._route = name

    def socket_parts(self) -> list[Part]:
        """The parts in use, in the order of the sockets."""
        modules = self._modules  # several times quicker than nn.Module.__getattr__
        found = [modules.get(kind) for kind in SOCKETS]
        return [part for part in found if isinstance(part, Part)]

    @property
    def parts(self) -> Stations:
        """The four parts that the strip engine runs."""
        return Stations(self.score, self.select, self.normalize, self.position, self.layout.heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        cache: LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
        need_weights: bool = False,
        head_gate: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: (B, N, C).
            context: (B, M, C) for cross-attention; None for self-attention.
            mask: Boolean, True may attend, (N, M) or (B|1, H|1, N|1, M).
            bias: Added to the scores, same shapes as `mask`, floating point. Entries that can only
                be a mask, -1e4 and below (`zoo.inputs.HIDDEN`), hide their pair as `mask` does.
            positions: (N,) or (B, N) int64; default counts on from the cache.
            context_positions: (M,) or (B, M) int64; default counts from 0.
            cache: This layer's cache: x holds the tokens that follow those in it.
            cu_seqlens: Sequences packed into one sample: their first tokens and N, (S + 1,)
                integers that do not decrease. Positions start again with each, and none sees
                another.
            need_weights: Also return the weights (B, H, N, M), which costs N x M memory.
            head_gate: Factor on each head's output, (H,), (B, H) or (B, H, N).

        Raises:
            ZooError: An argument has the wrong shape or type, or a part cannot take it.
        """
        mask, bias = checks.check_input(self, x, context, mask, bias, need_weights)
        if cache is not None:
            checks.check_cache(self, cache)
        if cu_seqlens is not None:
            checks.check_packed(self, cu_seqlens, x, context, cache)
        call = journey.begin(
            self, x, context, mask, bias, positions, context_positions, cache, cu_seqlens
        )
        y = self.mix(call)
        if cache is not None:
            cache.length += x.shape[1]
        gate = self.head_gate if head_gate is None else head_gate
        if gate is not None:
            y = y * checks.spread_gate(self, gate, y)
        weights = None
        if need_weights or self.recording:
            weights = self._weights(call, strict=need_weights)
        if self._recorder is not None:
            self._recorder.append(Captured(x, weights, y))
        out = self.combine(y, x, call.prepared.get(self.combine.kind, {}))
        if not need_weights:
            return out
        assert weights is not None
        return out, weights

    def begin(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        cache: LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Call:
        """Go as far as the scores: what a route is given, for benchmarks and tests of parts.

        Takes the arguments of `forward`.
        """
        mask, bias = checks.check_input(self, x, context, mask, bias, False)
        return journey.begin(
            self, x, context, mask, bias, positions, context_positions, cache, cu_seqlens
        )

    def prepare(self, call: Call) -> Call:
        """Let the parts prepare a pass, whose q, k and v are what they should be."""
        return journey.prepare(self, call)

    def mix(self, call: Call) -> Tensor:
        """Outputs of the heads, (B, heads, N, v_dim), of a prepared pass."""
        if self.recalls(call.cache):
            y = self.normalize.recall(self, call)
        else:
            y = routes.choose(self, call).run(self, call)
        y = self.project.finish(y)
        return y if self.attend is not None else self.normalize.finish(y)

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self

    @property
    def recording(self) -> bool:
        """Whether passes are captured."""
        return self._recorder is not None

    def recalls(self, cache: LayerCache | None) -> bool:
        """Whether the normalizer keeps the memory itself."""
        return cache is not None and self.attend is None and self.normalize.recalls

    def explain(
        self, x: Tensor, context: Tensor | None = None, **inputs: Any
    ) -> routes.Explanation:
        """Say which route `forward` would take for these inputs, and why not the others.

        Takes the arguments of `forward`; a cache is left as it is.
        """
        inputs.pop("need_weights", None)
        inputs.pop("head_gate", None)
        cache = inputs.pop("cache", None)
        names = ("mask", "bias", "positions", "context_positions", "cu_seqlens")
        for name in inputs:
            if name not in names:
                raise unknown("argument of explain", name, (*names, "cache"))
        mask, bias, positions, others, cu_seqlens = (inputs.get(name) for name in names)
        mask, bias = checks.check_input(self, x, context, mask, bias, False)
        if cache is not None:
            checks.check_cache(self, cache)
        if cu_seqlens is not None:
            checks.check_packed(self, cu_seqlens, x, context, cache)
        if self.recalls(cache):
            name = self.part_names["normalize"]
            return routes.Explanation(f"{name} (recall)", {}, ())
        losses = [(part, dict(part.aux_losses)) for part in self.socket_parts()]
        with torch.no_grad():
            held = None if cache is None else cache.copy()
            call = journey.begin(self, x, context, mask, bias, positions, others, held, cu_seqlens)
        for part, before in losses:  # those of the latest forward pass are still to be added up
            part.aux_losses = before
        return routes.explain(self, call)

    @contextmanager
    def capture(self) -> Iterator[list[Captured]]:
        """Record input, pattern and per-head output of every pass inside the block."""
        before, self._recorder = self._recorder, []
        try:
            yield self._recorder
        finally:
            self._recorder = before

    def init_weights(self) -> None:
        """Initialise what the parts define specially, again: models call it after their own init.

        timm calls a method of this name on every module, after its children.
        """
        for part in self.socket_parts():
            if part.special_init:
                part.reset_parameters()

    def _weights(self, call: Call, strict: bool) -> Tensor | None:
        if self.recalls(call.cache):
            if strict:
                raise ZooError(f"{self.spec!r} forms no weights while it recalls from a cache")
            return None
        if self.attend is None:
            return engine.weights(self.parts, call)
        if strict or self.traits.weights:
            return self.attend.weights(call)
        return None

    def extra_repr(self) -> str:
        """Spec and sizes."""
        return f"{self.spec!r}, dim={self.dim}, heads={self.heads}, causal={self.causal}"
