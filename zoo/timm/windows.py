"""Token mixers in the shifted windows of timm's Swin."""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer as swin
from torch import Tensor

from zoo.errors import CompatibilityError
from zoo.host.attention import Attention
from zoo.timm.tokens import TokenAttention


class WindowAttention(swin.WindowAttention):
    """A token mixer in the windows of a timm Swin, with the window's relative position bias.

    Args:
        old: The layer that it replaces.
        inner: The mixer.
    """

    def __init__(self, old: swin.WindowAttention, inner: TokenAttention) -> None:
        table = old.relative_position_bias_table
        super().__init__(
            old.dim,
            old.num_heads,
            window_size=old.window_size,
            device=table.device,
            dtype=table.dtype,
        )
        for name in ("qkv", "proj", "attn_drop", "proj_drop", "softmax"):
            delattr(self, name)  # timm's computation, which `inner` does instead
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix each window by itself.

        Args:
            x: (B * windows, N, C), the windows of an image in a row.
            mask: (windows, N, N), 0 where a pair may meet and -100 where it may not, or None.
        """
        if mask is not None:
            # A hidden pair, not a score lowered by 100: only a softmax takes one for the other.
            mask = (mask == 0).repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        return self.inner.attend(x, mask, self._get_rel_pos_bias())


def check_window(attn: TokenAttention, block: Any) -> None:
    """Refuse a mixer that cannot keep what Swin adds to its scores."""
    traits = attn.mixer.traits if isinstance(attn.mixer, Attention) else None
    if traits is None or not traits.bias:
        raise CompatibilityError(
            f"{attn.spec!r} forms no scores that Swin's relative position bias could be added to; "
            "choose a mechanism with the trait bias, or a ViT"
        )
    if any(block.shift_size) and traits.mask != "any":
        raise CompatibilityError(
            f"{attn.spec!r} takes no mask between pairs, which Swin's shifted windows need; "
            "choose a mechanism with the trait mask='any', or a ViT"
        )
