"""What neighborhood attention refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.select._grid import Grid


def check_rpb(kernel: Sequence[int], causal: Sequence[bool]) -> None:
    """Refuse windows for which a relative position bias is not defined.

    Raises:
        ZooError: Names the axis.
    """
    for axis, (w, c) in enumerate(zip(kernel, causal, strict=True)):
        if w % 2 == 0:
            raise ZooError(
                f"a relative position bias needs odd windows, but kernel_size={w} of axis {axis}"
            )
        if c:
            raise ZooError(f"a relative position bias is not defined with causal axis {axis}")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    rpb: Tensor | None,
    key_bias: Tensor | None,
    dropout: float,
) -> None:
    """Refuse tensors that do not fit the grid or each other; arguments as `neighborhood_attention`.

    Raises:
        ZooError: Names the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[0] != q.shape[0] or x.shape[2] != grid.length:
            raise ZooError(
                f"{name} of shape {tuple(x.shape)} must be (batch, heads, {grid.length}, width) "
                f"for the grid {grid.shape}"
            )
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ZooError(f"{name} has dtype {x.dtype}; allowed: one floating type for q, k and v")
    heads, groups = q.shape[1], k.shape[1]
    if k.shape[3] != q.shape[3] or v.shape[1] != groups or groups < 1 or heads % groups:
        raise ZooError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must have the same heads, a divisor of "
            f"the {heads} of q, and k the width {q.shape[3]} of q"
        )
    if rpb is not None:
        check_rpb([w.width for w in grid.windows], [w.causal for w in grid.windows])
        wanted = (heads, *(2 * w.width - 1 for w in grid.windows))
        if tuple(rpb.shape) != wanted:
            raise ZooError(f"rpb of shape {tuple(rpb.shape)} does not fit; allowed: {wanted}")
    if key_bias is not None and tuple(key_bias.shape) not in {
        (n, grid.length) for n in (1, len(q))
    }:
        raise ZooError(
            f"key_bias of shape {tuple(key_bias.shape)} does not fit; allowed: (1 or {len(q)}, "
            f"{grid.length})"
        )
    checks.number("dropout", dropout, 0, below=1)


def check_extra(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Additional keys and values as a pair, or None without any.

    Raises:
        ZooError: One without the other, or shapes that do not fit.
    """
    if keys is None and values is None:
        return None
    if keys is None or values is None:
        raise ZooError("additional_keys and additional_values belong together; one is None")
    count = keys.shape[2] if keys.ndim == 4 else 0
    wanted = [(q.shape[0], k.shape[1], count, x.shape[3]) for x in (k, v)]
    if count < 1 or tuple(keys.shape) != wanted[0] or tuple(values.shape) != wanted[1]:
        raise ZooError(
            f"additional_keys {tuple(keys.shape)} and additional_values {tuple(values.shape)} "
            f"must be (batch {q.shape[0]}, heads {k.shape[1]}, at least 1, width) with the widths "
            f"{k.shape[3]} and {v.shape[3]}"
        )
    return keys, values
