"""Convolution of planes with two channels to one, as matrix products.

A k x k kernel over (B, 2, P, Q) has so few channels that the library's convolution spends its time
on bookkeeping (ten times as much in its backward pass as the products below). Here the planes are
laid out as one long signal for each channel, with r = (k - 1) / 2 zeros after every row and r rows
of zeros after every plane, so that a step of (i, j) in a plane is a step of i (Q + r) + j along the
signal. The k steps along a row are written out, a (k, 2 k) matrix multiplies them, and the k rows
of products are summed along the diagonal steps:

    u[n] = sum_i Y[i, n + i (Q + r)],  Y = W U
    W[i, (c, j)] = w[c, i, j],  U[(c, j), n] = s[c, n + j]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.feature._triplet_bands import Bands
from zoo.parts import full_precision

# Planes with an axis of so many elements or fewer go through band matrices.
SHORT = 16


class _Signal:
    """Sizes of the long signal of planes.

    Args:
        samples: B.
        rows: P.
        columns: Q.
        side: Side k of the kernel.
    """

    def __init__(self, samples: int, rows: int, columns: int, side: int) -> None:
        self.samples, self.rows, self.columns, self.side = samples, rows, columns, side
        half = side // 2
        self.height, self.pitch = rows + half, columns + half
        self.length = samples * self.height * self.pitch
        self.start = half * self.pitch + half  # zeros in front of the first element
        self.steps = self.length + (side - 1) * self.pitch

    def write(self, z: Tensor) -> Tensor:
        """Planes (B, c, P, Q) to signals (c, steps + k - 1)."""
        s = z.new_zeros(z.shape[1], self.steps + self.side - 1)
        self.read(s[:, self.start : self.start + self.length]).copy_(z.transpose(0, 1))
        return s

    def read(self, s: Tensor) -> Tensor:
        """Signals (c, length) as planes (c, B, P, Q)."""
        planes = s.view(s.shape[0], self.samples, self.height, self.pitch)
        return planes[:, :, : self.rows, : self.columns]

    def along_rows(self, s: Tensor) -> Tensor:
        """U (2 k, steps): the signals, moved by 0 .. k - 1."""
        return s.unfold(1, self.steps, 1).reshape(-1, self.steps)

    def sum_rows(self, y: Tensor) -> Tensor:
        """Rows of products (k, steps), moved against each other by a row of the plane, summed."""
        shape = (self.side, self.length)
        return y.as_strided(shape, (self.steps + self.pitch, 1)).sum(0, keepdim=True)

    def spread_rows(self, s: Tensor) -> Tensor:
        """What `sum_rows` does, backwards: (1, length) to (k, steps)."""
        y = s.new_zeros(self.side, self.steps)
        shape = (self.side, self.length)
        y.as_strided(shape, (self.steps + self.pitch, 1)).copy_(s)
        return y

    def sum_steps(self, du: Tensor) -> Tensor:
        """What `along_rows` does, backwards: (2 k, steps) to (2, length), without the margins."""
        ds = du.new_zeros(2, self.steps + self.side - 1)
        for j, row in enumerate(du.view(2, self.side, -1).unbind(1)):
            ds[:, j : j + self.steps] += row
        return ds[:, self.start : self.start + self.length]


# Opaque to the compiler, which makes worse code of the moved signals than they have here.
@torch.library.custom_op("zoo::triplet_planes", mutates_args=())
def _correlate(z: Tensor, weight: Tensor) -> Tensor:
    """Planes (B, 2, P, Q) and a kernel (1, 2, k, k) to planes (B, 1, P, Q)."""
    with full_precision(z):
        if z.shape[3] <= SHORT:
            return Bands(z.shape[0], z.shape[2], z.shape[3], weight.shape[-1]).forward(z, weight)
        signal = _Signal(z.shape[0], z.shape[2], z.shape[3], weight.shape[-1])
        y = _matrix(weight) @ signal.along_rows(signal.write(z))
    return signal.read(signal.sum_rows(y)).transpose(0, 1).contiguous()


@torch.library.custom_op("zoo::triplet_planes_backward", mutates_args=())
def _correlate_backward(grad: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of planes and kernel."""
    with full_precision(z):
        if z.shape[3] <= SHORT:
            bands = Bands(z.shape[0], z.shape[2], z.shape[3], weight.shape[-1])
            return bands.backward(grad, z, weight)
        signal = _Signal(z.shape[0], z.shape[2], z.shape[3], weight.shape[-1])
        flat = grad.new_zeros(1, signal.length)
        signal.read(flat).copy_(grad.transpose(0, 1))
        dy = signal.spread_rows(flat)
        ds = signal.sum_steps(_matrix(weight).t() @ dy)
        dw = dy @ signal.along_rows(signal.write(z)).t()
    dz = signal.read(ds).transpose(0, 1).contiguous()
    return dz, dw.unflatten(1, (2, -1)).transpose(0, 1)[None].contiguous()


def _matrix(weight: Tensor) -> Tensor:
    """A kernel (1, 2, k, k) as W (k, 2 k)."""
    return weight[0].transpose(0, 1).flatten(1)


@_correlate.register_fake
def _(z: Tensor, weight: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], 1, *z.shape[2:])


@_correlate_backward.register_fake
def _(grad: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    z, weight = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return _correlate_backward(grad, z, weight)
    # create_graph: someone wants a second derivative, which PyTorch's own form has.
    half = [weight.shape[-1] // 2] * 2
    arguments = (grad, z, weight, None, [1, 1], half, [1, 1], False, [0, 0], 1)
    with full_precision(z):
        found = torch.ops.aten.convolution_backward(*arguments, [True, True, False])
    return found[0], found[1]


_correlate.register_autograd(_differentiate, setup_context=_keep)


class PlaneConv(nn.Conv2d):
    """A convolution of two channels to one that keeps the size of the planes; no bias.

    Args:
        kernel_size: Side k, odd.
        device: Where the kernel is made.
        dtype: Its type.
    """

    def __init__(
        self,
        kernel_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *(2, 1, kernel_size),
            padding=kernel_size // 2,
            bias=False,
            device=device,
            dtype=dtype,
        )

    def forward(self, z: Tensor) -> Tensor:
        """Planes (B, 2, P, Q) to (B, 1, P, Q), in the planes' type and outside autocast."""
        weight = self.weight.to(z.dtype)
        # Transforms of torch.func look into the plain form only.
        if z.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
            if z.shape[2] < z.shape[3]:  # the short axis last
                return _correlate(z.transpose(2, 3), weight.transpose(2, 3)).transpose(2, 3)
            return _correlate(z, weight)
        with full_precision(z):
            return F.conv2d(z, weight, padding=self.padding)
