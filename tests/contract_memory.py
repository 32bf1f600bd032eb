"""Contracts on memory: what a training pass makes and keeps grows with N, not with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from contract_subject import Build
from contract_values import flag
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo import engine
from zoo.attention import Attention

LENGTHS = (128, 256, 512)
# Twice the tokens may take a little more than twice the memory, but nowhere near four times.
GROWTH = 2.5


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what comes out."""
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                # A view that repeats its elements takes no memory of its own.
                self.elements = max(self.elements, item.untyped_storage().nbytes() // 4)
        return out


def measure(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Elements of the largest tensor made, and bytes kept for the backward pass."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = run()
        kept = sum(x.untyped_storage().nbytes() for x in storages.values())
        y.sum().backward()
    return seen.elements, kept


def check_memory(build: Build) -> None:
    """Twice the tokens make and keep about twice the memory, forward and backward."""
    longest = {"max_len": LENGTHS[-1]} if build.takes("max_len") else {}
    for causal in build.modes[-1:]:
        module = build(**longest, **flag(build, causal))
        strips = isinstance(module, Attention) and module.attend is None
        for route in ("auto", "engine") if strips else ("auto",):
            if isinstance(module, Attention):
                module.route = route
            with (
                patch.dict(engine.WHOLE_BYTES, cpu=0),
                patch.dict(engine.STRIP_BYTES, cpu=4096),
            ):
                found = [measure(lambda n=n: module(torch.randn(1, n, 16))) for n in LENGTHS]
            for what, sizes in zip(
                ("largest tensor", "kept"), zip(*found, strict=True), strict=True
            ):
                growth = max(b / a for a, b in zip(sizes, sizes[1:], strict=False))
                assert growth <= GROWTH, (
                    f"{what} grows {growth:.2f} times by 2 N: {sizes} ({route})"
                )
