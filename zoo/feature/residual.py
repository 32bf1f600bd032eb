"""Residual attention (Wang et al. 2017, "Residual Attention Network for Image Classification").

An hourglass beside a trunk of residual units gives a mask for each position and channel. R is a
pre-activation bottleneck C -> C/4 -> C/4 -> C (He et al. 2016), all maps (B, C, H, W):

    x = R^p(x)                                  units that both branches share
    T = R^t(x)                                  trunk
    u_0 = x;  u_i = R^r(pool(u_{i-1})),         i = 1..d, with R^2r at the deepest level d
    v_d = u_d;  v_i = R^r(up(v_{i+1}) + R(u_i)),      i = d-1..1
    m = W_2 relu(BN(W_1 relu(BN(up(v_1)))))     1 x 1 convolutions without biases
    M = sigmoid(m)                              mixed
    M = m / ||m||_2 over channels               channel
    M = sigmoid((m - mean) / std), over positions     spatial
    y = R^p((1 + M) T)                          or R^p(M T), naive attention learning

With M = 0 the residual form is the plain network, so that modules can be stacked; the naive form
shrinks the features at every module. The mask also filters the gradients of the trunk.

Cost: 17/16 C^2 multiply-adds a position for each unit, 2 C^2 for the two convolutions of the mask.
With d = 1 and the paper's p, t, r that is 6.8 C^2 H W, of which the mask is 37 %.

Code and paper. The graph is that of the published network descriptions: a max pooling of 3 x 3
and stride 2 without a border whose last window may stick out (`pool="ceil"`), interpolation with
corners kept to the size of the level above, whatever that is. The well-known PyTorch version pads
the pooling (`pool="pad"`), and adds each level once more on the way up and the trunk to the
hourglass's output (`extra_adds=True`). Its projections that nothing uses are left out. Left open
by the paper: the standard deviation of the spatial mask divides by the number of positions, and
units start as their shortcuts (`zero_init`).

Roof: the convolutions (half of the time on a CPU), and between them the bytes of maps that are
normalised, rectified and added. The fast form lays maps out channels last on a CPU, whatever the
host has, sums and rectifies in place, and gates by one function whose backward pass keeps m and T
alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.feature._residual_mask import (
    SMALLEST_NORM,
    VARIANCE_EPS,
    MaskBranch,
    over_channels,
    over_positions,
)
from zoo.feature._residual_units import (
    Device,
    Unit,
    sigmoid_gate,
    start,
    to_fast_format,
    to_format_of,
    unit_reference,
)
from zoo.registry import Paper, Taxonomy, Traits, register

MASKS = ("mixed", "channel", "spatial")
POOLS = ("ceil", "pad")


def attention_module_reference(x: Tensor, module: AttentionModule) -> tuple[Tensor, Tensor]:
    """The equations one by one, for any dtype.

    Args:
        x: (B, C, H, W).
        module: Whose parameters to use.

    Returns:
        Output and mask M, both (B, C, H, W).

    Source: sections 3.1 and 3.2, equations 1 to 6.
    """
    branch = module.mask_branch

    def units(parts: nn.Module, x: Tensor) -> Tensor:
        for part in parts.children():
            assert isinstance(part, Unit)
            x = unit_reference(part, x)
        return x

    def up(v: Tensor, like: Tensor) -> Tensor:
        size = like.shape[2:]
        return F.interpolate(v, size=size, mode="bilinear", align_corners=True)

    x = units(module.pre, x)
    t = units(module.trunk, x)
    u = [x]
    for part in branch.down:
        u.append(units(part, branch.pool(u[-1])))
    pooled = branch.poolings(*x.shape[2:]) > 0
    v = units(branch.bottom, branch.pool(u[-1]) if pooled else x)
    for i, (skip, part) in enumerate(zip(reversed(branch.skip), branch.up, strict=True)):
        level = u[-1 - i]
        v = up(v, level) + units(skip, level)
        v = units(part, v + level if module.extra_adds else v)
    v = up(v, x) if pooled else v
    v = v + t if module.extra_adds and pooled else v
    head = branch.head
    m = head.conv2(F.relu(head.bn2(head.conv1(F.relu(head.bn1(v))))))
    if module.mask == "channel":
        mask = m / m.square().sum(1, keepdim=True).sqrt().clamp_min(SMALLEST_NORM)
    elif module.mask == "spatial":
        mean = m.mean((2, 3), keepdim=True)
        variance = (m - mean).square().mean((2, 3), keepdim=True)
        mask = ((m - mean) / (variance + VARIANCE_EPS).sqrt()).sigmoid()
    else:
        mask = m.sigmoid()
    h = (1 + mask) * t if module.residual else mask * t
    return units(module.post, h), mask


@register(
    "residual",
    kind="feature",
    paper=Paper("Residual Attention Network for Image Classification", 2017, "1704.06904"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="multi",
        positions="local",
        representations="multi_dimensional",
        alignment="convolution",
        distribution="sigmoid",
        complexity="linear",
        modality=("image",),
        trainable_params=True,
    ),
    traits=Traits(cost="channels ** 2 * N"),
    parameters=(
        "(2 * p + t + (2 * r * depth + depth - 1 if depth not in ('auto', 0) else 2 * r))"
        " * (17 * (channels // 4) ** 2 + 3 * channels) + 2 * channels ** 2 + 4 * channels"
    ),
)
class AttentionModule(nn.Module):
    """Trunk of residual units under a soft mask from an hourglass (Wang et al. 2017).

    Args:
        channels: Channels C, a multiple of 4.
        depth: Poolings d in the mask branch; the paper has 3, 2, 1 for maps of 56, 28, 14, so that
            the smallest is 7 x 7. "auto", for hosts that say the channels but not the size: one,
            and none on a map less than 2 wide or high, with the same parameters.
        p: Units before the branches part, and after they have met.
        t: Units of the trunk.
        r: Units after each change of size in the mask branch; the deepest level has 2 r.
        mask: What makes the mask: "mixed", "channel" or "spatial".
        residual: (1 + M) T; False for M T, naive attention learning.
        pool: "ceil" pools as the published networks do, "pad" as the PyTorch version.
        extra_adds: Further sums in the mask branch, as in the PyTorch version.
        zero_init: Start each unit as its shortcut, so that deep stacks, and blocks that start at
            zero, are not thrown off by the first steps; False draws all weights.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A value that is not possible.

    Source: section 3, equations 1 to 6; p, t, r from section 3.3.
    """

    kind = "feature"
    special_init = True
    routes = ("fused", "reference")

    def __init__(
        self,
        channels: int,
        depth: int | str = "auto",
        p: int = 1,
        t: int = 2,
        r: int = 1,
        mask: str = "mixed",
        residual: bool = True,
        pool: str = "ceil",
        extra_adds: bool = False,
        zero_init: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = checks.multiple("channels", channels, 4)
        if depth != "auto":
            depth = checks.whole("depth", depth, 0, also="or 'auto'")
        p, t, r = checks.whole("p", p, 0), checks.whole("t", t), checks.whole("r", r, 0)
        checks.choice("mask", mask, MASKS)
        checks.choice("pool", pool, POOLS)
        flags = {"residual": residual, "extra_adds": extra_adds, "zero_init": zero_init}
        for name, flag in flags.items():
            checks.flag(name, flag)
        if extra_adds and depth == 0:
            raise ZooError("extra_adds=True adds after an interpolation; depth=0 has none")
        self.channels, self.depth, self.mask = channels, depth, mask
        self.residual, self.extra_adds, self.zero_init = residual, extra_adds, zero_init
        self.route: str | None = None

        def units(number: int) -> nn.Sequential:
            return nn.Sequential(
                *(Unit(channels, channels, device=device, dtype=dtype) for _ in range(number))
            )

        self.pre, self.trunk, self.post = units(p), units(t), units(p)
        self.mask_branch = MaskBranch(
            *(channels, depth, r, pool, extra_adds), device=device, dtype=dtype
        )

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        start(self, self.zero_init)

    def trunk_units(self) -> list[Unit]:
        """Units of the trunk's path, those before and after it included, in their order."""
        return [u for u in (*self.pre, *self.trunk, *self.post) if isinstance(u, Unit)]

    def forward(self, x: Tensor) -> Tensor:
        """Attend to a map.

        Args:
            x: (B, C, H, W), floating point.

        Raises:
            ZooError: Another shape or type, a map too small for `depth`, or an unknown `route`.
        """
        self._check(x)
        if self.route == "reference":
            return attention_module_reference(x, self)[0]
        given = x
        x = self.pre(to_fast_format(x))
        t = self.trunk(x)
        m = self.mask_branch(x, t)
        if self.mask == "channel":
            gate = over_channels(m)
            h = torch.addcmul(t, gate, t) if self.residual else gate * t
        else:
            m = over_positions(m) if self.mask == "spatial" else m
            h = sigmoid_gate(m, t, self.residual)
        return to_format_of(given, self.post(h))

    def masks(self, x: Tensor) -> Tensor:
        """Mask M (B, C, H, W) of a map, to look at.

        Raises:
            ZooError: As in `forward`.
        """
        self._check(x)
        return attention_module_reference(x, self)[1]

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ZooError(
                f"x of shape {tuple(x.shape)} must be (batch, channels={self.channels}, height, "
                "width)"
            )
        if not x.is_floating_point():
            raise ZooError(f"x has dtype {x.dtype}; allowed: floating point")
        if 0 in x.shape[2:]:
            raise ZooError(f"x of shape {tuple(x.shape)} has an empty axis; allowed: at least 1")
        self.mask_branch.poolings(*x.shape[2:])
        if self.route not in (None, *self.routes):
            raise unknown("route of 'residual'", self.route, self.routes)

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"channels={self.channels}, depth={self.depth}, mask={self.mask!r}"
