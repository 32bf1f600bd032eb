"""Neighborhood attention in one, two and three dimensions as Triton kernels.

Every token of a grid attends to a window of near tokens (Hassani et al. 2024, "Faster Neighborhood
Attention"). A box of queries visits the boxes of keys that its windows meet; scores live in
registers, windows are told from coordinates, and a box of keys that lies in the windows of all its
queries needs no mask. The sliding window of language models is the case of one axis.

    s_ij = scale q_i . k_j                                      j in the window of i
    o_i  = sum_j p_ij v_j,    p_ij = exp(s_ij - lse_i)
    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - do_i . o_i)
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

q, k, v, o and a number per row are kept. The gradients of a box of keys belong to one program that
walks the queries which see it in all heads of its group: no atomics, the same numbers in every run.
Sums are float32. Tokens stay in the grid's order: the row of a head is one piece of memory anyway,
so that residue classes of a dilation are only steps between rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import refuse
from zoo.kernels._neighborhood import _backward_keys, _backward_queries, _forward
from zoo.kernels._neighborhood_tiles import Rule, count_pairs, count_tiles, with_boxes
from zoo.kernels._operator import refuse_second, spread, wanted
from zoo.kernels.common import (
    INTERPRET,
    LEAST,
    Head,
    Inputs,
    Results,
    head,
    like,
    rows,
    strides,
)

HEAD_DIM = 128
# Queries and keys of a box.
ROWS, KEYS = 64, 64
# Both, where float32 products have to be exact: these keep their factors in registers.
EXACT = 32


class Options(NamedTuple):
    """The other arguments of `neighborhood_attention`."""

    shape: Sequence[int]
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    stride: Sequence[int]
    causal: Sequence[bool]
    clip: bool
    scale: float


def _three(values: Sequence[Any], fill: Any) -> Any:
    """One to three entries as three, for a grid with leading axes of one token."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _rule(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    clip: bool,
) -> tuple[tuple[int, ...], Rule]:
    """Three axes of the grid, and its rule without boxes."""
    grid = _three(shape, 1)
    axes = next((3 - a for a in range(2) if grid[a] != 1), 1)
    w, d, s = (_three(x, 1) for x in (kernel_size, dilation, stride))
    return grid, Rule(w, d, s, _three(causal, False), clip, axes)


class _Launch(NamedTuple):
    """What all kernels of one pass are started with."""

    grid: tuple[int, ...]
    rule: Rule
    head: Head
    warps: int
    stages: int

    def programs(self, box: tuple[int, int, int], heads: int) -> tuple[int]:
        """Programs for boxes of this shape in so many heads of so many samples."""
        count = count_tiles(self.grid, self.rule, box) * heads
        if count >= 2**31:
            raise ZooError(f"{count} boxes of tokens over all heads and samples; allowed: 2^31 - 1")
        return (count,)


def _launch(x: Inputs, options: Options, backward: bool) -> _Launch:
    """Choose boxes, warps and stages: for half precision as an H200 likes them at D = 128."""
    q = x.q
    if not INTERPRET and q.device.type != "cuda":
        raise ZooError(f"q is on {q.device}; allowed: CUDA devices, or TRITON_INTERPRET=1")
    grid, rule = _rule(*options[:6])
    own = head(q, x.v)
    width = max(own.block_d, own.block_e)
    half = q.element_size() < 4
    if not half and own.precision == "ieee":
        queries, keys = EXACT, EXACT
    else:
        queries, keys = ROWS, KEYS
    assert min(queries, keys) >= LEAST
    warps = 8 if width > 64 and not half else 4
    stages = 3 if half and not backward else 2
    return _Launch(grid, with_boxes(grid, rule, queries, keys), own, warps, stages)


def _outputs(x: Inputs) -> tuple[Tensor, Tensor]:
    """Room for `Results`."""
    return like(x.q, x.v.shape[3]), x.q.new_empty(x.q.shape[:3], dtype=torch.float32)


