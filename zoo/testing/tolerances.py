"""The one table of tolerances, keyed by type and back-end; nothing else loosens or tightens them.

Two measures, both relative to the size of what is expected: the root mean square of the error over
the root mean square of the expected values, and every single element. They never depend on the
machine or on an environment variable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How far two results that should be equal may be apart.

    Args:
        output: RMS of the error of an output over the RMS of what is expected.
        gradient: The same for gradients.
        element: Largest error of one element over (|its value| + RMS of all expected values).
    """

    output: float
    gradient: float
    element: float


TOLERANCES = {
    (torch.float64, "torch"): Tolerance(1e-12, 1e-11, 1e-10),
    (torch.float32, "torch"): Tolerance(1e-5, 3e-5, 3e-4),
    (torch.float16, "torch"): Tolerance(2e-3, 5e-3, 5e-2),
    (torch.bfloat16, "torch"): Tolerance(1e-2, 2e-2, 1e-1),
    # A whole layer under autocast: projections, scores and weights are rounded one after another.
    (torch.bfloat16, "autocast"): Tolerance(2e-2, 5e-2, 2e-1),
    (torch.float32, "triton"): Tolerance(1e-5, 3e-5, 3e-4),
    (torch.float16, "triton"): Tolerance(2e-3, 5e-3, 5e-2),
    (torch.bfloat16, "triton"): Tolerance(1e-2, 2e-2, 1e-1),
}


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def assert_close(
    actual: Tensor,
    expected: Tensor,
    what: str = "values",
    *,
    gradient: bool = False,
    backend: str = "torch",
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that two tensors are equal to rounding, by RMS and element by element.

    Args:
        actual: What was computed.
        expected: What it should be, of the same shape.
        what: Name for the message.
        gradient: Hold it to the tolerance of gradients.
        backend: Row of the table.
        dtype: Row of the table; default the coarser type of the two tensors.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if dtype is None:
        dtype = max(actual.dtype, expected.dtype, key=lambda t: torch.finfo(t).eps)
    limit = TOLERANCES[dtype, backend]
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert bool(e.isfinite().all()), f"{what}: the expected values are not all finite"
    assert bool(a.isfinite().all()), f"{what}: {int((~a.isfinite()).sum())} values are not finite"
    size = rms(e)
    if gradient and size < torch.finfo(dtype).eps:
        size = 0.0  # zero in exact arithmetic: what is left of it is its own rounding
    # Where zeros are expected, rounding is measured against numbers of size one.
    allowed = (limit.gradient if gradient else limit.output) * (size or 1.0)
    error = rms(a - e)
    assert error <= allowed, (
        f"{what}: RMS error {error:.3g} is above {allowed:.3g} (RMS {size:.3g})"
    )
    if a.numel():
        ratio = ((a - e).abs() / (e.abs() + (size or 1.0))).max()
        assert float(ratio) <= limit.element, (
            f"{what}: an element is off by {float(ratio):.3g} of its size, allowed {limit.element}"
        )
