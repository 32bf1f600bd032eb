"""Neighborhood attention as functions: dense, by gathering, by tiles, and as kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.host.refusals import refuse_tracing
from zoo.ops.partial import merge, partial_attention
from zoo.parts import full_precision, mask_scores, repeat_heads
from zoo.select._flex import flex_windows, refuse_flex
from zoo.select._grid import Grid, window_tiles
from zoo.select._halo_plan import Window
from zoo.select._neighborhood_input import check_extra, check_tensors

T = TypeVar("T")
BACKENDS = ("auto", "reference", "gather", "torch", "flex", "triton")


def any_whole(name: str, value: object, *, also: str) -> int:
    """A whole number; `check_sizes` knows the bounds, and names the axis."""
    return checks.whole(name, value, None, also=also)


def per_axis(
    name: str, value: T | Sequence[T], ndim: int, check: Callable[..., T]
) -> tuple[T, ...]:
    """One value for each axis.

    Raises:
        ZooError: Another number of values, or another type.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    values: tuple[T, ...] = tuple(value) if listed else (value,) * ndim  # type: ignore[arg-type,assignment]
    if len(values) != ndim:
        raise ZooError(f"{name}={value!r} has {len(values)} entries for {ndim} axes")
    return tuple(check(name, item, also="one or one for each axis") for item in values)


