"""What RASM is trained with (Liu, Li and Guo 2024): Charbonnier and perceptual distances.

    L         = charbonnier(p, t) + 0.001 * perceptual(p, t)              p clamped to [0, 1]
    charbonnier = mean sqrt((p - t)^2 + 1e-6)                             over all numbers
    perceptual  = sum_l w_l mean |f_l(p) - f_l(t)|                        f_l layers of VGG-19

The layers are the ReLUs behind the first convolution of each of the five stages, weighted 0.1, 0.1,
1, 1, 1. All images are (B, 3, H, W) in [0, 1], masks (B, 1, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.metrics.restoration import EPSILON, check_pair

# Modules of VGG-19 up to which a layer reaches, and the weight of its distance.
LAYERS, WEIGHTS = (2, 7, 12, 21, 30), (0.1, 0.1, 1.0, 1.0, 1.0)
# Of ImageNet, red, green and blue.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def charbonnier(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, *, epsilon: float = EPSILON
) -> Tensor:
    """Mean of ``sqrt((pred - target)^2 + epsilon)``, a smooth absolute difference.

    Args:
        pred: (B, 3, H, W).
        target: (B, 3, H, W).
        mask: Weights of the pixels, (B, 1, H, W), or None for all alike; all zero gives 0.
        epsilon: Added to the squares.

    Raises:
        ZooError: Shapes that do not fit.
    """
    check_pair(pred, target, mask)
    size = ((pred - target).square() + epsilon).sqrt()
    if mask is None:
        return size.mean()
    weights = mask.to(size.dtype)
    return (size * weights).sum() / (weights.sum() * pred.shape[1]).clamp(min=1e-12)


class Perceptual(nn.Module):
    """Weighted mean absolute differences of the layers of a fixed network.

    Args:
        features: The network, e.g. `vgg19_features()`; its weights are not trained.
        layers: How many of its modules lie in front of each output that is compared, rising.
        weights: Of the layers.

    Raises:
        ZooError: Layers that the network does not have, or another number of weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        features: nn.Sequential,
        layers: Sequence[int] = LAYERS,
        weights: Sequence[float] = WEIGHTS,
    ) -> None:
        super().__init__()
        rising = list(layers) == sorted(set(layers)) and bool(layers)
        if not rising or layers[0] < 1 or layers[-1] > len(features):
            order = f"numbers that rise from at least 1 to at most {len(features)}, the modules"
            raise checks.wrong("layers", layers, order)
        found = checks.each(checks.number, distinct=False)("weights", weights)
        if len(found) != len(layers):
            raise checks.wrong("weights", weights, f"{len(layers)} numbers, one for each layer")
        self.weights = tuple(found)
        starts = (0, *layers[:-1])
        parts = (features[a:b] for a, b in zip(starts, layers, strict=True))
        self.parts = nn.ModuleList(parts)
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the layer before is compared as well
        self.requires_grad_(False)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stay in evaluation mode whatever the model around does."""
        return super().train(False)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Distance of images (B, 3, H, W).

        Raises:
            ZooError: Shapes that do not fit.
        """
        check_pair(pred, target)
        x, y = ((image - self.mean) / self.std for image in (pred, target.detach()))
        total = pred.new_zeros(())
        for part, weight in zip(self.parts, self.weights, strict=True):
            x = part(x)
            with torch.no_grad():
                y = part(y)
            total = total + weight * F.l1_loss(x, y)
        return total


def vgg19_features(pretrained: bool = True) -> nn.Sequential:
    """Convolutions of VGG-19 (Simonyan and Zisserman 2014) with the weights of torchvision.

    Args:
        pretrained: Load weights of ImageNet, from the hub's cache or from the network; otherwise
            they are random, whose distances still say how far two images are apart.

    Raises:
        ZooError: The weights cannot be had.
    """
    import timm

    if not pretrained:  # the classifier is most of the network, and need not be of its size
        small = timm.create_model("vgg19", pretrained=False, mlp_ratio=1 / 4096)
        return _convolutions(small)
    try:
        vgg = timm.create_model("vgg19.tv_in1k", pretrained=True)
    except Exception as error:
        raise ZooError(
            "the weights of VGG-19 (vgg19.tv_in1k) are neither in the hub's cache nor can they be "
            f"downloaded ({type(error).__name__}); train without the perceptual loss, or take "
            "vgg19_features(pretrained=False)"
        ) from error
    return _convolutions(vgg)


def _convolutions(vgg: nn.Module) -> nn.Sequential:
    features = vgg.features
    assert isinstance(features, nn.Sequential)
    return features


def shadow_loss(
    pred: Tensor,
    target: Tensor,
    perceptual: nn.Module | None = None,
    *,
    weight: float = 0.001,
    epsilon: float = EPSILON,
) -> Tensor:
    """Loss of RASM: Charbonnier and, where a network is given, perceptual distance.

    Args:
        pred: Output of the model, (B, 3, H, W), clamped to [0, 1] here.
        target: Image without shadow, (B, 3, H, W) in [0, 1].
        perceptual: `Perceptual`, or None to leave it out.
        weight: Of the perceptual distance.
        epsilon: Of `charbonnier`.

    Raises:
        ZooError: Shapes that do not fit.
    """
    pred = pred.clamp(0.0, 1.0)
    loss = charbonnier(pred, target, epsilon=epsilon)
    return loss if perceptual is None else loss + weight * perceptual(pred, target)
