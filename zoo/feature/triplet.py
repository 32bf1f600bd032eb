"""Triplet attention (Misra et al. 2021, "Rotate to Attend").

Three gates on a feature map, each over a pair of its dimensions C, H, W and pooled along the third.
With Z(t) = [max over dim 1, mean over dim 1] of t (B, D, P, Q), of shape (B, 2, P, Q):

    G(t) = sigmoid(BN(conv_k(Z(t))))        conv 2 -> 1 channels, no bias: (B, 1, P, Q)
    cw:  t = x as (B, H, C, W)              pooled over H, gate g_cw (B, C, W)
    hc:  t = x as (B, W, H, C)              pooled over W, gate g_hc (B, H, C)
    hw:  t = x       (B, C, H, W)           pooled over C, gate g_hw (B, H, W)
    y[b,c,h,w] = x[b,c,h,w] (g_cw[b,c,w] + g_hc[b,h,c] + g_hw[b,h,w]) / 3

With fewer branches the mean is over those. The convolution slides over the channels as if these
were places, so the order of channels matters. 2 k^2 + 2 parameters a branch, whatever C, H and W;
2 k^2 (C W + H C + H W) multiply-adds.

Code and paper. The paper averages three gated tensors, here x is multiplied once by the mean of the
gates, which is the same. BatchNorm has the official code's momentum of 0.01. Where values tie for a
maximum the first gets the gradient, as there (`max` with indices). The official ResNet starts the
hw branch with a BatchNorm weight of 0, a gate of 0.5 everywhere, and the others with 1; so does
`reset_parameters`. Names in the state dict are the official ones.

Roof: the bytes moved. Forward x is read twice and y written; backward dy and x are read for the
gates, dy for dx, which is written and touched again by the pooling. The straightforward form moves
about five times as much, and its convolutions cost more than all of that on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.feature._triplet_maps import gate, pool
from zoo.feature._triplet_planes import PlaneConv
from zoo.registry import Paper, Taxonomy, Traits, register

# The axis that a branch pools over, and the official order of dimensions in which it sees x.
AXES = {"cw": 2, "hc": 3, "hw": 1}
ORDERS = {"cw": (0, 2, 1, 3), "hc": (0, 3, 2, 1), "hw": (0, 1, 2, 3)}


def triplet_attention_reference(
    x: Tensor, gates: Mapping[str, Callable[[Tensor], Tensor]]
) -> Tensor:
    """The paper line by line: rotate, pool, gate, rotate back, average; any dtype.

    Args:
        x: (B, C, H, W).
        gates: For each branch (cw, hc, hw) what turns the pooled planes (B, 2, P, Q), maximum
            first, into the gate (B, 1, P, Q).

    Source: sections 3.2 and 3.3, equations 1 and 2.
    """
    total = torch.zeros_like(x)
    for name, gate_of in gates.items():
        t = x.permute(ORDERS[name]).contiguous()
        z = torch.cat((t.max(1, keepdim=True)[0], t.mean(1, keepdim=True)), 1)
        total = total + (t * gate_of(z)).permute(ORDERS[name]).contiguous()
    return total / len(gates)


class _Layers(nn.Module):
    """Convolution and BatchNorm, by the names of the official code."""

    def __init__(self, conv: PlaneConv, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn


class Branch(nn.Module):
    """One gate: convolution, BatchNorm and sigmoid on pooled planes.

    Args:
        kernel_size: Side of the kernel.
        momentum: Of the running statistics.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        kernel_size: int,
        momentum: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv = PlaneConv(kernel_size, device=device, dtype=dtype)
        norm = nn.BatchNorm2d(1, momentum=momentum, device=device, dtype=dtype)
        self.conv = _Layers(conv, norm)

    def forward(self, z: Tensor) -> Tensor:
        """Planes (B, 2, P, Q) to gates (B, 1, P, Q)."""
        u = self.conv.conv(z).to(self.conv.conv.weight.dtype)
        return self.conv.bn(u).sigmoid()

    def plain(self, z: Tensor) -> Tensor:
        """The same by PyTorch's own convolution."""
        conv, norm = self.conv.conv, self.conv.bn
        return norm(conv._conv_forward(z, conv.weight, None)).sigmoid()


