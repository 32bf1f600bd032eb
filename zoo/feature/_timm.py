"""What the modules that timm provides share; timm is imported when one is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo import checks


class TimmFeature(nn.Module):
    """A module of timm on feature maps.

    Args:
        name: What timm's `get_attn` calls it.
        channels: Channels C.
        options: Its arguments by name.

    Raises:
        ZooError: There are no channels.
    """

    kind = "feature"

    def __init__(self, name: str, channels: int, options: Mapping[str, Any]) -> None:
        from timm.layers import get_attn

        super().__init__()
        make: Any = get_attn(name)
        self.inner = make(checks.whole("channels", channels), **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated map (B, C, H, W)."""
        return self.inner(x)


def check_ratio(rd_ratio: float) -> None:
    """Refuse a ratio that is none.

    Raises:
        ZooError: It is not in (0, 1].
    """
    checks.number("rd_ratio", rd_ratio, above=0, high=1)
