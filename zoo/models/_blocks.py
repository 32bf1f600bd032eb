"""The layers of the language models around their mixers: norms, short convolution, MLP.

Legend: B batch, N length, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.cache import LayerCache


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last few tokens, added to its input.

    Args:
        dim: Channels.
        kernel: Taps, the token itself included; at least 2.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        kernel: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel = kernel = checks.whole("conv", kernel, 2, also="or 0 for none")
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(B, N, C) to (B, N, C); the cache holds the last ``kernel - 1`` inputs."""
        taps = self.kernel - 1
        past = cache.get_state("short_conv") if cache is not None else None
        padded = F.pad(x, (0, 0, taps, 0)) if past is None else torch.cat([past, x], 1)
        if cache is not None:
            cache.set_state("short_conv", padded[:, -taps:])
        if not x.shape[1]:
            return x  # an empty chunk; no window of the taps lies in it
        return x + self.conv(padded.transpose(1, 2)).transpose(1, 2)


class SGLU(nn.Module):
    """Gated MLP without an activation: W_2 (W_1 x * W_3 x) (TransNormerLLM, Qin et al. 2024).

    Args:
        dim: Channels.
        hidden: Width inside.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.up = nn.Linear(dim, 2 * hidden, **made)
        self.down = nn.Linear(hidden, dim, **made)

    def activate(self, gate: Tensor) -> Tensor:
        """What one of the two factors goes through, here nothing."""
        return gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        gate, value = self.up(x).chunk(2, -1)
        return self.down(self.activate(gate) * value)


class SwiGLU(SGLU):
    """Gated MLP: W_2 (silu(W_1 x) * W_3 x) (Shazeer 2020).

    Args:
        dim: Channels.
        hidden: Width inside.
        device: Where parameters are made.
        dtype: Their type.
    """

    def activate(self, gate: Tensor) -> Tensor:
        """The SiLU of a factor."""
        return F.silu(gate)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        attn: The mixer, an `Attention` host or a whole module.
        norm: Makes a norm; one stands before the mixer, another before the MLP.
        conv: Short convolution between the first norm and the mixer, or None.
        mlp: MLP, or None.
        dropout: On both residual branches.
    """

    def __init__(
        self,
        attn: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        conv: ShortConv | None = None,
        mlp: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm()
        self.conv = conv
        self.attn = attn
        self.norm2 = norm() if mlp is not None else None
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        y = self.norm1(x)
        if self.conv is not None:
            if mask is not None and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
                # Padding must not reach real tokens through the taps either.
                y = y * mask[:, 0, 0, -x.shape[1] :, None]
            y = self.conv(y, cache)
        x = x + self.dropout(self.attn(y, mask=mask, positions=positions, cache=cache))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.dropout(self.mlp(self.norm2(x)))
        return x
