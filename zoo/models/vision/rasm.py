"""RASM, a U-net that removes shadows (Liu, Li and Guo 2024): image and mask to a shadow-free image.

With width e and an image of H x W, maps and channels along the way are

    conv 3 x 3   H      e     of image and mask, with LeakyReLU
    encoder      H e,   H/2 2e,   H/4 4e *       convolutions of 4 x 4, stride 2, in between
    bottleneck   H/8    8e *
    decoder      H/4 8e *,   H/2 4e,   H 2e      deconvolutions of 2 x 2, joined by the encoder's
    conv 3 x 3   H      3     plus the image

Levels with a star have attention (4, 16 and 8 heads), the others channel attention only. 5.2
million parameters at e = 32. Depth 2 everywhere; stochastic depth grows along the encoder.

Code and paper. The mask enters as a fourth channel and nowhere else. The code counts a fourth
level of the encoder that it does not have when it spreads the rates of stochastic depth; so do we.
It wants sides that are multiples of 8; here other images are filled up at the right and at the
bottom with their last pixels, and the result is cut.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.factory import create
from zoo.host.spec import PartSpec, parse
from zoo.models import TOKEN_MIXERS, model
from zoo.models.vision._rasm_blocks import OnTokens, RASMBlock
from zoo.parts import tie_layers
from zoo.registry import SOCKETS
from zoo.timm import init_special

DOWN = 8
# Which levels have attention, from the first of the encoder to the last of the decoder.
ATTENDING = (2, 3, 4)


class RASM(nn.Module):
    """The network; `rasm` builds it.

    Args:
        width: Channels e.
        blocks: Layers of the seven levels.
    """

    def __init__(self, width: int, blocks: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        e = width
        self.input_proj = nn.Conv2d(4, e, 3, padding=1)
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in blocks)
        self.down = nn.ModuleList(nn.Conv2d(c, 2 * c, 4, 2, 1) for c in (e, 2 * e, 4 * e))
        ways = ((8 * e, 4 * e), (8 * e, 2 * e), (4 * e, e))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, out, 2, 2) for c, out in ways)
        self.output_proj = nn.Conv2d(2 * e, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        init_special(self)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Remove the shadow.

        Args:
            image: (B, 3, H, W) in [0, 1]; or (B, 4, H, W) with the mask behind, and no `mask`.
            mask: (B, 1, H, W), boolean or in [0, 1]: 1 in the shadow.

        Returns:
            (B, 3, H, W), not clamped.

        Raises:
            ZooError: Shapes that do not fit each other, a side below 8, or another range.
        """
        image, mask = _check(image, mask)
        height, width = image.shape[2:]
        x = torch.cat([image, mask], 1)
        room = (0, -width % DOWN, 0, -height % DOWN)
        if any(room):
            x = F.pad(x, room, mode="replicate")
        x = x.contiguous(memory_format=torch.channels_last)
        y = self._unet(x)[..., :height, :width]
        return y + image

    def _unet(self, x: Tensor) -> Tensor:
        """(B, 4, H, W) to (B, 3, H, W)."""
        masks = [x[:, 3:]]
        for _ in self.down:
            masks.append(F.max_pool2d(masks[-1], 2))
        x = F.leaky_relu(self.input_proj(x))
        kept: list[Tensor] = []
        for n, level in enumerate(self.levels):
            assert isinstance(level, nn.ModuleList)
            if n > len(self.down):
                x = self.up[n - len(self.down) - 1](x)
                x = torch.cat([x, kept.pop()], 1)
            inside = masks[min(n, len(self.levels) - 1 - n)] > 0
            for block in level:
                x = block(x, inside)
            if n < len(self.down):
                kept.append(x)
                x = self.down[n](x)
        y: Tensor = self.output_proj(x)
        return y


