"""The convolution of `_triplet_planes` for planes with a short axis, such as (512, 14).

Along a short axis Q the kernel is a band matrix, so that nothing is written out k times but the
products. The long axis of all samples is one signal, with r = (k - 1) / 2 zeros after every plane:

    u[q, n] = sum_i Y[i, q, n + i],  Y = T s,  T[(i, q), (c, q')] = w[c, i, q' - q + r]

Y holds k numbers for each element, in a product with 2 k Q multiply-adds for each instead of 2 k^2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def _offsets(columns: int, side: int) -> tuple[Tensor, Tensor]:
    """Step j of the kernel for every pair (q, q'), and whether there is one."""
    offset = torch.arange(columns) - torch.arange(columns)[:, None] + side // 2
    return offset.clamp(0, side - 1), (offset >= 0) & (offset < side)


class Bands:
    """Planes with a short second axis as signals along the first.

    Args:
        samples: B.
        rows: P.
        columns: Q, short.
        side: Side k of the kernel.
    """

    def __init__(self, samples: int, rows: int, columns: int, side: int) -> None:
        self.samples, self.rows, self.columns, self.side = samples, rows, columns, side
        self.half = side // 2
        self.height = rows + self.half
        self.length = samples * self.height
        self.steps = self.length + side - 1
        self.offset, self.inside = _offsets(columns, side)

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        """Planes (B, 2, P, Q) and a kernel (1, 2, k, k) to planes (B, 1, P, Q)."""
        y = self._matrix(weight) @ self._write(z)
        u = self._diagonals(y).sum(0)
        return self._read(u[None]).contiguous()

    def backward(self, grad: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of planes and kernel."""
        d = grad.new_zeros(1, self.columns, self.length)
        self._read(d).copy_(grad)
        dy = grad.new_zeros(self.side * self.columns, self.steps)
        self._diagonals(dy).copy_(d)
        ds = (self._matrix(weight).t() @ dy).view(2, self.columns, -1)
        dz = self._read(ds[..., self.half : self.half + self.length]).contiguous()
        dt = (dy @ self._write(z).t()).view(self.side, self.columns, 2, self.columns)
        bands = dt.permute(2, 0, 1, 3)[..., self.inside].flatten(0, 1)  # (2 k, pairs)
        dw = grad.new_zeros(2 * self.side, self.side)
        dw.index_add_(1, self.offset[self.inside], bands)
        return dz, dw.view(1, 2, self.side, self.side)

    def _matrix(self, weight: Tensor) -> Tensor:
        """T (k Q, 2 Q)."""
        bands = weight[0][:, :, self.offset] * self.inside  # (2, k, Q, Q)
        return bands.permute(1, 2, 0, 3).reshape(self.side * self.columns, -1)

    def _write(self, z: Tensor) -> Tensor:
        """Planes (B, 2, P, Q) to signals (2 Q, steps)."""
        s = z.new_zeros(2, self.columns, self.steps)
        self._read(s[..., self.half : self.half + self.length]).copy_(z)
        return s.flatten(0, 1)

    def _read(self, s: Tensor) -> Tensor:
        """Signals (c, Q, length) as planes (B, c, P, Q)."""
        planes = s.unflatten(2, (self.samples, self.height))[..., : self.rows]
        return planes.permute(2, 0, 3, 1)

    def _diagonals(self, y: Tensor) -> Tensor:
        """Products (k Q, steps) as (k, Q, length), each of k a step further along the signal."""
        shape = (self.side, self.columns, self.length)
        return y.as_strided(shape, (self.columns * self.steps + 1, self.steps, 1))
