"""Encoders and decoders around slots: from images to inputs of slots, and from slots to images.

Sizes and layers are those of Locatello et al. 2020 (arXiv 2006.15055), sections on the models and
appendix, where nothing else is said; positions are embedded softly, as Linear(4 -> C) of the
distances (x, y, 1 - x, 1 - y) to the four sides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.factory import create


class Scene(NamedTuple):
    """What an object-discovery model makes of images (B, ...) or videos (B, T, ...).

    Args:
        image: Reconstruction (..., 3, H, W).
        masks: Share of each slot at each pixel (..., K, H, W); they sum to one over the slots.
        parts: What each slot would paint (..., K, 3, H, W).
        slots: The slots (..., K, D).
    """

    image: Tensor
    masks: Tensor
    parts: Tensor
    slots: Tensor


class SoftPosition(nn.Module):
    """Adds a linear map of the distances to the four sides to a map (B, C, H, W).

    Args:
        channels: Channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map with its positions."""
        y, w = (
            torch.linspace(0, 1, side, device=x.device, dtype=x.dtype)
            for x, side in ((x, x.shape[2]), (x, x.shape[3]))
        )
        grid = torch.stack(torch.meshgrid(y, w, indexing="ij"), -1)
        return x + self.embed(torch.cat([grid, 1 - grid], -1)).permute(2, 0, 1)


class ConvEncoder(nn.Module):
    """Four convolutions of 5 x 5, positions, and an MLP on every position.

    Args:
        channels: Of the image.
        width: Of the convolutions.
        stride: Of the first convolution: every so many pixels become an input of the slots.
        dim: Channels of an input.
    """

    def __init__(self, channels: int, width: int, stride: int, dim: int) -> None:
        super().__init__()
        convs: list[nn.Module] = []
        for i in range(4):
            before = width if i else channels
            convs += [nn.Conv2d(before, width, 5, 1 if i else stride, 2), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.position = SoftPosition(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, dim)."""
        return self.mlp(self.position(self.convs(x)).flatten(2).mT)


class TokenEncoder(nn.Module):
    """A small Vision Transformer of timm with any token mixer of the zoo, without its head.

    Args:
        image_shape: Channels, height and width.
        attention: Specification of its layers.
        patch: Side of a patch in pixels.
        width: Channels of a token.
        depth: Layers.
        heads: Heads.
        dim: Channels of an input of the slots.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        attention: str,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        dim: int,
    ) -> None:
        from zoo.models.vision import vit

        super().__init__()
        self.vit = vit(
            attention,
            image_shape=image_shape,
            num_classes=1,
            patch=patch,
            dim=width,
            depth=depth,
            heads=heads,
            mlp_ratio=2.0,
        )
        self.vit.reset_classifier(0)
        self.out = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, dim)."""
        return self.out(self.vit.forward_features(x))


class BroadcastDecoder(nn.Module):
    """Every slot paints an image and a mask by itself (Watters et al. 2019, arXiv 1901.07017).

    A slot is repeated over a small grid, positions are added, and transposed convolutions of
    5 x 5 bring it to the size of the image: the first ones double the sides as often as needed.

    Args:
        dim: Channels of a slot.
        channels: Of the image.
        size: Height and width of the image.
        grid: Sides of the small grid are those of the image over `grid`, a power of two.
        width: Of the convolutions.
    """

    def __init__(
        self, dim: int, channels: int, size: tuple[int, int], grid: int, width: int
    ) -> None:
        super().__init__()
        doublings = grid.bit_length() - 1
        if grid < 1 or grid & (grid - 1) or doublings > 3 or any(side % grid for side in size):
            raise ZooError(
                f"upsample={grid} must be 1, 2, 4 or 8 and divide the image of {size[0]} x "
                f"{size[1]} pixels"
            )
        self.start = (size[0] // grid, size[1] // grid)
        self.position = SoftPosition(dim)
        layers: list[nn.Module] = []
        for i in range(3):
            stride = 2 if i < doublings else 1
            before = width if i else dim
            layers += [
                nn.ConvTranspose2d(before, width, 5, stride, 2, output_padding=stride - 1),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels + 1, 3, padding=1))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (B, K, D) to parts (B, K, C, H, W) and logits of the masks (B, K, H, W)."""
        x = slots.flatten(0, 1)[..., None, None].expand(-1, -1, *self.start)
        x = self.layers(self.position(x)).unflatten(0, slots.shape[:2])
        return x[:, :, :-1], x[:, :, -1]


class TransformerDecoder(nn.Module):
    """Patches ask the slots for what they look like, by cross-attention.

    Every patch has a learned query; layers of cross-attention to the slots (mha of the zoo) and an
    MLP follow, all patches at once. Masks are the weights of the last layer, mean over heads; a
    slot's part is what patches would be if they saw that slot alone in the last layer.

    Args:
        dim: Channels of a slot.
        channels: Of the image.
        size: Height and width of the image.
        patch: Side of a patch in pixels; must divide both.
        width: Channels of a query.
        depth: Layers.
        heads: Heads.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        size: tuple[int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        if any(side % patch for side in size):
            raise ZooError(f"patch={patch} must divide height {size[0]} and width {size[1]}")
        self.patch, self.channels = patch, channels
        self.grid = (size[0] // patch, size[1] // patch)
        self.queries = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.slots = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.attend = nn.ModuleList(create("mha", width, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels * patch**2))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (B, K, D) to parts (B, K, C, H, W) and logits of the masks (B, K, H, W)."""
        s = self.slots(slots)
        x = self.queries.expand(len(s), -1, -1)
        for norm, attend, mlp in zip(
            self.norms[:-1], self.attend[:-1], self.mlps[:-1], strict=True
        ):
            x = x + attend(norm(x), context=s)
            x = x + mlp(x)
        norm, attend, mlp = self.norms[-1], self.attend[-1], self.mlps[-1]
        _, weights = attend(norm(x), context=s, need_weights=True)  # (B, H, N, K)
        # One slot at a time: attention to one key gives its value to every query.
        b, k, n = len(s), s.shape[1], x.shape[1]
        alone = attend(norm(x[:, :1]).repeat_interleave(k, 0), context=s.flatten(0, 1)[:, None])
        y = x[:, None] + alone.unflatten(0, (b, k))  # (B, K, N, W)
        y = self.out(y + mlp(y)).unflatten(2, self.grid)
        y = y.unflatten(-1, (self.channels, self.patch, self.patch))
        parts = y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        logits = weights.mean(1).clamp(min=1e-12).log().mT.reshape(b, k, *self.grid)
        assert n == self.grid[0] * self.grid[1]
        return parts, F.interpolate(logits, scale_factor=self.patch, mode="nearest")
