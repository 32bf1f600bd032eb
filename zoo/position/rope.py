"""Rotary position embedding (Su et al. 2021, section 3.2), with its usual extensions.

Pair m of the channels of q and k is turned by the angle t w_m at position t:

    (a, b) -> (a cos t w_m - b sin t w_m, a sin t w_m + b cos t w_m),    w_m = base^(-2m / R)

with R the rotated width, m = 0 .. R/2 - 1. Norms are kept, and q_i . k_j depends on i - j alone.
No parameters, cost N * D per head. Rotated keys are what the cache holds.

- `style`: "half" pairs channels m and m + R/2 (GPT-NeoX, LLaMA in Transformers), "interleaved"
  2m and 2m + 1 (the paper, GPT-J, Meta's LLaMA). They are the same function up to a permutation of
  the rows of W_Q and W_K, which `rope_permute` makes.
- `fraction`: only the first R = fraction * D channels turn (GPT-NeoX).
- `scaling` for sequences `factor` times as long: "linear" divides positions by it (Chen et al.
  2023); "ntk" multiplies the base by factor^(R / (R - 2)), which leaves the fastest pair alone and
  slows the slowest by exactly `factor`; "yarn" (Peng et al. 2023) slows only the pairs that turn
  few times within `original_len` and multiplies both tables by 0.1 ln(factor) + 1. YaRN's ramp is
  linear in m between whole-number bounds (32 turns and 1 turn), as in its released code; the paper
  writes it as linear in the number of turns.
- `grid`: tokens stand on h rows and w columns behind `prefix` tokens that do not turn; the first
  half of the pairs turns by the row, the second by the column, each half with the frequencies of
  width R/2 (axial rotation, as vision transformers use it). Other lengths are refused.

Angles are computed in float32 at least, and half-precision inputs are turned in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError
from zoo.parts import Layout, Position
from zoo.registry import Paper, Taxonomy, Traits, register

STYLES = ("half", "interleaved")
SCALINGS = ("none", "linear", "ntk", "yarn")
_FAST_TURNS, _SLOW_TURNS = 32.0, 1.0  # YaRN's beta and alpha


def rope_reference(x: Tensor, angles: Tensor, style: str = "half") -> Tensor:
    """Turn the pairs one after another.

    Args:
        x: (B, H, N, D).
        angles: (N, R/2) with R <= D; the channels from R on stay.
        style: "half" or "interleaved".
    """
    y, pairs = x.clone(), angles.shape[-1]
    for m in range(pairs):
        a, b = (m, m + pairs) if style == "half" else (2 * m, 2 * m + 1)
        cos, sin = angles[:, m].cos(), angles[:, m].sin()
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., a] * sin + x[..., b] * cos
    return y


def rope_frequencies(
    width: int,
    base: float = 10000.0,
    scaling: str = "none",
    factor: float = 1.0,
    original_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angle per position of each pair, (width / 2,), in radians per token.

    Args:
        width: Rotated channels R.
        base: Base of the wavelengths.
        scaling: "none", "linear", "ntk" or "yarn".
        factor: How many times longer than in training sequences may get.
        original_len: Longest sequence in training, in tokens (yarn).
        dtype: float32 or float64.
        device: Where they are needed.
    """
    pairs = torch.arange(width // 2, dtype=dtype, device=device)
    if scaling == "ntk":
        base *= factor ** (width / (width - 2))
    frequencies = base ** (pairs * (-2 / width))
    if scaling == "linear":
        return frequencies / factor
    if scaling != "yarn" or original_len is None:
        return frequencies
    # The pair that makes so many turns in `original_len` tokens; between the two lies the ramp.
    fast, slow = (
        width * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (_FAST_TURNS, _SLOW_TURNS)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), width - 1)
    slowed = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / factor)


