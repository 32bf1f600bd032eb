"""Other golden files, of the form of those in tests/golden but of other sizes and options.

A golden test that reads what it needs from the file passes on these as well; one that knows a size
by heart does not. Each module here makes one file, by the plain reference functions of the zoo or
by the equations, in float64, and stores it in the type of the file that it stands in for. Where a
file holds an option as a word or in its cases, there are other ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from golden_files import Golden
from torch import Tensor


def make(name: str) -> Golden:
    """Another golden file `name`."""
    made: Golden = importlib.import_module(f"golden_forms.{name}").make()
    return made


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about itself."""
    note = "laid out as the file that it stands in for"
    return {"config": dict(config), "source": "the zoo's reference functions", "note": note}


class Source:
    """Normal numbers in float64, one tensor after another.

    Args:
        seed: Of the generator.
        size: Standard deviation.
    """

    def __init__(self, seed: int, size: float = 1.0) -> None:
        self.generator, self.size = torch.Generator().manual_seed(seed), size

    def __call__(self, *shape: int) -> Tensor:
        """The next tensor."""
        return self.size * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def whole(self, below: int, *shape: int) -> Tensor:
        """Whole numbers from 0 on."""
        return torch.randint(below, shape, generator=self.generator)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H D) to (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)


def turn(x: Tensor, base: float, places: Tensor | None = None) -> Tensor:
    """Rotary positions of interleaved pairs, 0, 1, .. unless told, by products of complex numbers.

    Args:
        x: (.., N, D).
        base: Of the wavelengths.
        places: Positions, (N,).
    """
    pairs = x.shape[-1] // 2
    places = torch.arange(x.shape[-2]) if places is None else places
    angles = places[:, None] * base ** (-torch.arange(pairs).double() / pairs)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def gradients(loss: Tensor, of: Mapping[str, Tensor], start: str = "grad.") -> dict[str, Tensor]:
    """Gradients of a loss by the names of what they belong to."""
    found = torch.autograd.grad(loss, [*of.values()], retain_graph=True)
    return {f"{start}{name}": x for name, x in zip(of, found, strict=True)}


def prefixed(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {f"{start}{name}": x for name, x in tensors.items()}


def stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as a file holds them: floating point ones in its type."""
    return {
        name: x.detach().to(dtype) if x.is_floating_point() else x for name, x in tensors.items()
    }
