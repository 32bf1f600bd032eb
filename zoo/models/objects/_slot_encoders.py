"""From images to the inputs of slots: convolutions, or a small Vision Transformer.

Locatello et al. 2020 (arXiv 2006.15055), appendix on the encoder. Positions are embedded softly: a
linear map of the distances (x, y, 1 - x, 1 - y) to the four sides, x and y from 0 to 1, is added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def xavier(module: nn.Module) -> None:
    """Draw weights as the paper's framework does, Xavier uniform, and set biases to zero.

    PyTorch's own are smaller: through a few layers what slots differ in is all but lost, and a
    short training with it.

    Args:
        module: Of which all convolutions and linear layers are drawn anew.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


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
        down, along = (
            torch.linspace(0, 1, side, device=x.device, dtype=self.embed.weight.dtype)
            for side in x.shape[2:]
        )
        grid = torch.stack(torch.meshgrid(along, down, indexing="xy"), -1)  # (H, W, 2)
        return x + self.embed(torch.cat([grid, 1 - grid], -1)).permute(2, 0, 1)


class ConvEncoder(nn.Module):
    """Four convolutions of 5 x 5, positions, and an MLP on every position.

    Args:
        channels: Channels C of an image.
        width: Channels of the convolutions.
        stride: Of the first convolution: one input of the slots for so many pixels each way.
        dim: Channels of an input of the slots.
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
        xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, dim)."""
        return self.mlp(self.position(self.convs(x)).flatten(2).mT)


class TokenEncoder(nn.Module):
    """A small Vision Transformer of timm with any token mixer of the zoo, without its classifier.

    Args:
        image_shape: Channels, height and width.
        attention: Specification of its layers.
        patch: Side of a patch in pixels.
        width: Channels of a token.
        depth: Layers.
        heads: Heads.
        dim: Channels of an input of the slots.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
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
        from zoo.models.vision.hosts import vit  # brings in timm

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
        return self.out(self.vit.fc_norm(self.vit.forward_features(x)))
