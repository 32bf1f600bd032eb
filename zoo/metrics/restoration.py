"""How well a shadow was removed: errors in L*a*b*, PSNR and SSIM, by region.

All are computed for each image and averaged over images. Pixels lie in [0, 1], to which outputs are
clamped. Let d be the difference of output and target in L*a*b*, and R a region of n pixels: all,
the shadow, or what is lit, the rest. An image without a region does not count for it.

    lab_mae    sum over R of (|d_L| + |d_a| + |d_b|) / n     what papers on shadows call "RMSE"
    lab_rmse   sqrt(sum over R of (d_L^2 + d_a^2 + d_b^2) / n)
    psnr       -10 log10 of the mean squared error in R, at most 100
    ssim       mean over R of the map of SSIM (Gaussian of 1.5 pixels) of the whole images

The papers compute PSNR and SSIM of a region on whole images that are black outside it. The black
pixels agree, so that PSNR rises by 10 log10(HW / n), and SSIM towards 1: `psnr_shadow_filled` and
its like are theirs. Beside the output stand two answers without learning: "input", the image as it
came, and "gain", every channel of the shadow multiplied by the best factor for that image, which
takes the target to know. `shadow_left` is lab_mae_shadow over that of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from zoo.errors import ZooError, unknown
from zoo.metrics.ratio import Ratio
from zoo.metrics.registry import metric
from zoo.pictures.colour import MATRICES, to_lab

EPSILON = 1e-6
"""Under the root of the Charbonnier distance."""
REGIONS = ("", "_shadow", "_lit")
FLOOR = 1e-10
"""Mean squared error at which PSNR ends, 100 dB."""
SMALLEST = 6
"""Side of the smallest image for SSIM, whose window reaches 5 pixels beyond a pixel."""
NAMES = (
    *(f"{name}{region}" for name in ("lab_mae", "lab_rmse", "psnr", "ssim") for region in REGIONS),
    *(f"{name}{region}_filled" for name in ("psnr", "ssim") for region in REGIONS[1:]),
)
INPUT = tuple(f"{name}{region}_input" for name in ("lab_mae", "psnr", "ssim") for region in REGIONS)
GAIN = tuple(f"lab_mae{region}_gain" for region in REGIONS)


def check_pair(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
    """Refuse images that are none or that differ in shape, and masks that do not fit them.

    Raises:
        ZooError: Names the argument.
    """
    if pred.ndim != 4 or pred.shape != target.shape:
        raise ZooError(
            f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have one shape "
            "(batch, channels, height, width)"
        )
    if mask is not None and tuple(mask.shape) != (len(pred), 1, *pred.shape[2:]):
        raise ZooError(
            f"mask of shape {tuple(mask.shape)} does not fit; allowed: "
            f"{(len(pred), 1, *pred.shape[2:])}"
        )


def check_names(names: Sequence[str]) -> None:
    """Refuse what is not the name of a figure.

    Raises:
        ZooError: A name is not one of `NAMES`, or there is none.
    """
    if isinstance(names, str) or not names:
        raise ZooError(f"names={names!r} must be a list of at least one of: {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES:
            raise unknown("figure", name, NAMES)


def over(values: Tensor, region: Tensor) -> Tensor:
    """Average a map over a region of each image.

    Args:
        values: (B, 1, H, W).
        region: (B, 1, H, W) bool.

    Returns:
        (B,), NaN where the region is empty.
    """
    inside = values.where(region, 0.0).flatten(1).sum(1)
    return inside / region.flatten(1).sum(1)


def decibels(error: Tensor) -> Tensor:
    """Turn mean squared errors of pixels in [0, 1] into PSNR."""
    return -10 * error.clamp(min=FLOOR).log10()


def ssim_map(pred: Tensor, target: Tensor) -> Tensor:
    """SSIM around each pixel, mean of the channels, (B, 1, H, W)."""
    _, full = structural_similarity_index_measure(
        pred, target, data_range=1.0, reduction="none", return_full_image=True
    )
    return full.mean(1, keepdim=True)


def regions(region: Tensor) -> dict[str, Tensor]:
    """Return the three regions by the ending of the figures' names."""
    return dict(zip(REGIONS, (torch.ones_like(region), region, ~region), strict=True))


def region_of(name: str) -> str:
    """Return the ending that says which region a figure is of, "" for the whole image."""
    return next((part for part in REGIONS[1:] if part in name), "")


def lab_errors(
    pred: Tensor, target: Tensor, region: Tensor, *, white: str = "D65"
) -> dict[str, Tensor]:
    """Return the figures that start with lab, as `shadow_metrics` does."""
    away = to_lab(pred, white) - to_lab(target, white)
    absolute, square = away.abs().sum(1, keepdim=True), away.square().sum(1, keepdim=True)
    found = {}
    for name, part in regions(region).items():
        found[f"lab_mae{name}"] = over(absolute, part)
        found[f"lab_rmse{name}"] = over(square, part).sqrt()
    return found


