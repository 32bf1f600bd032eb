"""Token mixers in the transformers of timm whose layers are told more than tokens.

    VisionTransformerRelPos, Beit    a bias (1, H, N, N) on the scores, from a module or a table
    Eva                              angles that turn q and k, (N - prefix, 2 D): sin, then cos

The bias is handed to the mixer; the turning is a position part, `GivenRope`, that the mixer gets
for its socket, so the spec must leave this socket free.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from zoo.errors import CompatibilityError, ZooError
from zoo.host.attention import Attention
from zoo.host.spec import parse
from zoo.parts import Position
from zoo.registry import SOCKETS
from zoo.timm.tokens import TokenAttention


class RelPosAttention(relpos.RelPosAttention):
    """A token mixer with the position bias of timm's VisionTransformerRelPos.

    Args:
        old: The layer that it replaces.
        inner: The mixer.
    """

    def __init__(self, old: relpos.RelPosAttention, inner: TokenAttention) -> None:
        nn.Module.__init__(self)
        self.num_heads = old.num_heads
        self.rel_pos = old.rel_pos
        self.inner = inner

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Mix x (B, N, C) with the layer's own bias, or else the one that layers share."""
        rel_pos: Any = self.rel_pos
        bias = shared_rel_pos if rel_pos is None else rel_pos.get_bias()
        return self.inner.attend(x, None, _rank4(bias))


class BeitAttention(beit.Attention):
    """A token mixer with the position bias of timm's Beit.

    Args:
        old: The layer that it replaces.
        inner: The mixer.
    """

    def __init__(self, old: beit.Attention, inner: TokenAttention) -> None:
        nn.Module.__init__(self)
        self.num_heads = old.num_heads
        for name in ("q_bias", "k_bias", "v_bias"):  # what `reset_parameters` looks at
            setattr(self, name, None)
        self.window_size = old.window_size
        self.relative_position_bias_table = old.relative_position_bias_table
        if old.window_size is not None:
            self.num_relative_distance = old.num_relative_distance
        index = old.relative_position_index
        self.register_buffer("relative_position_index", index, persistent=False)
        self.inner = inner

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Mix x (B, N, C) with the sum of the layer's bias and the one that layers share."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.inner.attend(x, None, _rank4(bias))


def _rank4(bias: Tensor | None) -> Tensor | None:
    """(H, N, N), as shared tables give it, to (1, H, N, N)."""
    return bias[None] if bias is not None and bias.ndim == 3 else bias


class RotaryAttention(nn.Module):
    """A token mixer whose q and k are turned by the angles of timm's Eva.

    Args:
        inner: The mixer; its position is a `GivenRope` if the model has angles.
    """

    def __init__(self, inner: TokenAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix x (B, N, C); see `TokenAttention.forward`.

        Args:
            x: Tokens.
            rope: Sines and cosines (N - prefix, 2 D), or with leading axes that broadcast to
                (B, H), or None.
            attn_mask: As for a `TokenAttention`.
            is_causal: As for a `TokenAttention`.
        """
        if rope is None:
            return self.inner(x, attn_mask, is_causal)
        position = getattr(self.inner.mixer, "position", None)
        if not isinstance(position, GivenRope):
            raise ZooError(f"{self.inner.spec!r} was put where no angles were given, but now are")
        position.table = rope
        try:
            return self.inner(x, attn_mask, is_causal)
        finally:
            position.table = None  # it may hold a graph, which no copy of the model should meet


class GivenRope(Position):
    """Turns q and k by angles that the model hands to each layer.

    Args:
        prefix: Tokens in front that are not turned.
        rotate_half: Pairs are (i, i + D / 2) instead of neighbours.
    """

    rotates = True

    def __init__(self, prefix: int = 0, rotate_half: bool = False) -> None:
        super().__init__()
        self.prefix, self.rotate_half = prefix, rotate_half
        self.table: Tensor | None = None

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """See `Position.rotate`."""
        return self._turn(q), self._turn(k)

    def _turn(self, x: Tensor) -> Tensor:
        if self.table is None:
            return x
        turned = apply_rot_embed_cat(x[:, :, self.prefix :], self.table, half=self.rotate_half)
        if not self.prefix:
            return turned.type_as(x)
        return torch.cat([x[:, :, : self.prefix], turned.type_as(x)], 2)


def rotary_spec(spec: str, model: Any, old: Any) -> str:
    """Add the position of an Eva to a spec.

    Raises:
        CompatibilityError: The mixer has no queries and keys, or a position of its own.
    """
    parts = parse(spec)
    if parts[0].entry.kind not in SOCKETS:
        raise CompatibilityError(
            f"{spec!r} has no queries and keys, which {type(model).__name__} turns by its rotary "
            "positions; choose a mechanism with heads, or a ViT without them"
        )
    taken = [part.name for part in parts if part.entry.kind == "position"]
    if taken:
        raise CompatibilityError(
            f"{taken[0]!r}: {type(model).__name__} has rotary positions of its own, which stay; "
            "leave the position out of the spec"
        )
    if isinstance(old, RotaryAttention):
        told: Any = old.inner.mixer.position
        prefix, half = told.prefix, told.rotate_half
    else:
        prefix, half = old.num_prefix_tokens, getattr(old, "rotate_half", False)
    return f"{spec}+{__name__}:GivenRope(prefix={prefix}, rotate_half={half})"


def check_rotary(attn: TokenAttention, model: Any) -> None:
    """Refuse heads that a model's angles do not fit.

    Raises:
        CompatibilityError: The heads of q and k are of another width, or share angles that are
            not the same for all heads.
    """
    host = attn.mixer
    assert isinstance(host, Attention)
    whose = f"the rotary positions of {type(model).__name__}"
    if host.layout.qk_dim != host.head_dim:
        raise CompatibilityError(
            f"{attn.spec!r} has q and k of width {host.layout.qk_dim}, but {whose} turn heads of "
            f"width {host.head_dim}"
        )
    if getattr(model, "rope_mixed", False) and not (
        host.layout.score_heads == host.layout.k_heads == host.heads
    ):
        raise CompatibilityError(
            f"{attn.spec!r} has {host.layout.k_heads} key heads for {host.heads} heads, but "
            f"{whose} are others for each head; choose a mechanism with as many key heads"
        )


def check_bias(attn: TokenAttention, model: Any) -> None:
    """Refuse a mixer that cannot keep what a model adds to its scores.

    Raises:
        CompatibilityError: It has no trait bias.
    """
    traits = attn.mixer.traits if isinstance(attn.mixer, Attention) else None
    if traits is None or not traits.bias:
        raise CompatibilityError(
            f"{attn.spec!r} forms no scores that the relative position bias of "
            f"{type(model).__name__} could be added to; choose a mechanism with the trait bias, "
            "or a ViT without it"
        )
