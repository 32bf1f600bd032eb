"""Pictures of attention maps: one panel for each layer and head.

Any model with attention layers of the zoo can be shown, trained or not, and so can a single host
before training. The weights are those that the layers apply, captured during one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.attention import Attention
from zoo.host.collect import capture
from zoo.host.factory import create
from zoo.host.spec import parse
from zoo.registry import SOCKETS

# Longest sequence whose tokens are written along the axes.
LABELLED = 32
# One weight of a row that sees little (the first of a causal map is always 1) would leave all
# others dark, so the scale ends at this quantile of the weights.
TOP = 0.99


def host_maps(
    spec: str,
    *,
    dim: int = 64,
    heads: int = 4,
    length: int = 32,
    causal: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Maps of one untrained host for a random input.

    Args:
        spec: Specification of the attention.
        dim: Channels C.
        heads: Heads H.
        length: Tokens N.
        causal: Query i sees keys 0..i only.
        seed: Of the weights and the input.

    Returns:
        The same as `maps`.

    Raises:
        ZooError: The host cannot be built or forms no weights.
    """
    checks.whole("length", length)
    kind = parse(spec)[0].entry.kind
    if kind not in SOCKETS:
        raise ZooError(f"{spec!r} is a {kind}, a whole module that forms no attention weights")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(1, length, dim)
        module = create(spec, dim=dim, heads=heads, causal=causal, max_len=length)
    return maps(module, x)


def maps(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Attention weights of every layer for the first sample of a batch.

    Args:
        model: A model with attention layers of the zoo, or a host.
        inputs: What the model takes; only the first sample is used.

    Returns:
        (heads, N, M) in float32 by layer, "layer 0" first; layers that form no weights are left
        out.

    Raises:
        ZooError: The model has no layer that forms weights.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), capture(model) as found:
            model(inputs[:1])
    finally:
        model.train(was_training)
    hosts = [host for name in found if isinstance(host := model.get_submodule(name), Attention)]
    kept = {
        f"layer {i}": passes[0].pattern[0].float().cpu()
        for i, passes in enumerate(found.values())
        if passes and passes[0].pattern is not None
    }
    if not kept:
        specs = " and ".join(sorted({repr(host.spec) for host in hosts}))
        raise ZooError(f"{specs} forms no attention weights to show")
    return kept


def draw(
    layers: Mapping[str, Tensor], *, title: str, tokens: Sequence[str] | None = None
) -> Figure:
    """Draw a grid of maps, layers from top to bottom and heads from left to right.

    Args:
        layers: (heads, N, M) by the name of the layer.
        title: Above the grid.
        tokens: What stands at each position, written along the axes of short sequences.

    Raises:
        ZooError: There is nothing to draw.
    """
    if not layers:
        raise ZooError("there are no attention maps to draw")
    columns = max(len(heads) for heads in layers.values())
    size = max(1.5, min(3.2, 16 / columns))
    figure = Figure(
        figsize=(max(5.0, size * columns + 1.6), max(2.6, size * len(layers) + 0.9)),
        layout="constrained",
    )
    axes = figure.subplots(len(layers), columns, squeeze=False)
    every = torch.cat([heads.flatten() for heads in layers.values()])
    scale, colours, extend = _scale(every.numpy())
    labels = tokens if tokens is not None and size >= 3 and len(tokens) <= LABELLED else None
    image = None
    for i, (name, heads) in enumerate(layers.items()):
        for j in range(columns):
            axis = axes[i, j]
            if j >= len(heads):
                axis.set_axis_off()
                continue
            shown = np.ma.masked_equal(heads[j].numpy(), 0.0)
            image = axis.imshow(shown, norm=scale, cmap=colours, interpolation="nearest")
            if i == 0:
                axis.set_title(f"head {j}", fontsize=9)
            _ticks(axis, labels, bottom=i == len(layers) - 1, left=j == 0)
        axes[i, 0].set_ylabel(f"{name}\nquery", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("key", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.85, extend=extend)
    bar.set_label("attention weight (grey: exactly 0)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    return figure


def _scale(weights: np.ndarray[Any, Any]) -> tuple[Normalize, Colormap, str]:
    """Scale and colours for all panels, and the ends of the bar beyond which weights lie.

    It starts at zero, or is centred there where a normalizer makes negative weights.
    """
    seen = np.abs(weights[weights != 0])
    top = float(np.quantile(seen, TOP)) if seen.size else 1.0
    over, under = bool((weights > top).any()), bool((weights < -top).any())
    extend = {(1, 1): "both", (1, 0): "max", (0, 1): "min"}.get((over, under), "neither")
    if (weights < 0).any():
        return TwoSlopeNorm(0.0, -top, top), _grey_at_zero("RdBu_r"), extend
    return Normalize(0.0, top), _grey_at_zero("viridis"), extend


def _grey_at_zero(name: str) -> Colormap:
    return colormaps[name].with_extremes(bad="0.85")


def _ticks(axis: Axes, labels: Sequence[str] | None, bottom: bool, left: bool) -> None:
    if labels is None:
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(MaxNLocator(5, integer=True))
    else:
        places = range(len(labels))
        turned = 90 if max(map(len, labels)) > 1 else 0
        axis.set_xticks(places, labels, family="monospace", rotation=turned)
        axis.set_yticks(places, labels, family="monospace")
    axis.tick_params(
        labelsize=7 if labels is None else 6,
        length=2 if labels is None else 0,
        labelbottom=bottom,
        labelleft=left,
    )


def visible(token: str) -> str:
    """A token as one line of printable text; blanks and control characters get a symbol."""
    symbols: dict[str, Any] = {" ": "␣", "\n": "↵", "\t": "⇥", "$": r"\$"}
    return "".join(symbols.get(c, c if c.isprintable() else "·") for c in token)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Save a figure in the format of the file's ending; missing folders are created.

    Args:
        figure: The figure.
        path: The file.

    Raises:
        ZooError: The folder or the file cannot be written, or the format is unknown.
    """
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ZooError(
            f"output {str(path)!r} has no known ending; allowed: {', '.join(sorted(formats))}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Text stays text in an SVG, and equal figures give equal files.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "zoo"}):
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror or error}") from None
    return path