def make_windows(
    kernel: tuple[int, ...], stride: tuple[int, ...], causal: tuple[bool, ...]
) -> tuple[Window, ...]:
    """The window of each axis: even ones reach one further back than ahead."""
    return tuple(
        Window(w - 1, 0, s, True, False) if c else Window(w // 2, w - w // 2 - 1, s)
        for w, s, c in zip(kernel, stride, causal, strict=True)
    )


def check_sizes(
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    shape: tuple[int, ...] | None,
) -> None:
    """Refuse windows that are none or that do not fit their grid.

    Raises:
        ZooError: Names the axis.
    """
    for axis, (w, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
        checks.whole("kernel_size", w, 2, also=f"on axis {axis}")
        checks.whole("dilation", d, also=f"on axis {axis}")
        checks.whole("stride", s, 1, w, also=f"the kernel_size on axis {axis}")
        if shape is not None and w * d > shape[axis]:
            raise ZooError(
                f"kernel_size={w} times dilation={d} is above the {shape[axis]} tokens of axis "
                f"{axis}"
            )


def make_grid(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Grid:
    """Check the arguments of `na_mask` and `neighborhood_attention`.

    Raises:
        ZooError: As there.
    """
    also = "one for each of 1 to 3 axes"
    if isinstance(shape, Sequence) and not isinstance(shape, str):
        sizes = checks.wholes("shape", shape, also=also)
    else:
        sizes = (checks.whole("shape", shape, also=also),)
    ndim = len(sizes)
    if ndim > 3:
        raise checks.wrong("shape", shape, "1 to 3 whole numbers of at least 1")
    kernel = per_axis("kernel_size", kernel_size, ndim, any_whole)
    steps = per_axis("dilation", dilation, ndim, any_whole)
    strides = per_axis("stride", stride, ndim, any_whole)
    causal = per_axis("is_causal", is_causal, ndim, checks.flag)
    check_sizes(kernel, steps, strides, sizes)
    return Grid(sizes, make_windows(kernel, strides, causal), steps)


def na_mask(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Who sees whom, (S, S) boolean: row the query, column the key, tokens in reading order.

    Args:
        shape: Lengths of the axes, 1 to 3 of them, whose product is S.
        kernel_size: Keys of a window along each axis, at least 2.
        dilation: Distance of neighbours along each axis.
        stride: Queries that share a window along each axis.
        is_causal: Whether an axis shows no later key.

    Raises:
        ZooError: A size that does not fit; the message names the axis.
    """
    return make_grid(shape, kernel_size, dilation, stride, is_causal).mask()


class Inputs(NamedTuple):
    """What a backend is given.

    Args:
        q: (B, H, S, D).
        k: (B, G, S, D).
        v: (B, G, S, E).
        grid: The grid.
        scale: Factor on dot products.
        rpb: (H, 2 w - 1, ..), or None.
        extra: Keys and values that every query sees, (B, G, X, D) and (B, G, X, E), or None.
        lse: The logarithms of the rows' sums are wanted.
        by_name: The backend was asked for by name.
        key_bias: Added to the scores of keys, a constant, (B|1, S), or None.
        dropout: On the weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: Grid
    scale: float
    rpb: Tensor | None = None
    extra: tuple[Tensor, Tensor] | None = None
    lse: bool = False
    by_name: bool = False
    key_bias: Tensor | None = None
    dropout: float = 0.0


def _softmax(scores: Tensor, mask: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    """Weights of the scores in front of those of the extra keys, and the rows' logarithms."""
    scores = mask_scores(scores, mask)
    if given.extra is not None:
        keys = repeat_heads(given.extra[0], given.q.shape[1])
        scores = torch.cat([scores, (given.q @ keys.mT).to(scores.dtype) * given.scale], -1)
    return F.dropout(scores.softmax(-1), given.dropout), scores.logsumexp(-1)


def _add_extra(y: Tensor, weights: Tensor, given: Inputs) -> Tensor:
    if given.extra is None:
        return y
    return y + weights @ repeat_heads(given.extra[1], given.q.shape[1])


def reference(given: Inputs) -> tuple[Tensor, Tensor]:
    """The equations with all S x S scores, any dtype."""
    q, grid = given.q, given.grid
    k, v = repeat_heads(given.k, q.shape[1]), repeat_heads(given.v, q.shape[1])
    scores = (q @ k.mT) * given.scale
    if given.rpb is not None:
        index = torch.arange(q.shape[2], device=q.device)
        scores = scores + given.rpb.flatten(1)[:, grid.offsets(index[:, None], index)]
    if given.key_bias is not None:
        scores = scores + given.key_bias[:, None, None]
    weights, lse = _softmax(scores, grid.mask(q.device), given)
    near = weights[..., : k.shape[2]] @ v
    return _add_extra(near, weights[..., k.shape[2] :], given), lse


def gather(given: Inputs) -> tuple[Tensor, Tensor]:
    """A copy of the window's keys and values for each query: the straightforward sparse form."""
    q, grid = given.q, given.grid
    k, v = repeat_heads(given.k, q.shape[1]), repeat_heads(given.v, q.shape[1])
    table, counts = grid.table(q.device)
    near = k.index_select(2, table.flatten()).unflatten(2, table.shape)  # (B, H, S, K, D)
    scores = torch.einsum("bhsd,bhskd->bhsk", q, near) * given.scale
    if given.rpb is not None:
        index = torch.arange(q.shape[2], device=q.device)[:, None]
        scores = scores + given.rpb.flatten(1)[:, grid.offsets(index, table)]
    if given.key_bias is not None:
        scores = scores + given.key_bias[:, None, table]
    weights, lse = _softmax(scores, counts, given)
    values = v.index_select(2, table.flatten()).unflatten(2, table.shape)
    y = torch.einsum("bhsk,bhskd->bhsd", weights[..., : table.shape[1]], values)
    return _add_extra(y, weights[..., table.shape[1] :], given), lse


def tiles(given: Inputs) -> tuple[Tensor, Tensor]:
    """Tiles of queries with the halos of their keys."""
    q, k, v, grid, scale = given[:5]
    more: dict[str, Any] = {"rpb": given.rpb, "key_bias": given.key_bias}
    out, lse = window_tiles(q, k, v, grid, scale=scale, dropout=given.dropout, **more)
    if given.extra is None:
        return out, lse
    keys, values = (repeat_heads(x, q.shape[1]) for x in given.extra)
    with full_precision(q):
        far, far_lse = partial_attention(q, keys, values, scale=scale)
        return merge([out, far.to(out.dtype)], [lse, far_lse.to(lse.dtype)])


def kernel_tiles(given: Inputs) -> Tensor:
    """The Triton kernel."""
    from zoo.kernels.neighborhood import neighborhood_attention as kernel

    q, k, v, grid, scale = given[:5]
    return kernel(q, k, v, *kernel_rule(grid), scale)


def kernel_rule(grid: Grid) -> tuple[Any, Any, Any, Any, Any]:
    """Shape, kernel, dilation, stride and causality, as the kernel wants them."""
    windows = grid.windows
    return (
        grid.shape,
        tuple(w.width for w in windows),
        grid.dilation,
        tuple(w.stride for w in windows),
        tuple(w.causal for w in windows),
    )


def _flex(given: Inputs) -> Tensor:
    return flex_windows(*given[:3], given.grid, given.scale)


def _refuse_extras(given: Inputs) -> str | None:
    if given.rpb is not None:
        return "it takes no relative position bias (rpb)"
    if given.extra is not None:
        return "it takes no additional keys"
    if given.key_bias is not None:
        return "it takes no bias on keys (key_bias)"
    if given.dropout:
        return "it has no dropout on the weights"
    return "it returns no log-sum-exp" if given.lse else None


def refuse_kernel(given: Inputs) -> str | None:
    """Why the Triton kernel cannot take this, or None."""
    reason = _refuse_extras(given)
    if reason is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "torch.func cannot look into its kernels"
    for w, d, n in zip(given.grid.windows, given.grid.dilation, given.grid.shape, strict=True):
        if w.width * d > n:
            return f"a window of {w.width} with dilation {d} is longer than its axis of {n} tokens"
    if not given.q.numel():
        return "there are no queries"
    from zoo.kernels import refuse

    return refuse(given.q, given.k, given.v, by_name=given.by_name)


def _refuse_flex(given: Inputs) -> str | None:
    return _refuse_extras(given) or refuse_flex(*given[:3], given.by_name)


def refuse_tiles(given: Inputs) -> str | None:
    """Why the tiles cannot take this, or None."""
    if given.dropout and given.extra is not None:
        return "it has no dropout on the weights of additional keys"
    if given.q.is_meta:
        return "it looks at numbers, and meta tensors have none"
    return refuse_tracing()


_Form = tuple[Callable[[Inputs], str | None], Callable[[Inputs], tuple[Tensor, Any]]]
_FORMS: dict[str, _Form] = {
    "triton": (refuse_kernel, lambda given: (kernel_tiles(given), None)),
    "flex": (_refuse_flex, lambda given: (_flex(given), None)),
    "torch": (refuse_tiles, tiles),
    "gather": (lambda given: None, gather),
    "reference": (lambda given: None, reference),
}


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each token of a grid to its nearest ones.

    Args:
        q: (B, H, S, D), the grid flattened in reading order.
        k: (B, G, S, D), G dividing H.
        v: (B, G, S, E).
        shape: Lengths of the axes, 1 to 3 of them, whose product is S.
        kernel_size: Keys w of a window along each axis, at least 2.
        dilation: Distance of neighbours along each axis; w times it fits the axis.
        stride: Queries that share a window along each axis, 1 to w.
        is_causal: Whether an axis shows no later key.
        scale: Factor on dot products; default ``1 / sqrt(D)``.
        rpb: Added to the scores by the distance within the residue class, (H, 2 w - 1, ..) with an
            axis for each of the grid's; for odd windows that are not causal.
        additional_keys: Keys that every query sees, (B, G, X, D), in one softmax with the others.
        additional_values: Their values, (B, G, X, E).
        key_bias: Added to the scores of keys, a constant without gradient, (B|1, S).
        dropout: Rate on the weights, at every call.
        return_lse: Also return the natural logarithm of each row's sum.
        backend: "auto" takes the Triton kernel on CUDA and tiles elsewhere; "torch" (tiles),
            "triton", "flex", "gather" (a copy of its keys for each query) or "reference" (S x S).

    Returns:
        (B, H, S, E); with `return_lse` also (B, H, S).

    Raises:
        ZooError: An argument that does not fit, or a backend that cannot take it.
    """
    grid = make_grid(shape, kernel_size, dilation, stride, is_causal)
    check_tensors(q, k, v, grid, rpb, key_bias, dropout)
    extra = check_extra(q, k, v, additional_keys, additional_values)
    checks.choice("backend", backend, BACKENDS)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    by_name = backend != "auto"
    key_bias = None if key_bias is None else key_bias.detach()
    given = Inputs(q, k, v, grid, scale, rpb, extra, return_lse, by_name, key_bias, dropout)
    if backend == "auto":
        order = ("triton", "torch", "gather")
        backend = next(name for name in order if not _FORMS[name][0](given))
    refuse, run = _FORMS[backend]
    reason = refuse(given)
    if reason:
        raise ZooError(f"backend={backend!r} cannot take this: {reason}")
    out, lse = run(given)
    return (out, lse) if return_lse else out