@register(
    "triplet",
    kind="feature",
    paper=Paper(
        "Rotate to Attend: Convolutional Triplet Attention Module",
        2020,
        "2010.03045",
    ),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="multi_dimensional",
        alignment="convolution",
        distribution="sigmoid",
        complexity="linear",
        modality=("image",),
        trainable_params=True,
    ),
    traits=Traits(cost="C * H * W + kernel_size ** 2 * (C * W + H * C + H * W)"),
    parameters="(branches.__len__() if branches else 3 - no_spatial) * (2 * kernel_size ** 2 + 2)",
)
class TripletAttention(nn.Module):
    """Gates a feature map over each pair of channels, height and width (Misra et al. 2021).

    Args:
        channels: Channels of the map; not needed, for hosts that say them.
        kernel_size: Side k of the three kernels, odd.
        no_spatial: Leave out the branch hw.
        bn_momentum: Weight of a batch in the running statistics.
        branches: Which of cw, hc, hw there are; default all, or cw and hc with `no_spatial`.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: A value that is not possible, or `no_spatial` with the branch hw.

    Source: sections 3.2 and 3.3; defaults of the official code.
    """

    kind = "feature"
    special_init = True
    routes = ("fused", "reference")

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 7,
        no_spatial: bool = False,
        bn_momentum: float = 0.01,
        branches: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = checks.optional(checks.whole)("channels", channels)
        self.kernel_size = kernel_size = checks.odd("kernel_size", kernel_size)
        checks.flag("no_spatial", no_spatial)
        bn_momentum = checks.number("bn_momentum", bn_momentum, 0, 1)
        self.branches = _choose(branches, no_spatial)
        self.route: str | None = None
        for name in self.branches:
            branch = Branch(kernel_size, bn_momentum, device=device, dtype=dtype)
            self.add_module(name, branch)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the official ResNets do; the branch hw at a gate of 0.5."""
        for name in self.branches:
            branch = self._branch(name).conv
            nn.init.kaiming_normal_(branch.conv.weight, mode="fan_out", nonlinearity="relu")
            branch.bn.reset_parameters()
            if name == "hw":
                nn.init.zeros_(branch.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Gate a map.

        Args:
            x: (B, C, H, W), floating point; any C, H and W of at least 1.

        Raises:
            ZooError: Another rank or type, an empty axis, or an unknown `route`.
        """
        if x.ndim != 4:
            raise ZooError(f"x of shape {tuple(x.shape)} must be (batch, channels, height, width)")
        if not x.is_floating_point():
            raise ZooError(f"x has dtype {x.dtype}; allowed: floating point")
        if 0 in x.shape:
            raise ZooError(f"x of shape {tuple(x.shape)} has an empty axis; allowed: at least 1")
        parts = {name: self._branch(name) for name in self.branches}
        if self.route == "reference":
            return triplet_attention_reference(x, {n: part.plain for n, part in parts.items()})
        if self.route not in (None, "fused"):
            raise unknown("route of 'triplet'", self.route, self.routes)
        axes = tuple(AXES[name] for name in parts)
        x, planes = pool(x, axes)
        gates = []
        for (name, part), z in zip(parts.items(), planes, strict=True):
            # The remaining axes of hc are C and H in memory, but its kernel lies on (H, C).
            turned = name == "hc"
            found = part(z.transpose(2, 3) if turned else z).squeeze(1)
            gates.append(found.transpose(1, 2) if turned else found)
        return gate(x, axes, gates)

    def _branch(self, name: str) -> Branch:
        branch = self.get_submodule(name)
        assert isinstance(branch, Branch)
        return branch

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"kernel_size={self.kernel_size}, branches={self.branches}"


def _choose(branches: Sequence[str] | None, no_spatial: bool) -> tuple[str, ...]:
    """Branches in their usual order."""
    if branches is None:
        return tuple(name for name in AXES if not (no_spatial and name == "hw"))
    names = checks.several("branches", branches)
    if not names:
        raise checks.wrong("branches", branches, f"a list of some of {', '.join(AXES)}")
    for name in names:
        checks.choice("branch of 'triplet'", name, AXES)
    if no_spatial and "hw" in branches:
        raise ZooError(f"no_spatial=True leaves out the branch 'hw', but branches={branches!r}")
    return tuple(name for name in AXES if name in branches)
