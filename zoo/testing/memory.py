"""Contracts on memory: what a training pass makes and keeps grows with N, not with its square."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.host import engine
from zoo.host.attention import Attention
from zoo.testing.subject import Build, routes_taken
from zoo.testing.values import flag

LENGTHS = (64, 128, 256)
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


def growth(module: torch.nn.Module) -> dict[str, float]:
    """How many times more the largest tensor and the bytes kept are when N is doubled."""

    def run(length: int) -> tuple[int, int]:
        return measure(lambda: module(torch.randn(1, length, 16)))

    with patch.dict(engine.WHOLE_BYTES, cpu=0), patch.dict(engine.STRIP_BYTES, cpu=4096):
        found = [run(length) for length in LENGTHS]
    sizes = dict(zip(("the largest tensor", "what is kept"), zip(*found, strict=True), strict=True))
    return {what: max(b / a for a, b in pairwise(size)) for what, size in sizes.items()}


def check_memory(build: Build) -> None:
    """Twice the tokens make and keep about twice the memory, forward and backward."""
    longest: dict[str, Any] = {"max_len": LENGTHS[-1]} if build.takes("max_len") else {}
    module = build(**longest, **flag(build, build.modes[-1]))
    strips = isinstance(module, Attention) and module.attend is None
    for route in ("auto", "engine") if strips else ("auto",):
        if isinstance(module, Attention):
            module.route = route
        with routes_taken() as taken:
            found = growth(module)
        for what, times in found.items():
            assert times <= GROWTH, f"route {route}: {what} grows {times:.2f} times for 2 N"
        if set(taken) == {"engine"}:
            break  # asked for by its name, it would run the same again