@custom_op("zoo::neighborhood_fwd", mutates_args=())
@spread
def _neighborhood_fwd(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Attend; what comes out are `Results`."""
    start = _launch(x, options, backward=False)
    q, k, v = (rows(each) for each in x)
    heads, groups = q.shape[1], k.shape[1]
    out, lse = _outputs(x)
    if out.numel():
        with torch.cuda.device_of(q):
            _forward[start.programs(start.rule.rows, q.shape[0] * heads)](
                q, k, v, out, lse, strides(q), strides(k), strides(v), strides(out),
                heads, heads // groups, start.grid, options.scale, start.rule, start.head,
                num_warps=start.warps, num_stages=start.stages,
            )  # fmt: skip
    return out, lse


@_neighborhood_fwd.register_fake
@spread
def _(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    return _outputs(x)


@custom_op("zoo::neighborhood_bwd", mutates_args=())
@spread
def _neighborhood_bwd(
    grad: Tensor, x: Inputs, results: Results, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B, H, N, D), k (B, G, N, D) and v (B, G, N, E)."""
    start = _launch(x, options, backward=True)
    grad, q, k, v, out = (rows(each) for each in (grad, *x, results.out))
    lse = results.lse.contiguous()
    heads, groups = q.shape[1], k.shape[1]
    dq, dk, dv = (like(each) for each in x)
    delta = torch.empty_like(lse)
    if q.numel():
        common = (heads // groups, start.grid, options.scale, start.rule, start.head)
        launch = {"num_warps": start.warps, "num_stages": start.stages}
        with torch.cuda.device_of(q):
            _backward_queries[start.programs(start.rule.rows, q.shape[0] * heads)](
                grad, q, k, v, out, lse, delta, dq, strides(grad), strides(q), strides(k),
                strides(v), strides(out), strides(dq), heads, *common, **launch,
            )  # fmt: skip
            _backward_keys[start.programs(start.rule.keys, q.shape[0] * groups)](
                grad, q, k, v, lse, delta, dk, dv, strides(grad), strides(q), strides(k),
                strides(v), strides(dk), strides(dv), groups, *common, **launch,
            )  # fmt: skip
    return dq, dk, dv


@_neighborhood_bwd.register_fake
@spread
def _(grad: Tensor, x: Inputs, results: Results, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    return like(x.q), like(x.k), like(x.v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * len(ctx.options)
    if grad is None:
        return None, None, None, *rest
    found = _neighborhood_bwd(grad, *ctx.saved_tensors, *ctx.options)
    return *wanted(ctx, found), *rest


_neighborhood_fwd.register_autograd(_backward, setup_context=_keep)
refuse_second(
    _neighborhood_bwd,
    "the Triton kernel of neighborhood attention has no second derivative; take backend='torch' "
    "or backend='reference'",
)


@register_flop_formula(torch.ops.zoo.neighborhood_fwd)
def _forward_flops(q: Any, k: Any, v: Any, *rule: Any, **kwargs: Any) -> int:
    """Two products of the pairs that meet; what tiles hold besides is not counted."""
    return 2 * q[0] * q[1] * count_pairs(*_rule(*rule[:6])) * (q[3] + v[3])


@register_flop_formula(torch.ops.zoo.neighborhood_bwd)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rule: Any, **kwargs: Any
) -> int:
    """Five products of the pairs that meet: the scores once more, and four for the gradients."""
    return 2 * q[0] * q[1] * count_pairs(*_rule(*rule[:6])) * (3 * q[3] + 2 * v[3])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    per_axis: dict[str, Sequence[Any]],
    clip: bool,
) -> None:
    if not all(x.ndim == 4 for x in (q, k, v)):
        raise ZooError(f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes; allowed: 4, (B, H, N, D)")
    if not 1 <= len(shape) <= 3 or any(x < 0 for x in shape):
        raise ZooError(f"shape={tuple(shape)!r}; allowed: one to three sizes")
    for name, values in per_axis.items():
        if len(values) != len(shape):
            raise ZooError(
                f"{name}={tuple(values)!r} has {len(values)} entries; allowed: {len(shape)}, one "
                f"for each axis of shape={tuple(shape)!r}"
            )
    fits = q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3] and q.shape[2] == k.shape[2]
    if not fits or q.shape[0] != k.shape[0]:
        raise ZooError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; allowed: "
            "(B, H, N, D), (B, G, N, D), (B, G, N, E)"
        )
    if q.shape[2] != math.prod(shape):
        raise ZooError(f"q has {q.shape[2]} tokens; allowed: {math.prod(shape)}, shape={shape!r}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ZooError(f"k has {k.shape[1]} heads; allowed: divisors of the {q.shape[1]} of q")
    for axis, (x, w, d, s, c) in enumerate(zip(shape, *per_axis.values(), strict=True)):
        if w < 1 or d < 1 or not 1 <= s <= w:
            raise ZooError(
                f"kernel_size={w}, dilation={d}, stride={s} on axis {axis}; allowed: at least 1 "
                "each, and stride up to kernel_size"
            )
        if clip and not c and s > 1:
            raise ZooError(f"stride={s} on axis {axis} with clip=True; allowed: 1, or causal")
        if not (clip or c) and 0 < x < w * d:
            raise ZooError(
                f"kernel_size={w} times dilation={d} on axis {axis}; allowed: up to its {x} tokens"
            )


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    clip: bool = False,
) -> Tensor:
    """Softmax attention of every token of a grid to a window of its neighbors.

    On an axis with dilation d, coordinate i belongs to residue class i mod d, of which it is number
    i div d; all that follows counts within the class. The leader of i is i where stride is 1, else
    the token s // 2 (causal: s - 1) after the first of its run of s, at most the last one.

        shifted  the W keys from c - W // 2 on, c the leader, moved so that the window fits
        causal   keys up to i, less than W before its leader
        clip     keys with |i - j| <= W // 2, or causal as above with no limit on W

    A window is the product of its axes. Second derivatives raise.

    Args:
        q: (B, H, N, D), the tokens of the grid row by row; half precision or float32.
        k: (B, G, N, D), G dividing H; query head h meets key head h // (H / G).
        v: (B, G, N, E).
        shape: One to three sizes X whose product is N.
        kernel_size: W on each axis.
        dilation: d on each axis.
        stride: s on each axis.
        causal: Whether an axis is causal.
        scale: Factor on the dot products.
        clip: Windows of axes that are not causal are cut at the border instead of shifted.

    Returns:
        (B, H, N, E), in memory with the tokens outside the heads.

    Raises:
        ZooError: Sizes that do not fit, or tensors that the kernel cannot take.
    """
    per_axis = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    _check(q, k, v, shape, {**per_axis, "causal": causal}, clip)
    if torch.is_autocast_enabled(q.device.type):
        half = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(half), k.to(half), v.to(half)
    reason = refuse(q, k, v, head_dim=HEAD_DIM, by_name=True)
    if reason is not None:
        raise ZooError(f"the Triton kernel cannot run: {reason}")
    rule = (list(shape), list(kernel_size), list(dilation), list(stride), list(causal), clip)
    return _neighborhood_fwd(q, k, v, *rule, scale)[0]
