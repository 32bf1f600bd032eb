"""Transformer-XL's relative positions (Dai et al. 2019, section 3.3).

    s_ij = scale * ((q_i + u_h) . k_j + (q_i + v_h) . W_R r_{i-j})

r_d (C,) holds the sines, then the cosines, of d w_m with w_m = 10000^(-2m / C), as in the released
code (the paper's table alternates them: a permutation of the columns of W_R). W_R maps C to a key
for each head, u and v are one vector for each head. Bidirectional attention sees negative distances
too, where the sines change sign. Parameters H D (C + 2).

Initialisation normal with standard deviation 0.02, as in the released code. That code can share u
and v between layers and drops out r; here each layer has its own and r stays as it is.

No (N, M, D) tensor is formed. Two exact forms, and the one with fewer products is taken:

- shift, if positions are consecutive: the rows of a strip meet R + M - 1 distances, so
  (q + v) times the W_R r_d of those gives all terms, and row after row is moved along by one.
  W_R r_d is computed once for each pass. Cost per head (N + M) C D + N M D.
- turn, for any positions: with a = W_R^T (q + v), the angle sum formulas turn a by the query's
  position so that it meets sines and cosines of the key's position alone. Cost N C D + N M C, less
  than the other for few queries, as in decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.parts import Call, Layout, Position, Strip, grouped_matmul
from zoo.registry import Paper, Taxonomy, Traits, register


def relative_sinusoid(distance: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines, then cosines, of distances (...): (..., dim)."""
    pairs = torch.arange(0, dim, 2, device=distance.device, dtype=dtype)
    angles = distance[..., None].to(dtype) * 10000.0 ** (-pairs / dim)
    return torch.cat((angles.sin(), angles.cos()), -1)


def transformer_xl_reference(
    q: Tensor,
    k: Tensor,
    w_r: Tensor,
    u: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    scale: float,
) -> Tensor:
    """Scores with every W_R r_{i-j} written out.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        w_r: (H * D, C).
        u: (H, D).
        v: (H, D).
        q_pos: (N,).
        k_pos: (M,).
        scale: Factor on all terms.

    Returns:
        (B, H, N, M).
    """
    r = relative_sinusoid(q_pos[:, None] - k_pos, w_r.shape[1], torch.float64).to(q.dtype)
    keys = (r @ w_r.t()).unflatten(-1, u.shape)  # (N, M, H, D)
    content = (q + u[:, None]) @ k.transpose(-1, -2)
    return scale * (content + torch.einsum("bhnd,nmhd->bhnm", q + v[:, None], keys))


@register(
    "transformer_xl",
    kind="position",
    paper=Paper(
        "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
        2019,
        "1901.02860",
    ),
    traits=Traits(equivariant=False),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="single",
        alignment="scaled_dot",
        distribution="inherited",
        complexity="quadratic",
        trainable_params=True,
    ),
    parameters="score_heads * qk_dim * (dim + 2)",
)
class TransformerXL(Position):
    """Queries meet a learned key for each distance, and two biases replace their own positions.

    Args:
        dim: Channels, the width of the sinusoids; even.
        layout: Head counts and widths.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: `dim` is odd.
    """

    biases = True
    special_init = True

    def __init__(
        self,
        dim: int,
        layout: Layout,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        also = "since sines are paired with cosines"
        self.dim = dim = checks.multiple("dim", dim, 2, of="transformer_xl", also=also)
        shape = (layout.score_heads, layout.qk_dim)
        self.u = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.w_r = nn.Linear(dim, shape[0] * shape[1], bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw everything from a normal distribution of standard deviation 0.02."""
        for parameter in (self.u, self.v, self.w_r.weight):
            nn.init.normal_(parameter, std=0.02)

    def prepare(self, call: Call) -> Mapping[str, Any]:
        """The u . k term of every key, and what the cheaper form shares between strips."""
        samples, heads, rows, width = call.q.shape
        u = (self.u * call.scale)[None, :, None].expand(samples, -1, -1, -1)
        shared: dict[str, Any] = {"key_term": grouped_matmul(u, call.k.transpose(-1, -2))}
        fewer = width * (self.dim + rows) < self.dim * rows
        if not (fewer and _consecutive(call.q_pos) and _consecutive(call.k_pos)):
            return shared
        keys = call.k.shape[2]
        last = call.q_pos[-1] - call.k_pos[0]  # the largest distance comes first
        future = rows - 1 if call.causal else 0  # causal: never seen, so left at zero
        steps = torch.arange(rows + keys - 1 - future, device=last.device)
        r = relative_sinusoid(last - steps, self.dim, _table_dtype(call.q)).to(call.q.dtype)
        relative = self.w_r(r).unflatten(-1, (heads, width)).transpose(0, 1)
        shared["relative"] = nn.functional.pad(relative, (0, 0, 0, future))  # (H, N + M - 1, D)
        return shared

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        """Scores (B, score_heads, R, M) with both terms."""
        shared = strip.prepared("position")
        q = (strip.q + self.v[:, None]) * strip.scale
        relative = shared.get("relative")
        term = self._turn(q, strip) if relative is None else _shift(q, relative, strip)
        term = term + shared["key_term"][strip.batch, :, :, strip.keys]
        return term if scores is None else scores + term

    def _turn(self, q: Tensor, strip: Strip) -> Tensor:
        """Position term (B, H, R, M) for any positions."""
        heads, width = self.u.shape
        a = q @ self.w_r.weight.view(heads, width, self.dim)  # (B, H, R, C)
        a_sin, a_cos = a.chunk(2, -1)
        # Counting from the strip's first key keeps the angles small, and so exact.
        start = strip.k_pos[..., :1]
        dtype = _table_dtype(q)
        rows = relative_sinusoid(strip.q_pos - start, self.dim, dtype).to(q.dtype)
        keys = relative_sinusoid(strip.k_pos - start, self.dim, dtype).to(q.dtype)
        if rows.ndim == 3:
            rows, keys = rows[:, None], keys[:, None]
        sin, cos = rows.chunk(2, -1)
        turned = torch.cat((a_cos * sin - a_sin * cos, a_sin * sin + a_cos * cos), -1)
        return turned @ keys.transpose(-1, -2)


def _shift(q: Tensor, relative: Tensor, strip: Strip) -> Tensor:
    """Position term (B, H, R, M) for consecutive positions.

    Args:
        q: (B, H, R, D).
        relative: Keys of all distances of the pass, the largest first, (H, N + M - 1, D).
        strip: The strip.
    """
    rows, keys = q.shape[2], strip.keys.stop - strip.keys.start
    first = strip.call.q.shape[2] - strip.rows.stop + strip.keys.start
    span = rows + keys - 1  # distances met, W
    meets = q @ relative[:, first : first + span].transpose(-1, -2)  # (B, H, R, W)
    if rows == 1:
        return meets
    # Row a wants columns R - 1 - a onwards: in rows of W - 1, they stand below one another.
    flat = meets.flatten(-2)[..., rows - 1 : rows - 1 + rows * (span - 1)]
    return flat.unflatten(-1, (rows, span - 1))[..., :keys]


def _table_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _consecutive(positions: Tensor) -> bool:
    """Whether positions are known to count up by one (not known while compiling)."""
    if positions.ndim != 1 or torch.compiler.is_compiling():
        return False
    return positions.is_meta or bool((positions.diff() == 1).all())
