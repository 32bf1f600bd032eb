"""Pictures beside maps: what a module on feature maps passes on, and what slots take.

A module on feature maps is shown by its gain: the length of its output vector over that of its
input vector at every position, sqrt(sum_c y_c^2 / sum_c x_c^2). For a gate that all channels share
this is the gate itself; it is defined for modules without gates as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError

SAMPLES = 4
"""Examples in a picture."""
TOP = 0.98
"""The colour scale of maps ends at this quantile of their values, and begins at its mirror."""
LIFTED = 96
"""Side of the photograph that an untrained module is shown on."""


def panels(
    rows: Sequence[Sequence[Tensor | None]],
    *,
    title: str = "",
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    label: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw rows of pictures and maps.

    Args:
        rows: Panels: (3, H, W) or (1, H, W) with values from 0 to 1 is a picture, (H, W) a map in
            colours, None an empty place.
        title: Above all.
        columns: Above each column.
        names: Beside each row.
        label: What the numbers of the maps are.
        limits: Ends of the colour scale of all maps; None takes those of the maps, but for the
            few values far out that would leave all others in one colour.

    Raises:
        ZooError: There is nothing to draw, or a panel has another shape.
    """
    width = max((len(row) for row in rows), default=0)
    if not width:
        raise ZooError("there are no pictures to draw")
    tall = [max((_ratio(p) for p in row if p is not None), default=1.0) for row in rows]
    size = max(1.0, min(2.2, 18 / width))
    figure = Figure(
        figsize=(
            max(4.0, size * width + 1.2),
            max(2.0, sum(size * r for r in tall) + 0.08 * len(rows) + 0.6),
        ),
        layout="constrained",
    )
    axes = figure.subplots(len(rows), width, squeeze=False, height_ratios=tall)
    maps = [p for row in rows for p in row if p is not None and p.ndim == 2]
    scale = limits or _limits(maps)
    shown = None
    for i, row in enumerate(rows):
        for j in range(width):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            panel = row[j] if j < len(row) else None
            if panel is None:
                axis.set_axis_off()
                continue
            values = _pixels(panel)
            if panel.ndim == 2:
                colours = colormaps["viridis"].with_extremes(bad="0.85")
                shown = axis.imshow(
                    np.ma.masked_invalid(values),
                    cmap=colours,
                    vmin=scale[0],
                    vmax=scale[1],
                    interpolation="nearest",
                )
            else:
                axis.imshow(values, interpolation="nearest", vmin=0.0, vmax=1.0, cmap="gray")
        if i < len(names):
            first = axes[i, 0]
            first.set_axis_on()
            first.set_ylabel(names[i], fontsize=8)
    for axis, name in zip(axes[0], columns, strict=False):
        axis.set_title(name, fontsize=8)
    if shown is not None and label:
        every = torch.cat([m.detach().float().flatten().cpu() for m in maps])
        over, under = bool((every > scale[1]).any()), bool((every < scale[0]).any())
        extend = {(1, 1): "both", (1, 0): "max", (0, 1): "min"}.get((over, under), "neither")
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, extend=extend)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    return figure


def _ratio(panel: Tensor) -> float:
    return min(3.0, max(0.33, panel.shape[-2] / panel.shape[-1]))


def _limits(maps: Sequence[Tensor]) -> tuple[float, float]:
    values = (
        torch.cat([m.detach().float().flatten().cpu() for m in maps]) if maps else torch.zeros(0)
    )
    values = values[values.isfinite()]
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values.numpy(), (1 - TOP, TOP)).tolist()
    # A gate that is the same everywhere has no range; it is shown in the middle of one.
    return (low, high) if high - low > 1e-6 * max(1.0, abs(high)) else (low - 0.5, high + 0.5)


def _pixels(panel: Tensor) -> np.ndarray[Any, Any]:
    """Turn a panel into what matplotlib draws."""
    panel = panel.detach().float().cpu()
    if panel.ndim == 2:
        return panel.numpy()
    if panel.ndim != 3 or panel.shape[0] not in (1, 3):
        raise ZooError(
            f"a panel of shape {tuple(panel.shape)} is none; allowed: (3, H, W), (1, H, W), (H, W)"
        )
    panel = panel.clamp(0, 1)
    return panel[0].numpy() if panel.shape[0] == 1 else panel.permute(1, 2, 0).numpy()


def stretch(image: Tensor) -> Tensor:
    """Bring a normalised image back to values from 0 to 1, for showing.

    Args:
        image: (C, H, W); of more than three channels the mean is shown.
    """
    image = image.detach().float()
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp(min=1e-12)


