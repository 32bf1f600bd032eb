"""Small timm models and temporary mechanisms for the tests of the adapters to timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.errors import ZooError
from zoo.host.spec import parse
from zoo.parts import Normalize, Position, Project
from zoo.registry import SOCKETS, Taxonomy

AXES = Taxonomy("self", "single", "global", "single", "none", "none", "na")
SIZES = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "num_heads": 2}


def a_vit(attn_layer: Any = "attn", **options: Any) -> VisionTransformer:
    return VisionTransformer(**{**SIZES, "depth": 2, "attn_layer": attn_layer, **options})


def a_swin(**options: Any) -> SwinTransformer:
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_classes": 5}
    return SwinTransformer(**{**sizes, "depths": (2, 2), "num_heads": (2, 4), **options})


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


def rough(model: nn.Module) -> nn.Module:
    """Make weights large enough, and biases and norms uneven enough, for a mistake to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def needs_own_tokens(spec: str) -> bool:
    """Whether a part wants a token of its own between the others, which timm does not give."""
    entry = parse(spec)[0].entry
    if entry.kind not in SOCKETS:
        return False
    host = zoo.create(spec, dim=16, heads=2, max_len=32, causal=not entry.traits.bidirectional)
    return any(part.insert_every is not None for part in host.socket_parts())


@contextmanager
def registered(name: str, kind: str, cls: type, **options: Any) -> Iterator[None]:
    zoo.register(name, kind=kind, taxonomy=AXES, **options)(cls)
    try:
        yield
    finally:
        registry.unregister(name)


class Deep(Normalize):
    """Softmax that remembers which layer it is in."""

    def __init__(self, depth: int = 0) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.softmax(-1)


class Special(Project):
    """Keys of zero weight, an initialisation that a model must not overwrite."""

    special_init = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(dim, 3 * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.linear.weight, 0.25)
        nn.init.constant_(self.linear.bias, -1.0)

    def forward(self, x: Tensor, context: Any, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.aux_losses["test_size"] = x.square().mean()
        q, k, v = self.linear(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class OnGrid(Position):
    """Does nothing on a grid that it has to be told."""

    def __init__(self, grid: tuple[int, int] | None = None, prefix: int = 0) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix


class Mean(nn.Module):
    """A whole module: the mean of the tokens that are not hidden, scaled."""

    def __init__(self, dim: int, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        weights = torch.ones_like(x[..., :1]) if mask is None else mask[:, 0, 0, :, None].float()
        return x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True) * self.scale


class Shrink(nn.Module):
    """A module that works on a map a quarter as high and wide, and needs one."""

    kind = "feature"

    def __init__(self, channels: int, side: int = 4) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.side:
            raise ZooError(f"x of {tuple(x.shape[2:])} is smaller than side={self.side}")
        return x * nn.functional.avg_pool2d(x, self.side).mean((2, 3), keepdim=True)


class Neutral(nn.Module):
    """A residual module on feature maps whose factor starts at zero."""

    kind = "feature"
    special_init = True

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(x)


class Gate(nn.Module):
    """A module on feature maps: a gate for each channel from its own mean."""

    made: ClassVar[list[int]] = []

    def __init__(self, channels: int, slope: float = 1.0) -> None:
        super().__init__()
        self.made.append(channels)
        self.slope = slope
        self.conv = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * self.conv(x.mean((2, 3), keepdim=True)))


def a_resnet(attn_layer: Any, **options: Any) -> nn.Module:
    sizes = {"channels": (8, 16, 32, 64), "num_classes": 5, "zero_init_last": False}
    block_args = {"attn_layer": attn_layer}
    return timm.create_model("resnet10t", **{**sizes, "block_args": block_args, **options})