def _check(image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        if image.ndim != 4 or image.shape[1] != 4:
            raise ZooError(
                f"image of shape {tuple(image.shape)} without a mask must be (batch, 4, height, "
                "width), the mask behind the three colours"
            )
        image, mask = image[:, :3], image[:, 3:]
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise ZooError(
            f"image of shape {tuple(image.shape)} and dtype {image.dtype} must be (batch, 3, "
            "height, width), floating point in [0, 1]"
        )
    wanted = (len(image), 1, *image.shape[2:])
    if tuple(mask.shape) != wanted:
        raise ZooError(
            f"mask of shape {tuple(mask.shape)} does not fit an image of shape "
            f"{tuple(image.shape)}; allowed: {wanted}"
        )
    if min(image.shape[2:]) < DOWN:
        raise ZooError(
            f"image of {image.shape[2]} x {image.shape[3]} pixels; allowed: sides of at least "
            f"{DOWN}, which the network divides them by"
        )
    seen = not (torch.compiler.is_compiling() or mask.is_meta)
    if mask.dtype != torch.bool and seen and mask.numel():
        low, high = (float(x) for x in mask.detach().aminmax())
        if not 0.0 <= low <= high <= 1.0:
            raise ZooError(f"mask has values from {low:.4g} to {high:.4g}; allowed: [0, 1]")
    return image, mask.to(image.dtype)


@model("rasm", kinds=("feature", *TOKEN_MIXERS))
def rasm(
    attention: str | None = "regional",
    *,
    image_shape: Sequence[int] | None = None,
    width: int = 32,
    depths: int | Sequence[int] = 2,
    heads: Sequence[int] = (4, 16, 8),
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
) -> RASM:
    """Build RASM: image (B, 3, H, W) and mask (B, 1, H, W) to an image without shadow.

    Args:
        attention: What the three inner levels attend with. A mechanism of kind "feature"
            (``"regional(kernel=7)"``), any token mixer on the pixels of a level (``"mha"`` is
            global attention), or None (in recipes ``"identity"``) for channel attention only.
        image_shape: Channels (3, or 4 with the mask), height and width. Only parts on a grid
            (``"neighborhood(kernel=8, stride=8)"`` for windows) need it; the network then takes
            images of this size only.
        width: Channels e of the first level.
        depths: Layers of a level, one number or one for each of the seven.
        heads: Heads in the last level of the encoder, the bottleneck and the first of the decoder;
            they must divide 4, 8 and 8 times `width`.
        mlp_ratio: Width of the MLP over the channels.
        drop_path: Rate of stochastic depth in the bottleneck.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
        CompatibilityError: Parts that cannot work together.
    """
    if attention == "identity":
        attention = None
    checks.whole("width", width)
    layers = list(depths) if isinstance(depths, Sequence) else [depths] * 7
    if len(layers) != 7:
        raise ZooError(f"depths={depths!r} has {len(layers)} entries; allowed: one number or 7")
    for depth in layers:
        checks.whole("depths", depth)
    checks.wholes("heads", heads, len(ATTENDING), also="one for each level")
    checks.number("mlp_ratio", mlp_ratio, above=0)
    checks.number("drop_path", drop_path, 0, below=1)
    dims = [width * c for c in (1, 2, 4, 8, 8, 4, 2)]
    grids: list[tuple[int, int] | None] = [None] * 7
    if image_shape is not None:
        if len(image_shape) != 3 or image_shape[0] not in (3, 4):
            raise checks.wrong("image_shape", image_shape, "(3 or 4, height, width)")
        for name, side in zip(("height", "width"), image_shape[1:], strict=True):
            checks.whole(f"image_shape: {name}", side, DOWN)
        sides = [[-(-side // DOWN) * DOWN >> n for side in image_shape[1:]] for n in range(4)]
        grids = [(sides[n][0], sides[n][1]) for n in (0, 1, 2, 3, 2, 1, 0)]
    rates = [*_rates(layers[:3], drop_path), [drop_path] * layers[3]]
    rates += [level[::-1] for level in _rates(layers[:3:-1], drop_path)[::-1]]
    blocks = []
    for n, (dim, depth) in enumerate(zip(dims, layers, strict=True)):
        level = []
        for i in range(depth):
            attn = None
            if attention is not None and n in ATTENDING:
                before = sum(layers[m] for m in ATTENDING if m < n)
                place = before + i, sum(layers[m] for m in ATTENDING)
                attn = _attention(attention, dim, heads[ATTENDING.index(n)], grids[n], place)
            level.append(RASMBlock(dim, attn, mlp_ratio, rates[n][i]))
        blocks.append(level)
    net = RASM(width, blocks)
    for module in net.levels:  # one by one: levels differ in their widths
        tie_layers(module)
    return net


def _rates(depths: Sequence[int], top: float) -> list[list[float]]:
    """Rates that grow along the levels and would reach `top` at the end of one more."""
    total = sum(depths) + depths[-1]
    every = torch.linspace(0, top, total).tolist()
    bounds = [sum(depths[:n]) for n in range(len(depths) + 1)]
    return [every[a:b] for a, b in pairwise(bounds)]


def _attention(
    spec: str, dim: int, heads: int, grid: tuple[int, int] | None, place: tuple[int, int]
) -> nn.Module:
    """Attention of a layer, from map to map; `place` is its index among those that attend."""
    if not isinstance(spec, str):
        raise checks.wrong("attention", spec, "a specification such as 'regional', or None")
    parts = parse(spec)
    kind = parts[0].entry.kind
    if kind == "feature":
        part = parts[0]
        known = {"heads": heads} if "heads" in part.entry.options else {}
        return create(part.name, dim, **{**known, **part.options})
    if kind not in (*SOCKETS, "mixer"):
        raise ZooError(
            f"attention={spec!r} is of kind {kind!r}; allowed: mechanisms on feature maps, and "
            "token mixers"
        )
    facts = {"heads": heads, "bias": True, "depth": place[0], "layers": place[1]}
    full = []
    for part in parts:
        told: dict[str, Any] = {}
        if "grid" in part.entry.options and "grid" not in part.options and grid is not None:
            told = {"grid": grid}
        full.append(PartSpec(part.name, {**told, **part.options}))
    if kind == "mixer":
        wanted = inspect.signature(parts[0].entry.cls).parameters
        facts = {name: value for name, value in facts.items() if name in wanted}
    return OnTokens(create("+".join(map(str, full)), dim, **facts))


# Names of the released weights, and ours; a number n of the group is raised by the last entry.
_LAYERS = (
    (r"encoderlayer_(\d)\.blocks", 0),
    (r"conv()\.blocks", 3),
    (r"decoderlayer_(\d)\.blocks", 4),
)
_NAMES = (
    (r"^(input|output)_proj\.proj\.0", r"\1_proj"),
    (r"^dowsample_(\d)\.conv\.0", r"down.\1"),
    (r"^upsample_(\d)\.deconv\.0", r"up.\1"),
    (r"\.mlp\.(linear\d)\.0", r".mlp.\1"),
    (r"\.mlp\.dwconv\.0", ".mlp.conv"),
    (r"\.CAB\.body\.0", ".cab.conv1"),
    (r"\.CAB\.body\.1", ".cab.act"),
    (r"\.CAB\.body\.2", ".cab.conv2"),
    (r"\.CAB\.CA\.conv_du\.0", ".cab.gate.down"),
    (r"\.CAB\.CA\.conv_du\.2", ".cab.gate.up"),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the released code the names of `RASM`.

    Args:
        state: Its state dictionary; ``module.`` in front of names, from several cards, is cut.
    """
    found = {}
    for name, value in state.items():
        new = name.removeprefix("module.")
        for pattern, first in _LAYERS:
            match = re.match(pattern, new)
            if match:
                new = f"levels.{first + int(match[1] or 0)}{new[match.end() :]}"
        for pattern, ours in _NAMES:
            new = re.sub(pattern, ours, new)
        found[new] = value
    return found
