"""From slots back to images: every slot paints alone, or patches ask all slots.

Both return what each slot would paint, (B, K, C, H, W), and logits (B, K, H, W) whose softmax over
slots says how much of each pixel is whose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.factory import create
from zoo.models.objects._slot_encoders import SoftPosition, xavier


class BroadcastDecoder(nn.Module):
    """Every slot paints an image and a mask by itself (Watters et al. 2019, arXiv 1901.07017).

    A slot is repeated over a grid, positions are added, transposed convolutions of 5 x 5 follow,
    three or as many as there are doublings, and one of 3 x 3. With `upsample` 1 that is the
    decoder of Locatello et al. 2020 for 64 x 64 pixels. For larger images they double the sides in
    the first layers; here it is done in the last ones, where a layer costs a quarter of the next.

    Args:
        dim: Channels of a slot.
        channels: Channels C of an image.
        size: Height and width of an image.
        upsample: Sides of the image over those of the grid, a power of two.
        width: Channels of the convolutions.

    Raises:
        ZooError: `upsample` is no power of two, or does not divide the image.
    """

    def __init__(
        self, dim: int, channels: int, size: tuple[int, int], upsample: int, width: int
    ) -> None:
        super().__init__()
        if upsample & (upsample - 1) or any(side % upsample for side in size):
            pixels = f"the {size[0]} x {size[1]} pixels of the image"
            raise checks.wrong("upsample", upsample, f"a power of two that divides {pixels}")
        doublings = upsample.bit_length() - 1
        count = max(3, doublings)
        self.grid = (size[0] // upsample, size[1] // upsample)
        self.position = SoftPosition(dim)
        layers: list[nn.Module] = []
        for i in range(count):
            stride = 2 if i >= count - doublings else 1
            before = width if i else dim
            layers += [
                nn.ConvTranspose2d(before, width, 5, stride, 2, output_padding=stride - 1),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, channels + 1, 3, padding=1))
        xavier(self)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (B, K, D) to parts (B, K, C, H, W) and logits of the masks (B, K, H, W)."""
        x = slots.flatten(0, 1)[..., None, None].expand(-1, -1, *self.grid)
        x = self.layers(self.position(x)).unflatten(0, slots.shape[:2])
        return x[:, :, :-1], x[:, :, -1]


class TransformerDecoder(nn.Module):
    """Patches ask the slots what they look like, by cross-attention, all patches at once.

    Every patch has a learned query; layers of cross-attention to the slots and an MLP follow, as in
    the decoders of SLATE (Singh et al. 2021, arXiv 2110.11405) and DINOSAUR (Seitzer et al. 2022,
    arXiv 2209.14860). Theirs write one patch after the other, or reproduce features of a trained
    network; here it is pixels, in one pass, so that no attention between patches is needed. Masks
    are the weights of the last layer, mean over heads; a slot's part is what the patches would be
    if that layer saw this slot alone. So the reconstruction mixes parts like the other decoder.

    Args:
        dim: Channels of a slot.
        channels: Channels C of an image.
        size: Height and width of an image.
        patch: Side of a patch in pixels.
        width: Channels of a query.
        depth: Layers.
        heads: Heads; must divide `width`.

    Raises:
        ZooError: `patch` does not divide the image, or `heads` the width.
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
        if width % heads:
            raise ZooError(f"heads={heads} must divide width={width}")
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
        samples, count = s.shape[:2]
        x = self.queries.expand(samples, -1, -1)  # (B, N, W)
        layers = list(zip(self.norms, self.attend, self.mlps, strict=True))
        for norm, attend, mlp in layers[:-1]:
            x = x + attend(norm(x), context=s)
            x = x + mlp(x)
        norm, attend, mlp = layers[-1]
        _, weights = attend(norm(x), context=s, need_weights=True)  # (B, H, N, K)
        # Attention to a single key is that key's value, whatever the query.
        query = norm(x[:, :1]).repeat_interleave(count, 0)
        alone = attend(query, context=s.flatten(0, 1)[:, None])  # (B K, 1, W)
        y = x[:, None] + alone.unflatten(0, (samples, count))  # (B, K, N, W)
        y = self.out(y + mlp(y)).unflatten(2, self.grid)
        y = y.unflatten(-1, (self.channels, self.patch, self.patch))  # (B, K, h, w, C, p, p)
        parts = y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        least = torch.finfo(weights.dtype).tiny
        logits = weights.mean(1).clamp(min=least).log().mT.unflatten(-1, self.grid)
        return parts, F.interpolate(logits, scale_factor=self.patch, mode="nearest")
