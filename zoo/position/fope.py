"""Fourier position embedding (FoPE): each channel pair turns by a fixed random mix of frequencies.

"Fourier Position Embedding: Enhancing Attention's Periodic Extension for Length Generalization"
(2024). RoPE gives a pair one frequency; its slowest ones make less than a full turn in training
and mean something new beyond. Here they are dropped, and every pair is a short Fourier series:

    w_m = base^(-2m / F), only those with w_m >= floor_ratio 2 pi / train_len      m = 0 .. M - 1
    S_o(t) = sum_m sin(w_m t) A_sin[m, o],  C_o(t) = sum_m cos(w_m t) A_cos[m, o]  o = 0 .. K - 1
    (a, b) -> (a C_o - b S_o, b C_o + a S_o)            a, b: channels o and o + D/2 of q or k

for K = min(M, D / 4) pairs of each head (at least one); the other pairs get C = 1 and S = zero_sin
at all positions. A_sin and A_cos (M, K) are the identity (with K < M: a one in every ceil(M / K)th
row) plus Xavier-normal noise of gain sigma, drawn once for each key head and not trained. Norms are
not kept, position 0 is not the identity, and q_i . k_j depends on i and j, not on i - j alone;
with sigma = 0 it does. Sigma was 0.3, 0.4, 0.6 for models of 60M, 180M, 1.2B parameters.
Cost as RoPE's, except tables of H N D numbers instead of N D, made by a product (N M) (M K) each.

Followed from the official code: `zero_sin` is 1, which turns the pairs at rest by 45 degrees and
doubles their part of q . k; 0 leaves them alone, as vLLM does and cos 0, sin 0 suggest. The noise
is that of torch's Xavier rule on the whole (H, M, K), much smaller than one matrix at a time. YaRN
changes frequencies only, not the temperature. Our own: a query uses the matrix of the key head
that it meets (the official code has no groups of heads). `scaling` acts on the frequencies that
`train_len` chose, so a trained layer keeps its coefficients; the official code can clamp before or
after scaling, with the longer length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.parts import Host, Layout, Position, full_precision
from zoo.position.rope import rope_apply, rope_frequencies
from zoo.registry import Paper, Taxonomy, Traits, register

SCALINGS = ("none", "linear", "yarn")
# Tables of the latest positions are kept up to this size; longer passes can afford new ones.
MEMO_BYTES = 2**24


def fope_reference(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    sin_coef: Tensor,
    cos_coef: Tensor,
    zero_sin: float = 1.0,
) -> Tensor:
    """Turn the pairs one after another.

    Args:
        x: (B, H, N, D).
        positions: (N,).
        frequencies: (M,), radians per token.
        sin_coef: (H, M, K), K <= D / 2.
        cos_coef: (H, M, K).
        zero_sin: S of the pairs from K on.
    """
    y, half = x.clone(), x.shape[-1] // 2
    angles = positions[:, None] * frequencies
    for h in range(x.shape[1]):
        for o in range(half):
            sin, cos = torch.tensor(zero_sin), torch.tensor(1.0)
            if o < sin_coef.shape[-1]:
                sin, cos = angles.sin() @ sin_coef[h, :, o], angles.cos() @ cos_coef[h, :, o]
            a, b = x[:, h, :, o], x[:, h, :, o + half]
            y[:, h, :, o] = a * cos - b * sin
            y[:, h, :, o + half] = b * cos + a * sin
    return y


def fope_tables(angles: Tensor, coef: Tensor, half: int, zero_sin: float) -> tuple[Tensor, Tensor]:
    """Factors of every channel and of its partner, as `rope_apply` takes them.

    Args:
        angles: (..., N, M).
        coef: Of sines and of cosines, (2 or 1, G, M, K); one for both if there is only one.
        half: Pairs of a head.
        zero_sin: Sine of the pairs from K on.

    Returns:
        Two of (..., G, N, 2 * half), the second with the sign of the pair's first channel.
    """
    waves = torch.stack((angles.sin(), angles.cos()))  # (2, ..., N, M)
    groups, inputs, pairs = coef.shape[1:]
    mix = coef.to(angles.dtype).transpose(1, 2).flatten(2)  # (2 or 1, M, G K)
    with full_precision(angles):
        mixed = waves @ mix.view(len(mix), *[1] * (angles.ndim - 2), inputs, groups * pairs)
    sin, cos = mixed.unflatten(-1, (groups, pairs))  # (..., N, G, K)
    rest = half - pairs
    if rest:
        sin, cos = F.pad(sin, (0, rest), value=zero_sin), F.pad(cos, (0, rest), value=1.0)
    tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    # Projections leave q and k with the heads of a token side by side: so do the tables.
    return tables[0].transpose(-2, -3), tables[1].transpose(-2, -3)


@register(
    "fope",
    kind="position",
    paper=Paper(
        "Fourier Position Embedding: Enhancing Attention's Periodic Extension for Length "
        "Generalization",
        2024,
        "2412.17739",
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
    notes="learnable=True makes the coefficients (2, k_heads, M, K) parameters",
)
class FoPE(Position):
    """Queries and keys turned by a random Fourier series of the frequencies that training covers.

    The coefficients come from torch's default generator and are part of the state_dict.

    Args:
        layout: Head counts and widths.
        max_len: Longest sequence of the host.
        train_len: Longest sequence in training, in tokens; default `max_len`. Longer ones can be
            read, but a host that is built for them must still be told the length of training.
        base: Base of the wavelengths, above 1.
        sigma: Gain of the noise in the coefficients, at least 0.
        separate_head: Coefficients of its own for every key head.
        separate_basis: Coefficients of its own for the cosine.
        out_pairs: Pairs K that turn; default min(M, D / 4).
        fourier_dim: Even width F that the frequencies are spread for, at least D; default D.
        ignore_zero: Drop frequencies below the floor. False: set them to 0 and let all D / 2 pairs
            mix all F / 2 frequencies.
        zero_sin: Sine of the pairs that do not turn.
        floor_ratio: Turns in training that a frequency needs to be kept; 0 keeps all.
        scaling: Extension to longer sequences: "none", "linear" (divides positions) or "yarn".
        factor: How many times longer than in training, at least 1.
        learnable: Train the coefficients.
        device: Where coefficients are made.
        dtype: Their type, float32 at least.

    Raises:
        ZooError: An option is impossible or has no effect, or no frequency reaches the floor.
    """

    rotates = True
    coef: Tensor

    def __init__(
        self,
        layout: Layout,
        max_len: int | None = None,
        train_len: int | None = None,
        base: float = 10000.0,
        sigma: float = 0.3,
        separate_head: bool = True,
        separate_basis: bool = True,
        out_pairs: int | None = None,
        fourier_dim: int | None = None,
        ignore_zero: bool = True,
        zero_sin: float = 1.0,
        floor_ratio: float = 1.0,
        scaling: str = "none",
        factor: float = 1.0,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = layout.qk_dim
        if width % 2:
            raise ZooError(
                f"fope: heads of q and k of width {width} have no whole number of pairs; choose "
                f"head_dim so that the width is even, e.g. {width + 1}"
            )
        if train_len is None and max_len is None:
            raise ZooError(
                "train_len=None of 'fope': it drops frequencies that make no full turn in "
                "training and must know its length; give train_len or the host's max_len"
            )
        self.layout, self.width = layout, width
        length = max_len if train_len is None else train_len
        self.train_len = checks.whole("train_len", length, of="fope")
        self.fourier_dim = width
        if fourier_dim is not None:
            also = "not below the width of a head"
            wider = checks.multiple("fourier_dim", fourier_dim, 2, width, of="fope", also=also)
            self.fourier_dim = wider
        self.sigma = float(checks.number("sigma", sigma, 0, of="fope"))
        self.floor_ratio = float(checks.number("floor_ratio", floor_ratio, 0, of="fope"))
        self.base = float(checks.number("base", base, above=1, of="fope", also="e.g. 10000.0"))
        zero_sin = checks.number("zero_sin", zero_sin, of="fope", also="e.g. 1.0 or 0.0")
        self.ignore_zero, self.zero_sin = ignore_zero, float(zero_sin)
        self.scaling = checks.choice("scaling", scaling, SCALINGS, of="fope")
        self.factor = checks.number("factor", factor, 1, of="fope")
        self._check_scaling()
        self.kept = self._count_kept()
        self.inputs = self.kept if ignore_zero else self.fourier_dim // 2
        self.pairs = self._choose_pairs(out_pairs)
        groups = layout.k_heads if separate_head else 1
        # One matrix for all heads has only two dimensions, which Xavier's rule minds.
        self.drawn = (groups,) if separate_head else ()
        made: dict[str, Any] = {
            "device": device,
            "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32),
        }
        shape = (2 if separate_basis else 1, groups, self.inputs, self.pairs)
        coef = torch.empty(shape, **made)
        if learnable:
            self.coef = nn.Parameter(coef)
        else:
            self.register_buffer("coef", coef)
        self.reset_parameters()
        # Coefficients of each query head where they are not simply those of its group.
        self.query_groups: tuple[int, ...] | None = None
        self._memo: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def _check_scaling(self) -> None:
        if self.scaling == "none" and self.factor != 1:
            raise ZooError(
                f"factor={self.factor!r} of 'fope' has no effect with scaling='none'; "
                "allowed with scaling: linear, yarn"
            )

    def _count_kept(self) -> int:
        """Frequencies that turn often enough in training; the fastest come first."""
        floor = self.floor_ratio * 2 * math.pi / self.train_len
        width = self.fourier_dim
        kept = sum(self.base ** (-2 * m / width) >= floor for m in range(width // 2))
        if not kept and self.ignore_zero:
            raise ZooError(
                f"train_len={self.train_len} of 'fope': no frequency makes "
                f"{self.floor_ratio:g} turns in so few tokens; nearest allowed: "
                f"train_len={math.ceil(2 * math.pi * self.floor_ratio)}, or a smaller floor_ratio"
            )
        return kept

    def _choose_pairs(self, out_pairs: int | None) -> int:
        half = self.width // 2
        if not self.ignore_zero:
            for name, value, default in (
                ("out_pairs", out_pairs, None),
                ("zero_sin", self.zero_sin, 1.0),
            ):
                if value != default:
                    raise ZooError(
                        f"{name}={value!r} of 'fope' has no effect with ignore_zero=False, "
                        f"where all pairs turn; leave it at {default}"
                    )
            return half
        if out_pairs is None:
            return min(self.inputs, max(1, half // 2))
        most = min(self.inputs, half)
        also = f"with {self.inputs} frequencies kept and {half} pairs of a head"
        out_pairs = checks.whole("out_pairs", out_pairs, 1, most, of="fope", also=also)
        return out_pairs

    def reset_parameters(self) -> None:
        """Draw the coefficients anew: another draw is another encoding."""
        step = math.ceil(self.inputs / self.pairs)
        rows = torch.arange(0, self.inputs, step, device=self.coef.device)
        eye = torch.zeros(self.inputs, self.pairs, device=self.coef.device)
        eye[rows, torch.arange(len(rows), device=rows.device)] = 1.0
        # Numbers are drawn in float32, so that a seed means the same in every type.
        noise = torch.empty((*self.drawn, *eye.shape), dtype=torch.float32, device=eye.device)
        with torch.no_grad():
            for basis in self.coef:
                basis.copy_(nn.init.xavier_normal_(noise, self.sigma) + eye)

    def attach(self, host: Host) -> None:
        """See which key head each query meets: the two of a pair must turn alike."""
        groups = self.coef.shape[1]
        if groups == 1 or host.normalize is None:
            return
        heads = torch.arange(self.layout.k_heads, device="cpu").view(1, -1, 1, 1)
        met = host.normalize.share_keys(heads).flatten().tolist()
        repeats = self.layout.score_heads // len(met)
        met = [group for group in met for _ in range(repeats)]
        plain = [s // (self.layout.score_heads // groups) for s in range(len(met))]
        self.query_groups = None if met == plain else tuple(met)

    def frequencies(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Radians per token of the M frequencies that are mixed, (M,)."""
        found = rope_frequencies(
            self.fourier_dim, self.base, self.scaling, self.factor, self.train_len, dtype, device
        )
        return F.pad(found[: self.kept], (0, self.inputs - self.kept))

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q (B, score_heads, N, qk_dim) and k (B, k_heads, M, qk_dim).

        Raises:
            ZooError: The heads of k do not fit the coefficients.
        """
        if k.shape[1] % self.coef.shape[1]:
            raise ZooError(
                f"fope has coefficients for {self.coef.shape[1]} key heads, but is given keys of "
                f"{k.shape[1]} heads; use separate_head=False"
            )
        tables = self._tables(q, q_pos)
        if self.query_groups is None:
            turned = _turn(q, *tables)
        else:
            turned = _turn(q, *(table[..., list(self.query_groups), :, :] for table in tables))
        if k_pos is not q_pos:
            tables = self._tables(k, k_pos)
        return turned, _turn(k, *tables)

    def _tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both tables, (G, N, D) or (B, G, N, D)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        size = 2 * self.coef.shape[1] * positions.numel() * self.width * dtype.itemsize
        # Kept tables are recognised by the values that they came from. Looking at those would stop
        # a compiler or wait for another device, and subclasses of tensors need not have any. Tables
        # are kept without their graph, so coefficients in training get new ones.
        if (
            torch.compiler.is_compiling()
            or positions.device.type != "cpu"
            or self.coef.requires_grad
            or any(type(x) is not Tensor for x in (self.coef, positions))
            or torch._C._are_functorch_transforms_active()
            or positions.shape[-1] < 2
            or size > MEMO_BYTES
        ):
            return self._compute(positions, dtype)
        if self._memo is not None:
            where, coef, tables = self._memo
            same = tables[0].dtype == dtype and coef.dtype == self.coef.dtype
            if same and torch.equal(where, positions) and torch.equal(coef, self.coef):
                return tables
        # Made in inference mode, they could not serve a later training pass.
        with torch.inference_mode(False), torch.no_grad():
            tables = self._compute(positions, dtype)
            self._memo = (positions.clone(), self.coef.clone(), tables)
        return tables

    def _compute(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].to(dtype) * self.frequencies(dtype, positions.device)
        return fope_tables(angles, self.coef, self.width // 2, self.zero_sin)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memo": None}

    def extra_repr(self) -> str:
        """What became of the options."""
        return (
            f"train_len={self.train_len}, frequencies={self.inputs}, pairs={self.pairs} of "
            f"{self.width // 2}, heads={self.coef.shape[1]}, sigma={self.sigma:g}"
        )


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, H, N, D) by tables (G, N, D) or (B, G, N, D), G dividing H."""
    groups = cos.shape[-3]
    if groups in (1, x.shape[1]):
        return rope_apply(x, cos, sin, "half")
    folded = x.unflatten(1, (groups, -1))  # (B, G, H / G, N, D)
    return rope_apply(folded, cos.unsqueeze(-3), sin.unsqueeze(-3), "half").flatten(1, 2)
