"""Counting floating point operations, the same on every device and version of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def _forward(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _product(into: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


# Some versions know the fused attention of a GPU but not that of a processor, and count nothing.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
# Products that are added in place, as hand-written backward passes do, are operations of their own.
_IN_PLACE: dict[Any, Callable[..., int]] = dict.fromkeys(
    (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _product
)


def _planes(z: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(z) * math.prod(weight[2:])


def _planes_backward(grad: Shape, z: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _planes(z, weight)


# Operators of mechanisms, which must not import the counter themselves: it brings triton along.
_OWN: dict[str, Callable[..., int]] = {
    "triplet_planes": _planes,
    "triplet_planes_backward": _planes_backward,
}


def _own() -> dict[Any, Callable[..., int]]:
    """The formulas of those operators that exist."""
    names = [name for name in _OWN if hasattr(torch.ops.zoo, name)]
    return {getattr(torch.ops.zoo, name): _OWN[name] for name in names}


def count(call: Callable[[], object]) -> int:
    """Return the floating point operations of a call.

    Matrix products, convolutions and scaled dot-product attention are counted, as
    `torch.utils.flop_counter` does, causal or not; element-wise operations are not.

    Args:
        call: What to count; it is called once.
    """
    formulas = _CPU_ATTENTION | _IN_PLACE | _own()
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return int(counter.get_total_flops())
