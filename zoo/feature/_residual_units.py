"""Units that residual attention is built of: the pre-activation bottleneck, and the gate.

A sum or a ReLU writes over its input where nothing else needs that. On a CPU maps are laid out
channels last inside: both convolutions and BatchNorms are quicker there, the latter severalfold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Device = torch.device | str | None


def make_conv(
    inputs: int, outputs: int, side: int, stride: int, device: Device, dtype: torch.dtype | None
) -> nn.Conv2d:
    """Make a convolution that keeps the size (but for its stride), without a bias."""
    return nn.Conv2d(
        *(inputs, outputs, side, stride, side // 2), bias=False, device=device, dtype=dtype
    )


def start(module: nn.Module, zero_init: bool) -> None:
    """Draw convolutions from N(0, 2 / fan-out) and start BatchNorms as the identity.

    Args:
        module: Whose layers to start, those of its submodules included.
        zero_init: Start the last convolution of every unit at zero, so that it is its shortcut.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()
    if zero_init:
        for part in module.modules():
            if isinstance(part, Unit):
                nn.init.zeros_(part.conv3.weight)


def unit_reference(unit: Unit, x: Tensor) -> Tensor:
    """The unit line by line, for any dtype.

    Args:
        unit: Whose parameters to use.
        x: (B, C_in, H, W).
    """
    a = F.relu(unit.bn1(x))
    y = unit.conv1(a)
    y = unit.conv2(F.relu(unit.bn2(y)))
    y = unit.conv3(F.relu(unit.bn3(y)))
    shortcut = x if unit.shortcut is None else unit.shortcut(a)
    return shortcut + unit.drop_path(y)


class Unit(nn.Module):
    """Bottleneck with BatchNorm and ReLU in front of each convolution (He et al. 2016).

    Args:
        inputs: Channels C_in.
        outputs: Channels C_out, a multiple of 4.
        stride: Of the 3 x 3 convolution and of the shortcut.
        device: Where parameters are made.
        dtype: Their type.

    Attributes:
        drop_path: What the residual branch passes through; networks put stochastic depth here.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = outputs // 4
        self.bn1 = nn.BatchNorm2d(inputs, device=device, dtype=dtype)
        self.conv1 = make_conv(inputs, inner, 1, 1, device, dtype)
        self.bn2 = nn.BatchNorm2d(inner, device=device, dtype=dtype)
        self.conv2 = make_conv(inner, inner, 3, stride, device, dtype)
        self.bn3 = nn.BatchNorm2d(inner, device=device, dtype=dtype)
        self.conv3 = make_conv(inner, outputs, 1, 1, device, dtype)
        # The projection reads the activated map; where the sizes agree there is none at all.
        self.shortcut: nn.Conv2d | None = None
        if inputs != outputs or stride != 1:
            self.shortcut = make_conv(inputs, outputs, 1, stride, device, dtype)
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        a = F.relu_(self.bn1(x))
        y = F.relu_(self.bn2(self.conv1(a)))
        y = F.relu_(self.bn3(self.conv2(y)))
        y = self.drop_path(self.conv3(y))
        shortcut = x if self.shortcut is None else self.shortcut(a)
        return add_to(y, shortcut)


def add_to(x: Tensor, y: Tensor) -> Tensor:
    """Sum of two maps, written over the first if the type stays the same."""
    return x.add_(y) if x.dtype == y.dtype else x + y


def to_fast_format(x: Tensor) -> Tensor:
    """Lay a map (B, C, H, W) out as convolutions and BatchNorms like it: on a CPU channels last."""
    if x.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return x  # torch.func knows one format only
    return x.contiguous(memory_format=torch.channels_last)


def to_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Lay y (B, C, H, W) out as x (B, C, H, W) is."""
    return y.contiguous() if x.is_contiguous() else y


class _SigmoidGate(torch.autograd.Function):
    """(1 + sigmoid(m)) t or sigmoid(m) t, with m and t as all that is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(m: Tensor, t: Tensor, residual: bool) -> Tensor:
        """Gate t (B, C, H, W) by the sigmoid of m (B, C, H, W)."""
        gate = torch.sigmoid(m)
        return torch.addcmul(t, gate, t) if residual else gate.mul_(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        """Keep the inputs, from which a second derivative can be taken as well."""
        m, t, ctx.residual = inputs
        ctx.save_for_backward(m, t)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of m and t."""
        m, t = ctx.saved_tensors
        gate = torch.sigmoid(m)
        dm = dt = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # a second derivative is wanted
                dm = dy * t * gate * (1 - gate)
            else:
                dm = torch.ops.aten.sigmoid_backward(dy * t, gate)
        if ctx.needs_input_grad[1]:
            dt = torch.addcmul(dy, gate, dy) if ctx.residual else gate * dy
        return dm, dt, None


def sigmoid_gate(m: Tensor, t: Tensor, residual: bool) -> Tensor:
    """Gate the trunk by the sigmoid of a map.

    Args:
        m: (B, C, H, W), before the sigmoid.
        t: Trunk (B, C, H, W).
        residual: Add the trunk itself.
    """
    m = m.to(t.dtype)
    if torch.compiler.is_compiling():  # the compiler fuses the formula by itself
        gate = torch.sigmoid(m)
        return torch.addcmul(t, gate, t) if residual else gate * t
    return _SigmoidGate.apply(m, t, residual)
