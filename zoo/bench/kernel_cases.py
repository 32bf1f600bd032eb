"""What the kernel benchmark measures: mechanisms with a Triton kernel, and who competes with it.

A case knows how to call its mechanism through each back-end, what the work is worth (useful pairs
of queries and keys, or bytes), and sizes small enough for the float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
# Products of D a pair: scores and values forward; backward these again and three more.
FORWARD, BACKWARD = 2, 5


@dataclass(frozen=True)
class Case:
    """A mechanism at fixed options.

    Args:
        name: Row of the table.
        form: Form of the mechanism for (back-end, N): a function of q, k and v.
        pairs: Useful pairs of queries and keys per head at length N, or None for linear attention,
            which is bound by the bytes that it moves.
        rivals: Back-ends beside "triton", fastest guess first.
        batch: Samples B.
        heads: Heads H.
        head_dim: Width D.
        check: Lengths at which the kernel is compared with the reference, odd ones among them.
        smoke: Length of the smoke mode.
        valid: Lengths that the mechanism can have.
    """

    name: str
    form: Callable[[str, int], Form]
    pairs: Callable[[int], float] | None
    rivals: tuple[str, ...] = ("torch",)
    batch: int = 1
    heads: int = 8
    head_dim: int = 128
    check: tuple[int, ...] = (1000, 2048)
    smoke: int = 100
    valid: Callable[[int], bool] = field(default=lambda length: True)

    def flops(self, length: int, both: bool) -> float | None:
        """Useful floating point operations of a call, None for linear attention."""
        if self.pairs is None:
            return None
        products = FORWARD + (BACKWARD if both else 0)
        return 2.0 * products * self.pairs(length) * self.head_dim * self.batch * self.heads

    def bytes(self, length: int, both: bool, size: int) -> float:
        """Bytes that have to be read and written at least: q, k, v, out, and their gradients."""
        tensors = 4 if not both else 4 + 8
        return float(tensors * self.batch * self.heads * length * self.head_dim * size)


def causal_pairs(length: int) -> float:
    """Pairs of causal attention."""
    return length * (length + 1) / 2


def sdpa(length: int) -> Form:
    """Causal softmax attention by PyTorch: the yardstick of every case."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _moba(block: int, topk: int) -> Callable[[str, int], Form]:
    def form(backend: str, length: int) -> Form:
        from zoo.select.moba import moba_attention

        return lambda q, k, v: moba_attention(q, k, v, block, topk, backend=backend)

    return form


def _moba_pairs(block: int, topk: int) -> Callable[[int], float]:
    def pairs(length: int) -> float:
        full, rest = divmod(length, block)
        own = full * causal_pairs(block) + causal_pairs(rest)
        sizes = [block] * full + [rest]
        return own + float(sum(n * min(topk - 1, i) * block for i, n in enumerate(sizes)))

    return pairs


def _landmark(block: int) -> Callable[[str, int], Form]:
    def form(backend: str, length: int) -> Form:
        from zoo.normalize.landmark import landmark_attention

        return lambda q, k, v: landmark_attention(q, k, v, block, backend=backend)

    return form


def _lightning(backend: str, length: int) -> Form:
    from zoo.attend.lightning import alibi_slopes, lightning_attention

    if backend == "fla":
        return _fla()

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slope = alibi_slopes(q.shape[1]).to(q.device)
        mode = "parallel" if backend == "reference" else "chunk"
        out = lightning_attention(
            q, k, v, slope, mode=mode, backend="auto" if backend == "reference" else backend
        )
        assert isinstance(out, Tensor)
        return out

    return form


def _fla() -> Form:
    """The same function by flash-linear-attention, where that is installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        raise ZooError("flash-linear-attention is not installed") from None
    from zoo.attend.lightning import alibi_slopes

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decay = -alibi_slopes(q.shape[1]).to(q.device)
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return chunk_simple_gla(*turned, g_gamma=decay, scale=1.0)[0].transpose(1, 2)

    return form


def _grid(kernel: int) -> Callable[[str, int], Form]:
    def form(backend: str, length: int) -> Form:
        from zoo.select.neighborhood import neighborhood_attention

        side = isqrt(length)
        options: dict[str, Any] = {"kernel_size": (kernel, kernel), "backend": backend}
        return lambda q, k, v: _only(neighborhood_attention(q, k, v, (side, side), **options))

    return form


def _window(width: int) -> Callable[[str, int], Form]:
    def form(backend: str, length: int) -> Form:
        from zoo.select.neighborhood import neighborhood_attention

        options: dict[str, Any] = {"kernel_size": (width,), "is_causal": True, "backend": backend}
        return lambda q, k, v: _only(neighborhood_attention(q, k, v, (length,), **options))

    return form


def _only(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


def _square(side: int) -> Callable[[int], bool]:
    return lambda length: isqrt(length) ** 2 == length and isqrt(length) >= side


def cases(smoke: bool = False) -> list[Case]:
    """Every case, the most telling first.

    Args:
        smoke: Options small enough for the interpreter instead of those of the goals.
    """
    if smoke:
        small: dict[str, Any] = {"heads": 2, "head_dim": 32, "check": (100,)}
        return [
            Case("moba b16 k3", _moba(16, 3), _moba_pairs(16, 3), **small),
            Case("lightning", _lightning, None, ("torch", "fla"), **small),
            Case("landmark L15", _landmark(15), causal_pairs, **small),
            Case(
                *("neighborhood 3x3", _grid(3), lambda n: n * 9.0),
                valid=_square(3),
                **small,
            ),
            Case("window 24", _window(24), lambda n: _window_pairs(n, 24), **small),
        ]
    return [
        Case("moba b128 k8", _moba(128, 8), _moba_pairs(128, 8)),
        Case("lightning", _lightning, None, ("torch", "fla"), batch=4, heads=32),
        Case("moba b512 k3", _moba(512, 3), _moba_pairs(512, 3)),
        Case("landmark L63", _landmark(63), causal_pairs),
        Case(
            *("neighborhood 13x13", _grid(13), lambda n: n * 169.0, ("flex", "torch")),
            check=(33 * 33, 2025),
            valid=_square(13),
        ),
        Case(
            *("window 1024", _window(1024), lambda n: _window_pairs(n, 1024), ("flex", "torch")),
            check=(1500, 2048),
            valid=lambda n: n >= 1024,
        ),
        Case("window 256", _window(256), lambda n: _window_pairs(n, 256), ("flex", "torch")),
    ]


def _window_pairs(length: int, width: int) -> float:
    short = min(length, width)
    return causal_pairs(short) + float((length - short) * width)


def inputs(
    case: Case, length: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of a case, (B, H, N, D), that want gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.batch, case.heads, length, case.head_dim)
    made = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    q, k, v = (x.to(dtype).requires_grad_() for x in made)
    return q, k, v
