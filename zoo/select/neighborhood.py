"""Neighborhood attention (Hassani et al. 2024, "Faster Neighborhood Attention"): nearest tokens.

Each token of a grid of 1 to 3 axes sees a window of nearest tokens, the product of one interval for
each axis (w keys, dilation d, stride s; X tokens along the axis). Near a border the window moves
inwards, so that every query of an axis that is not causal sees exactly w keys:

    residue class   g = i mod d, i' = i div d, only keys of the same class, X_g tokens of it
    leader          l = i'; with a stride min((i' div s) s + s div 2, X_g - 1)
    window          w keys from clamp(l - w div 2, 0, X_g - w) on
    causal axis     l = min((i' div s) s + s - 1, X_g - 1), keys k' <= i' with l - k' < w

Even windows reach one further back than ahead. Causal windows are not moved: the first query sees
itself. Windows as large as the grid give full attention, a stride of w gives blocked windows, and
dilation reaches far at the same cost (Dilated Neighborhood Attention, 2022). Strides are those of
"Generalized Neighborhood Attention" (2025). A key in my window need not have me in its own.

Relative position bias (the NAT models of 2023; later versions of the official library dropped it):
a table (heads, 2 w - 1, ..), started by a truncated normal of 0.02, is read at (k' - i') + w - 1.

Cost N * prod(w) * D per head. The route "neighborhood_tiles" splits a dilation into residue
classes, then takes tiles of queries with the halo of their keys; "neighborhood_triton" is a kernel.

Where we go beyond the official code. It wants w d <= X; here a sequence (one axis, no grid given)
may have any length, and the windows of short ones hold all there is. Tokens at the end of such a
sequence that a mask hides from everyone are padding: the border lies in front of them. Tokens in
front of the grid (class token, registers; `prefix`) see everyone and are seen by everyone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import CompatibilityError, ZooError
from zoo.host.refusals import refuse_parts
from zoo.parts import Call, Host, Layout, Route, Select, Strip, repeat_heads
from zoo.registry import Paper, Taxonomy, Traits, register
from zoo.select import _neighborhood_forms as forms
from zoo.select._flex import flex_windows, refuse_flex
from zoo.select._grid import Grid, axis_allowed
from zoo.select._neighborhood_forms import na_mask, neighborhood_attention
from zoo.select._neighborhood_input import check_rpb

__all__ = ["Neighborhood", "na_mask", "neighborhood_attention"]


def _refuse(host: Host, call: Call) -> str | None:
    """Why no route of this file can take a pass, or None."""
    reason = refuse_parts(host, {"score": "dot", "normalize": "softmax"})
    if reason:
        return reason
    if host.position.biases or call.bias is not None:
        return "it takes no bias on the scores"
    if call.mask is not None:
        return "it takes no mask beside the windows"
    if call.dropout:
        return "it has no dropout on the weights"
    if call.q.shape[2] != call.k.shape[2] or call.q_start != call.k_start:
        return "there are cached keys"
    return None


def _inputs(host: Host, call: Call, name: str) -> forms.Inputs:
    """The pass as a backend takes it, without the tokens in front."""
    part = _part(host)
    grid = replace(part.grid_of(call.q.shape[2]), prefix=0)
    q, k, v = (x[:, :, part.prefix :] for x in (call.q, call.k, call.v))
    extra = None
    if part.prefix:
        extra = call.k[:, :, : part.prefix], call.v[:, :, : part.prefix]
    return forms.Inputs(
        q, k, v, grid, call.scale, part.rpb, extra, False, by_name=host.route == name
    )


def _part(host: Host) -> Neighborhood:
    assert isinstance(host.select, Neighborhood)
    return host.select


def _with_prefix(part: Neighborhood, call: Call, y: Tensor) -> Tensor:
    """Put the outputs of the tokens in front, which see everyone, before those of the grid."""
    if not part.prefix:
        return y
    heads = call.q.shape[1]
    keys, values = repeat_heads(call.k, heads), repeat_heads(call.v, heads)
    front = call.q[:, :, : part.prefix]
    first = F.scaled_dot_product_attention(front, keys, values, scale=call.scale)
    return torch.cat([first.to(y.dtype), y], 2)


def _refuse_triton(host: Host, call: Call) -> str | None:
    return _refuse(host, call) or forms.refuse_kernel(_inputs(host, call, "neighborhood_triton"))


def _run_triton(host: Host, call: Call) -> Tensor:
    return forms.kernel_tiles(_inputs(host, call, "neighborhood_triton"))


def _refuse_flex(host: Host, call: Call) -> str | None:
    if _part(host).rpb is not None:
        return "it takes no relative position bias (rpb)"
    return _refuse(host, call) or refuse_flex(call.q, call.k, call.v, host.route == "flex")


def _run_flex(host: Host, call: Call) -> Tensor:
    grid = _part(host).grid_of(call.q.shape[2])
    return flex_windows(call.q, call.k, call.v, grid, call.scale)


def _refuse_tiles(host: Host, call: Call) -> str | None:
    reason = _refuse(host, call)
    if reason:
        return reason
    given = _inputs(host, call, "neighborhood_tiles")
    reason = forms.refuse_tiles(given)
    if reason:
        return reason
    keys = math.prod(w.width for w in given.grid.windows)
    if host.route == "auto" and given.grid.length <= 4 * keys:
        return f"{given.grid.length} tokens are no more than four windows of {keys}"
    return None


def _run_tiles(host: Host, call: Call) -> Tensor:
    y, _ = forms.tiles(_inputs(host, call, "neighborhood_tiles"))
    return _with_prefix(_part(host), call, y)


def _run_gather(host: Host, call: Call) -> Tensor:
    y, _ = forms.gather(_inputs(host, call, "gather"))
    return _with_prefix(_part(host), call, y)


def _run_reference(host: Host, call: Call) -> Tensor:
    y, _ = forms.reference(_inputs(host, call, "reference"))
    return _with_prefix(_part(host), call, y)


@register(
    "neighborhood",
    kind="select",
    contender={
        "causal": "neighborhood(kernel=8)",
        "bidirectional": "neighborhood(kernel=3, ndim=2)",
    },
    paper=Paper(
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
        "Threadblock Level",
        2024,
        "2403.04690",
    ),
    traits=Traits(cross=False, equivariant=False, cost="N * kernel ** ndim"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="local",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="linear",
    ),
    parameters="rel_pos_bias * score_heads * (2 * kernel - 1) ** (ndim or 1)",
    aliases=("natten",),
    notes="The formula for the parameters holds for windows of the same length along all axes.",
)
class Neighborhood(Select):
    """The nearest tokens on a grid of one, two or three axes.

    Args:
        layout: Head counts.
        kernel: Keys of a window along each axis, one number or one for each, at least 2.
        ndim: Axes of the grid, 1 to 3; default what `grid` and `kernel` say, else 1.
        grid: Lengths of the axes. Without it one axis takes any number of tokens, and two or three
            axes are taken to be equally long.
        dilation: Distance of neighbours along each axis.
        stride: Queries that share a window along each axis, 1 to `kernel`.
        causal_axes: Axes along which no later key is seen, one flag for each, of two or three.
        rel_pos_bias: Learn a bias for each head and distance; odd windows that are not causal.
        prefix: Tokens in front of the grid that see everyone and that everyone sees.
        causal: Only keys up to the query; for one axis.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: Sizes that do not fit each other; the message names the axis.
        CompatibilityError: `causal` with several axes or with tokens in front.
    """

    special_init = True

    def __init__(
        self,
        layout: Layout,
        kernel: int | Sequence[int] = 7,
        ndim: int | None = None,
        grid: Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal_axes: Sequence[bool] | None = None,
        rel_pos_bias: bool = False,
        prefix: int = 0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.grid = checks.optional(checks.wholes)("grid", grid, also="one for each axis")
        self.ndim = _axes(ndim, self.grid, kernel)
        self.kernel = forms.per_axis("kernel", kernel, self.ndim, forms.any_whole)
        self.dilation = forms.per_axis("dilation", dilation, self.ndim, forms.any_whole)
        self.stride = forms.per_axis("stride", stride, self.ndim, forms.any_whole)
        forms.check_sizes(self.kernel, self.dilation, self.stride, self.grid)
        self.prefix = checks.whole("prefix", prefix, 0)
        self.causal_axes = self._causality(causal_axes)
        self.windows = forms.make_windows(self.kernel, self.stride, self.causal_axes)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            check_rpb(self.kernel, self.causal_axes)
            sizes = (2 * w - 1 for w in self.kernel)
            shape = (layout.score_heads, *sizes)
            self.rpb = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.biases = self.rpb is not None
        # With a stride, or away from causality, windows depend on where the sequence ends.
        self.ends = not all(self.causal_axes) or any(s > 1 for s in self.stride)
        self.reset_parameters()

    def _causality(self, given: Sequence[bool] | None) -> tuple[bool, ...]:
        if self.causal and self.ndim > 1:
            raise CompatibilityError(
                f"'neighborhood' with ndim={self.ndim} cannot be causal in reading order; use "
                "causal_axes, which says along which axes no later key is seen"
            )
        if self.causal and self.prefix:
            raise CompatibilityError(
                f"'neighborhood' with prefix={self.prefix} cannot be causal: tokens in front see "
                "everyone"
            )
        axes = (self.causal,) * self.ndim
        if given is not None:
            axes = forms.per_axis("causal_axes", given, self.ndim, checks.flag)
        if self.ndim == 1 and axes[0] != self.causal:
            raise ZooError(f"causal_axes={given!r} of one axis is the host's causal={axes[0]}")
        return axes

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02, as in the NAT models."""
        if self.rpb is not None and not self.rpb.is_meta:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Lengths of the axes for so many tokens, those in front included.

        Raises:
            ZooError: The tokens do not fill the grid, or make no square or cube.
        """
        rest = tokens - self.prefix
        if self.grid is not None:
            if rest != math.prod(self.grid):
                raise ZooError(
                    f"{tokens} tokens do not fill grid={self.grid} behind prefix={self.prefix}"
                )
            return self.grid
        if self.ndim == 1:
            if rest < 0:
                raise ZooError(f"{tokens} tokens are fewer than prefix={self.prefix}")
            return (rest,)
        side = round(max(rest, 0) ** (1 / self.ndim))
        if side**self.ndim != rest:
            what = "square" if self.ndim == 2 else "cube"
            raise ZooError(
                f"{rest} tokens make no {what}; give grid=(..) with the lengths of the axes"
            )
        sides = (side,) * self.ndim
        forms.check_sizes(self.kernel, self.dilation, self.stride, sides)
        return sides

    def grid_of(self, tokens: int) -> Grid:
        """The grid of so many tokens."""
        return Grid(self.shape(tokens), self.windows, self.dilation, self.prefix)

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """Coordinates of packed tokens, and where padded sequences end."""
        sequence = self.ndim == 1 and self.grid is None
        if call.cache is not None:
            if not self.causal or self.ends:
                raise ZooError(
                    "'neighborhood' decodes with causal=True and stride=1 only: other windows "
                    "depend on where the sequence ends"
                )
            return {}
        if call.cu_seqlens is not None:
            if not sequence or self.prefix:
                raise ZooError(
                    "'neighborhood' on a grid or with a prefix takes no packed sequences"
                )
            assert call.documents is not None
            starts = call.cu_seqlens.long()
            sizes = starts.diff()[call.documents]
            index = torch.arange(call.q.shape[2], device=call.q.device) - starts[call.documents]
            if call.mask is not None and self.ends:
                # Each sequence ends behind its last token that anyone may see.
                seen = call.mask.any(2).any(1)[0].expand(len(index)) * (index + 1)
                ends = sizes.new_zeros(len(starts) - 1)
                ends = ends.scatter_reduce(0, call.documents, seen, "amax")[call.documents]
                sizes = torch.where(index < ends, ends, sizes)  # padding sees as it can
            return {"index": index, "sizes": sizes}
        self.shape(call.q.shape[2])  # raises where the tokens do not fit
        if call.mask is None or not (sequence and self.ends):
            return {}
        # The sequence ends behind the last token that anyone may see.
        seen = call.mask.any(2).any(1)[:, self.prefix :]
        index = torch.arange(1, seen.shape[1] + 1, device=seen.device)
        return {"ends": (seen * index).amax(-1) if seen.shape[1] else seen.sum(-1)}

    def allow(self, strip: Strip) -> Tensor | None:
        """(R, M), or (B, 1, R, M) for padded sequences."""
        call = strip.call
        known = strip.prepared(self.kind)
        rows, keys = strip.q_index[:, None], strip.k_index
        if "index" in known:
            rows, keys = known["index"][strip.rows, None], known["index"][strip.keys]
            sizes = known["sizes"][strip.rows, None]
            return axis_allowed(rows, keys, self.windows[0], self.dilation[0], sizes)
        total = call.k_start + call.k.shape[2]
        if "ends" not in known:
            return self.grid_of(total).allowed(rows, keys)
        ends = known["ends"]
        ends = ends[strip.batch] if len(ends) > 1 else ends
        ends = ends[:, None, None, None]
        i, j = rows - self.prefix, keys - self.prefix
        sizes = torch.where(i < ends, ends, total - self.prefix)  # rows of padding see as they can
        seen = axis_allowed(i, j, self.windows[0], self.dilation[0], sizes)
        if self.prefix:
            seen = seen | (i < 0) | (j < 0)
        return seen

    def bias(self, strip: Strip) -> Tensor:
        """The table's entries, (score_heads, R, M)."""
        assert self.rpb is not None
        grid = self.grid_of(strip.call.q.shape[2])
        i, j = strip.q_index[:, None] - self.prefix, strip.k_index - self.prefix
        entries = self.rpb.flatten(1)[:, grid.offsets(i.clamp(min=0), j.clamp(min=0))]
        if self.prefix:  # tokens in front stand nowhere
            entries = entries.masked_fill((i < 0) | (j < 0), 0.0)
        return entries

    def key_range(self, call: Call, rows: slice) -> tuple[int, int] | None:
        """Keys between the first row's windows and the last one's, along the first axis."""
        if self.prefix:
            return None
        total = call.k_start + call.k.shape[2]
        line = max(1, math.prod(self.shape(total)[1:]))
        reach = (self.kernel[0] - 1) * self.dilation[0]
        top = (call.q_start + rows.start) // line
        bottom = (call.q_start + rows.stop - 1) // line
        ahead = 0 if self.causal_axes[0] else reach
        first = max(0, (top - reach) * line - call.k_start)
        return first, max(first, (bottom + ahead + 1) * line - call.k_start)

    def window(self) -> int | None:
        """Tokens that the next query can see, where the part decodes."""
        return (self.kernel[0] - 1) * self.dilation[0] + 1 if self.causal else None

    def routes(self) -> tuple[Route, ...]:
        """The kernel, FlexAttention, tiles; by name the plain forms, sparse and dense."""
        return (
            Route("neighborhood_triton", _refuse_triton, _run_triton),
            Route("flex", _refuse_flex, _run_flex),
            Route("neighborhood_tiles", _refuse_tiles, _run_tiles),
            Route("gather", _refuse, _run_gather, auto=False),
            Route("reference", _refuse, _run_reference, auto=False),
        )

    def extra_repr(self) -> str:
        """The options."""
        told = f"kernel={self.kernel}, grid={self.grid}, dilation={self.dilation}"
        return f"{told}, stride={self.stride}, causal_axes={self.causal_axes}, prefix={self.prefix}"


def _axes(ndim: int | None, grid: tuple[int, ...] | None, kernel: int | Sequence[int]) -> int:
    """Number of axes that the options agree on."""
    found = ndim
    for name, value in (("grid", grid), ("kernel", kernel)):
        if isinstance(value, Sequence) and not isinstance(value, str):
            if found is not None and found != len(value):
                raise ZooError(f"{name}={value!r} has {len(value)} entries, but ndim is {found}")
            found = len(value)
    found = 1 if found is None else found
    return checks.whole("ndim", found, 1, 3)