def rope_tables(angles: Tensor, style: str) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for every rotated channel, each (..., R), of angles (..., R/2)."""
    cos, sin = angles.cos(), angles.sin()
    if style == "half":
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def rope_apply(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Turn x by the tables of `rope_tables`.

    Args:
        x: (B, H, N, D).
        cos: Broadcastable to (B, H, N, R); the channels from R on stay.
        sin: Same shape, signed.
        style: As for the tables.

    Returns:
        Same shape and type as x.
    """
    width = cos.shape[-1]
    part = x[..., :width]
    if style == "half":
        a, b = part.chunk(2, -1)
        partner = torch.cat((b, a), -1)
    else:
        partner = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = torch.addcmul(part * cos, partner.to(sin.dtype), sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def rope_permute(weight: Tensor, heads: int, to: str = "half", fraction: float = 1.0) -> Tensor:
    """Reorder the rows of W_Q or W_K made for one style so that they serve the other.

    Args:
        weight: (heads * D, C), or a bias (heads * D,), of q or of k alone, head by head.
        heads: Heads (for W_K: key heads).
        to: Style that the result is for; `weight` is in the other.
        fraction: Rotated fraction of each head.

    Raises:
        ZooError: Unknown style, or sizes that do not fit.
    """
    checks.choice("style 'to' of rope_permute", to, STYLES)
    if heads < 1 or weight.shape[0] % heads:
        raise ZooError(
            f"rope_permute: {weight.shape[0]} rows of weight are not divisible by heads={heads}"
        )
    size = weight.shape[0] // heads
    width = _rotated_width(size, fraction)
    channels = torch.arange(size, device=weight.device)
    # To half: first all 2m, then all 2m + 1. To interleaved: m and m + R/2 in turn.
    pairs = channels[:width].view((-1, 2) if to == "half" else (2, -1))
    order = torch.cat((pairs.t().flatten(), channels[width:]))
    return weight.unflatten(0, (heads, size))[:, order].flatten(0, 1)


def _rotated_width(size: int, fraction: float, step: int = 2) -> int:
    """Channels of a head of `size` that turn, a multiple of `step`."""
    if size < step:
        raise ZooError(f"rope: a head of width {size} is too narrow; at least {step} must turn")
    wanted = size * checks.number("fraction", fraction, of="rope")
    nearest = min(range(step, size + 1, step), key=lambda width: abs(width - wanted))
    if not math.isclose(nearest, wanted, rel_tol=1e-6):
        raise ZooError(
            f"rope: fraction={fraction!r} of a head of width {size} must be a multiple of {step} "
            f"channels from {step} to {size}; nearest allowed: fraction={nearest / size:g}"
        )
    return nearest


@register(
    "rope",
    kind="position",
    paper=Paper(
        "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, "2104.09864"
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
    ),
)
class RoPE(Position):
    """Queries and keys turned by angles proportional to their positions.

    Args:
        layout: Head widths.
        base: Base of the wavelengths, above 1.
        style: Which channels form a pair, "half" or "interleaved".
        fraction: Share of the channels of a head that turn.
        scaling: Extension to longer sequences: "none", "linear", "ntk" or "yarn".
        factor: How many times longer than in training, at least 1.
        original_len: Longest sequence in training, in tokens; yarn needs it.
        grid: Rows and columns (h, w) of a 2-D sequence, or None.
        prefix: Tokens in front of the grid that do not turn.

    Raises:
        ZooError: An option is impossible, or belongs to another option that is not used.
    """

    rotates = True

    def __init__(
        self,
        layout: Layout,
        base: float = 10000.0,
        style: str = "half",
        fraction: float = 1.0,
        scaling: str = "none",
        factor: float = 1.0,
        original_len: int | None = None,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__()
        self.style = checks.choice("style", style, STYLES, of="rope")
        self.scaling = checks.choice("scaling", scaling, SCALINGS, of="rope")
        self.base = float(checks.number("base", base, above=1, of="rope", also="e.g. 10000.0"))
        # Both axes of a grid need pairs of their own.
        self.width = _rotated_width(layout.qk_dim, fraction, 2 if grid is None else 4)
        self.grid, self.prefix = _check_grid(grid, prefix)
        self.axis_width = self.width if self.grid is None else self.width // 2
        self.factor = checks.number("factor", factor, 1, of="rope")
        length = checks.optional(checks.whole)
        self.original_len = length("original_len", original_len, of="rope")
        self._check_scaling()

    def _check_scaling(self) -> None:
        scaling, factor, length = self.scaling, self.factor, self.original_len
        if scaling == "none" and factor != 1:
            raise ZooError(
                f"factor={factor!r} of 'rope' has no effect with scaling='none'; "
                "allowed with scaling: linear, ntk, yarn"
            )
        if (scaling == "yarn") == (length is None):
            raise ZooError(
                f"original_len={length!r} of 'rope' does not go with scaling={scaling!r}: yarn "
                "needs the length of training, and the others do not use it"
            )
        if scaling == "ntk" and self.axis_width < 4:
            raise ZooError(
                f"scaling='ntk' of 'rope' needs 4 rotated channels or more, not {self.axis_width}: "
                "it leaves the fastest pair alone; use linear or yarn"
            )

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angles in radians, (..., N, R/2), of positions (..., N)."""
        options = (self.base, self.scaling, self.factor, self.original_len)
        frequencies = rope_frequencies(self.axis_width, *options, dtype, positions.device)
        if self.grid is None:
            return positions[..., None].to(dtype) * frequencies
        cell = positions[..., None] - self.prefix
        place = torch.cat((cell // self.grid[1], cell % self.grid[1]), -1)  # (..., N, 2)
        place = place.masked_fill(cell < 0, 0).to(dtype)
        return (place[..., None] * frequencies).flatten(-2)

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q (B, score_heads, N, qk_dim) and k (B, k_heads, M, qk_dim).

        Raises:
            ZooError: There is a grid and q or k has another number of tokens.
        """
        tables = self._tables(q, q_pos)
        turned = rope_apply(q, *tables, self.style)
        if k_pos is not q_pos:
            tables = self._tables(k, k_pos)
        return turned, rope_apply(k, *tables, self.style)

    def _tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid is not None:
            rows, columns = self.grid
            tokens = self.prefix + rows * columns
            if x.shape[2] != tokens:
                raise ZooError(
                    f"rope: grid={self.grid} with prefix={self.prefix} takes {tokens} tokens, "
                    f"got {x.shape[2]}"
                )
        angles = self.angles(positions, torch.promote_types(x.dtype, torch.float32))
        cos, sin = rope_tables(angles, self.style)
        if self.scaling == "yarn":
            temperature = 0.1 * math.log(self.factor) + 1
            cos, sin = cos * temperature, sin * temperature
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])


def _check_grid(grid: tuple[int, int] | None, prefix: int) -> tuple[tuple[int, int] | None, int]:
    prefix = checks.whole("prefix", prefix, 0, of="rope")
    if grid is None:
        if prefix:
            raise ZooError(f"prefix={prefix} of 'rope' has no effect without grid=(rows, columns)")
        return None, 0
    rows, columns = checks.wholes("grid", grid, 2, of="rope", also="(rows, columns)")
    return (rows, columns), prefix
