"""Golden vectors of the official slot attention, with their names turned into ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """Numbers of one file."""

    def __init__(self, name: str) -> None:
        self.numbers = load_file(GOLDEN / f"{name}.safetensors")

    def __getitem__(self, key: str) -> Tensor:
        return self.numbers[key].clone()

    def state(self, case: str, kind: str = "param") -> dict[str, Tensor]:
        """Parameters or gradients of a case; module names are the official ones."""
        head = f"{kind}.{case}."
        return {k.removeprefix(head): v for k, v in self.numbers.items() if k.startswith(head)}

    def run(self, module: torch.nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
        """Output and gradients of the file's loss."""
        x, slots = self["in.x"].requires_grad_(), self["in.slots"].requires_grad_()
        y = module(x, slots, **inputs)
        (y * self["in.w"]).sum().backward()
        assert x.grad is not None
        assert slots.grad is not None
        found = {"out": y.detach(), "x": x.grad, "slots": slots.grad}
        found.update((n, p.grad) for n, p in module.named_parameters() if p.grad is not None)
        return found


@pytest.fixture
def golden():
    return Golden
