"""What queries and keys of linear attention go through before they meet, fused into its segments.

    x -> act(x) -> [act(x) cos(theta t), act(x) sin(theta t)]      LRPE where there is a theta

In plain operations each arrow is a pass over memory that autograd remembers, and LRPE doubles q and
k. Here a segment's queries and keys are made when it is computed, and once more on the way back:
kept are q and k as they came and the cosines and sines of the angles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.parts import repeat_heads

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "none": lambda x: x,
}


@dataclass
class Features:
    """An activation, and LRPE behind it.

    Args:
        act: A key of ACTIVATIONS.
        theta: Angle per step of each channel, (H, D), H heads of the queries; None for no LRPE.
        positions: (N,) or (B, N) integers, needed with `theta`.
    """

    act: str = "none"
    theta: Tensor | None = None
    positions: Tensor | None = None

    def apply(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The plain form: q (B, H, N, D or 2 D), and k and v with a head for each of q's if LRPE.

        Args:
            q: (B, H, N, D).
            k: (B, G, N, D).
            v: (B, G, N, E), which only follows k.
        """
        act = ACTIVATIONS[self.act]
        q, k = act(q), act(k)
        if self.theta is None:
            return q, k, v
        assert self.positions is not None
        k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
        made = tables(self.theta, self.positions, v.dtype)
        q, k = (turn(x, *made).to(v.dtype) for x in (q, k))
        return q, k, v


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[x cos(theta t), x sin(theta t)], (B, H, N, 2 D), in float32 at least.

    Products of two of these are sum_i q_i k_i cos(theta_i (t - j)).

    Args:
        x: (B, H, N, D).
        theta: Angle per step of each channel, (H, D).
        positions: (N,) or (B, N) integers.

    Raises:
        ZooError: Positions that are no integers.
    """
    return turn(x, *tables(theta, positions, x.dtype))


def tables(theta: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles, (.., H, N, D)."""
    if positions.is_floating_point():
        raise ZooError(f"positions have dtype {positions.dtype}; lrpe counts in whole steps")
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[..., None, :, None] * theta.to(wide)[:, None]
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of LRPE side by side, as precise as the tables."""
    return torch.cat([x * cos, x * sin], -1)


def activate(act: str, x: Tensor, out: Tensor) -> Tensor:
    """Activation of x into `out`, raw: for the inside of autograd functions."""
    if act == "silu":
        return torch.ops.aten.silu.out(x, out=out)
    if act == "elu":
        return torch.ops.aten.elu.out(x, out=out).add_(1)
    if act == "relu":
        return torch.clamp_min(x, 0, out=out)
    return out.copy_(x)


def activate_backward(act: str, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Gradient of x, from that of its activation, into `out`."""
    if act == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    if act == "elu":
        args = (grad, 1.0, 1.0, 1.0, False, x)
        return torch.ops.aten.elu_backward.grad_input(*args, grad_input=out)
    if act == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    return out.copy_(grad)
