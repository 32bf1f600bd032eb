"""The layers of RASM: attention with channel attention and a local MLP, on maps (B, C, H, W).

    CAB(z)  = z + CA(DW(PReLU(DW(z))))                 DW depthwise 3 x 3, without biases
    CA(r)   = r * sigmoid(W_2 ReLU(W_1 mean_hw(r)))    C -> C / 4 -> C
    LeFF(z) = W_2 GELU(DW(GELU(W_1 z)))                C -> 4 C -> C
    y       = x + CAB(attention(LN(x))),  out = y + LeFF(LN(y))

A layer without attention has CAB(LN(x)) in its place. Maps stay in memory with their channels last,
which norms and linear layers want, and convolutions take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """A gate for each channel from the means of all of them.

    Args:
        dim: Channels C.
        reduction: Channels over those inside.
    """

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        inside = max(1, dim // reduction)
        self.down = nn.Conv2d(dim, inside, 1, bias=False)
        self.up = nn.Conv2d(inside, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(means))))


class CAB(nn.Module):
    """Two depthwise convolutions and channel attention, added to the input.

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.act = nn.PReLU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.gate = ChannelAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return x + self.gate(self.conv2(self.act(self.conv1(x))))


class LeFF(nn.Module):
    """An MLP with a depthwise convolution in the middle.

    Args:
        dim: Channels C.
        hidden: Width inside.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        y = F.gelu(self.linear1(x)).permute(0, 3, 1, 2)
        return self.linear2(F.gelu(self.conv(y)).permute(0, 2, 3, 1))


class OnTokens(nn.Module):
    """A mixer of tokens on a map, row by row.

    Args:
        mixer: From (B, N, C) to (B, N, C).
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        tokens = x.permute(0, 2, 3, 1)
        y: Tensor = self.mixer(tokens.flatten(1, 2))
        return y.unflatten(1, tokens.shape[1:3]).permute(0, 3, 1, 2)


class RASMBlock(nn.Module):
    """A layer of RASM, with attention or without.

    Args:
        dim: Channels C.
        attn: From (B, C, H, W) to (B, C, H, W), or None.
        mlp_ratio: Width of the MLP over C.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self, dim: int, attn: nn.Module | None, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.cab = CAB(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = LeFF(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        # The paper's attention does not look at the mask; a variant of it does.
        self.takes_mask = getattr(attn, "key_mask_bias", None) is not None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, H, W); `mask` is boolean, (B, 1, H, W)."""
        y = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.attn is not None:
            # In float32 under autocast too, as in the released code.
            with torch.autocast(x.device.type, enabled=False):
                y = y.to(self.norm1.weight.dtype)
                y = self.attn(y, mask) if self.takes_mask else self.attn(y)
        x = x + self.drop_path(self.cab(y))
        y = self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.drop_path(y)