def shadow_metrics(
    pred: Tensor,
    target: Tensor,
    region: Tensor,
    *,
    white: str = "D65",
    names: Sequence[str] = NAMES,
) -> dict[str, Tensor]:
    """Measure restored images, each on its own.

    Args:
        pred: (B, 3, H, W).
        target: (B, 3, H, W) in [0, 1].
        region: The shadow, (B, 1, H, W) bool.
        white: Of L*a*b*, "D65" or "D50".
        names: Figures to compute, of `NAMES`.

    Returns:
        (B,) by name, NaN where an image lacks the region.

    Raises:
        ZooError: Shapes that do not fit, another white or name, or for SSIM images of fewer than 6
            pixels a side, whose borders its window cannot mirror.
    """
    check_pair(pred, target, region)
    check_names(names)
    kinds = {name.partition("_")[0] for name in names}
    filled = any(name.endswith("_filled") for name in names)
    if "ssim" in kinds and min(pred.shape[2:]) < SMALLEST:
        raise ZooError(
            f"pred of shape {tuple(pred.shape)} is too small for SSIM; allowed: a height and width "
            f"of at least {SMALLEST}"
        )
    if region.dtype != torch.bool:
        raise ZooError(f"region has dtype {region.dtype}; allowed: bool, True in the shadow")
    pred, target = pred.float().clamp(0, 1), target.float()
    found = lab_errors(pred, target, region, white=white) if "lab" in kinds else {}
    if "psnr" in kinds:
        found |= _psnr(pred, target, region, filled)
    if "ssim" in kinds:
        found |= _ssim(pred, target, region, filled)
    return {name: found[name] for name in names}


def _psnr(pred: Tensor, target: Tensor, region: Tensor, filled: bool) -> dict[str, Tensor]:
    error = (pred - target).square().mean(1, keepdim=True)
    found = {}
    for name, part in regions(region).items():
        found[f"psnr{name}"] = decibels(over(error, part))
        if name and filled:
            whole = decibels((error * part).flatten(1).mean(1))
            found[f"psnr{name}_filled"] = whole.where(part.flatten(1).any(1), torch.nan)
    return found


def _ssim(pred: Tensor, target: Tensor, region: Tensor, filled: bool) -> dict[str, Tensor]:
    likeness = ssim_map(pred, target)
    found = {}
    for name, part in regions(region).items():
        found[f"ssim{name}"] = over(likeness, part)
        if name and filled:
            alike = ssim_map(pred * part, target * part).flatten(1).mean(1)
            found[f"ssim{name}_filled"] = alike.where(part.flatten(1).any(1), torch.nan)
    return found


def best_gain(image: Tensor, target: Tensor, region: Tensor) -> Tensor:
    """Multiply the shadow's channels by the factors that bring it nearest to the target.

    Args:
        image: (B, 3, H, W).
        target: (B, 3, H, W).
        region: (B, 1, H, W) bool.

    Returns:
        (B, 3, H, W); a channel's factor is sum(image target) / sum(image^2) over the region.
    """
    x = image * region
    size = x.square().sum((2, 3), keepdim=True).clamp(min=1e-12)
    factor = (x * target).sum((2, 3), keepdim=True) / size
    return torch.where(region, image * factor, image)


def shrunk(image: Tensor, side: int) -> Tensor:
    """Scale images (B, C, H, W) to a square of that side by cubic interpolation, within [0, 1]."""
    scaled = F.interpolate(image, (side, side), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1)


@metric("shadow_removal")
class ShadowRemoval(Metric):
    """How well shadows were removed, mean over the images that have the region, by figure.

    Args:
        white: Of L*a*b*, "D65" or "D50".
        names: Figures to compute, of `NAMES`.

    Raises:
        ZooError: Another white or name.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, white: str = "D65", names: Sequence[str] = NAMES) -> None:
        super().__init__()
        if white not in MATRICES:
            raise unknown("white", white, MATRICES)
        check_names(names)
        self.white, self.names = white, tuple(names)
        for state in ("total", "count"):
            zeros = torch.zeros(len(self.names), dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor, region: Tensor) -> None:
        """Take in a batch.

        Args:
            pred: (B, 3, H, W).
            target: (B, 3, H, W) in [0, 1].
            region: The shadow, (B, 1, H, W) bool.
        """
        found = shadow_metrics(pred, target, region, white=self.white, names=self.names)
        there = {name: part.flatten(1).any(1) for name, part in regions(region).items()}
        asked = [there[region_of(name)] for name in self.names]
        sums = [found[name][those].sum() for name, those in zip(self.names, asked, strict=True)]
        self.total += torch.stack(sums)
        self.count += torch.stack([those.sum() for those in asked])

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name; NaN where no image had the region."""
        return dict(zip(self.names, (self.total / self.count).float().unbind(), strict=True))


class OverImages(Ratio):
    """A mean over the images that have what is measured."""

    def update(self, values: Tensor, asked: Tensor) -> None:
        """Take in values (B,), those that are asked for."""
        self.add(values, asked)