def segments(masks: Tensor) -> Tensor:
    """Colour each pixel by the mask that is largest there, the first of the masks in black.

    Args:
        masks: (K, H, W), soft or boolean.

    Returns:
        A picture (3, H, W).
    """
    table = torch.tensor(colormaps["tab20"].colors, dtype=torch.float32)  # type: ignore[attr-defined]
    # The strong colours of the table first, then the pale ones.
    table = torch.cat([torch.zeros(1, 3), table[::2], table[1::2]])
    label = masks.detach().float().cpu().argmax(0)
    return table[label % len(table)].permute(2, 0, 1)


def feature_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules on feature maps in a model by name, the outermost where they are nested."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if getattr(type(module), "kind", None) == "feature" and not inside:
            found[name] = module
    return found


def gains(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What every module on feature maps of a model does to the length of the vectors.

    Args:
        model: The model, or a single module.
        inputs: What the model takes.

    Returns:
        (B, H, W) by name of the module; NaN where the input is zero.

    Raises:
        ZooError: The model has no module on feature maps.
    """
    modules = feature_modules(model)
    if not modules:
        raise ZooError(f"{type(model).__name__} has no module on feature maps to show")
    found: dict[str, Tensor] = {}
    was_training = model.training
    with torch.no_grad(), ExitStack() as stack:
        for name, module in modules.items():

            def note(_: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                found[name] = (out.float().norm(dim=1) / args[0].float().norm(dim=1)).cpu()

            stack.callback(module.register_forward_hook(note).remove)
        model.eval()
        try:
            model(inputs)
        finally:
            model.train(was_training)
    return found


def gate_figure(model: nn.Module, images: Tensor, *, title: str) -> Figure:
    """Draw the gain of every module on feature maps beside each image.

    Args:
        model: A model of images.
        images: (B, C, H, W) as the model takes them; the first few are shown.
        title: Above all.

    Raises:
        ZooError: The model has no module on feature maps.
    """
    images = images[:SAMPLES]
    found = gains(model, images)
    rows = [
        [stretch(image), *(gain[i] for gain in found.values())] for i, image in enumerate(images)
    ]
    columns = ["input", *(_short(name) for name in found)]
    if all(bool(gain.isnan().all()) for gain in found.values()):
        title += " (every branch is zero: the last BatchNorm of a block starts at zero)"
    return panels(rows, title=title, columns=columns, label="gain: |y| / |x|  (grey: x = 0)")


def _short(name: str) -> str:
    kept = [part for part in name.split(".") if part not in ("se", "attn", "attention")]
    return ".".join(kept) or name


def photograph(side: int = LIFTED) -> Tensor:
    """Return a square of scikit-learn's photograph of a flower, (1, 3, side, side) in [0, 1]."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]
    height, width = image.shape[-2:]
    left = (width - height) // 2
    square = image[..., left : left + height].float() / 255
    return F.interpolate(square, (side, side), mode="bilinear", antialias=True)


def lifted(image: Tensor, channels: int, seed: int) -> Tensor:
    """Random features of an image: a convolution of 5x5 and a ReLU.

    Args:
        image: (B, C, H, W).
        channels: Channels of the result.
        seed: Of the filters.
    """
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, image.shape[1], 5, 5, generator=source)
    weight = weight - weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(image, weight, padding=2).relu()


def module_figure(spec: str, *, channels: int = 64, seed: int = 0) -> Figure:
    """Draw what an untrained module does to random features of a photograph.

    Args:
        spec: A mechanism of kind "feature" or "slots".
        channels: Channels of the features.
        seed: Of the module's weights and the features.

    Raises:
        ZooError: Another kind, or the module cannot be built.
    """
    from zoo.host.factory import create
    from zoo.host.spec import parse

    checks.whole("dim", channels)
    kind = parse(spec)[0].entry.kind
    image = photograph()
    features = lifted(image, channels, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "feature":
            module = create(spec, channels).eval()
            return gate_figure_of(module, image, features, title=f"{spec}, untrained, on features")
        if kind == "slots":
            features = F.avg_pool2d(features, 4)
            module = create(spec, channels).eval()
            tokens = features.flatten(2).mT
            with torch.no_grad():
                _, weights = module(tokens, return_weights=True)
            shown = weights[0].T.unflatten(-1, features.shape[-2:])
            names = [f"slot {k}" for k in range(len(shown))]
            return panels(
                [[image[0], *shown]],
                title=f"{spec}, untrained, on features",
                columns=["input", *names],
                label="weight",
            )
    raise ZooError(f"{spec!r} is of kind {kind!r}; a picture like this needs feature or slots")


def gate_figure_of(module: nn.Module, image: Tensor, features: Tensor, *, title: str) -> Figure:
    """Draw the gain of one module beside the image that its features come from.

    Args:
        module: On feature maps.
        image: (1, 3, H, W).
        features: (1, C, H, W).
        title: Above all.
    """
    gain = gains(module, features)[""]
    return panels(
        [[image[0], stretch(features[0]), gain[0]]],
        title=title,
        columns=["input", "features", "gain"],
        label="gain: |y| / |x|  (grey: x = 0)",
    )
