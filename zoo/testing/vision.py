"""Contracts on feature maps and on slots: formats, chance, and what may be permuted."""

from __future__ import annotations

import torch

from zoo.testing.promises import refused
from zoo.testing.subject import SLOTS, Build, Started, draw, largest
from zoo.testing.tolerances import assert_close


def _started(build: Build) -> Started:
    module = build(dtype=torch.float64).eval()
    assert isinstance(module, Started)
    return module


def check_repeat(build: Build) -> None:
    """Outside training the same input gives the same output, whatever came before."""
    module = build(dtype=torch.float64).eval()
    x = build.input(2, 9)
    with torch.no_grad():
        first = module(x)
        module(build.input(3, 7, seed=1))
        assert torch.equal(module(x), first), "a second pass in evaluation differs"


def check_formats(build: Build) -> None:
    """Channels last gives the same numbers and gradients as channels first."""
    module = build(dtype=torch.float64).eval()
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = build.input(2, 9).to(memory_format=memory_format).requires_grad_()
        module.zero_grad()
        y = module(x)
        (y * draw(*y.shape, seed=7)).sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append({"output": y.detach(), "x": x.grad, **gradients})
    for name, value in found[0].items():
        assert_close(found[1][name], value, f"channels last: {name}", gradient=name != "output")


def check_slot_order(build: Build) -> None:
    """Permuting the initial slots, and their noise, permutes the slots."""
    module = _started(build)
    x = build.input(2, 9)
    start = module.start(x)
    order = torch.tensor([2, 0, 3, 1])
    moved = {"slots": start["slots"][:, order]}
    if "noise" in start:
        moved["noise"] = start["noise"][..., order]
    with torch.no_grad():
        y = module.inner(x, **start)
        assert_close(module.inner(x, **moved), y[:, order], "outputs of permuted slots")
    assert largest(y[:, order] - y) > 1e-9, "all slots are the same"


def check_input_order(build: Build) -> None:
    """Permuting the inputs, and their noise, changes nothing but the columns of the weights."""
    module = _started(build)
    x = build.input(2, 9)
    start = module.start(x)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    moved = {**start, **({"noise": start["noise"][:, order]} if "noise" in start else {})}
    with torch.no_grad():
        y, weights = module.inner(x, **start, return_weights=True)
        z, other = module.inner(x[:, order], **moved, return_weights=True)
    assert weights.shape == (2, 9, SLOTS["slots"]), f"weights of shape {tuple(weights.shape)}"
    assert_close(z, y, "slots of permuted inputs")
    assert_close(other, weights[:, order], "weights of permuted inputs")


def check_slot_mask(build: Build) -> None:
    """Hidden inputs have no influence: as if they were not there, and no gradient to them."""
    module = _started(build)
    x = build.input(2, 9).requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    y, weights = module.inner(x, **module.start(x), mask=mask, return_weights=True)
    assert largest(weights[1, 6:]) == 0, "a hidden input has weight"
    (gradient,) = torch.autograd.grad((y * draw(*y.shape)).sum(), x)
    assert largest(gradient[1, 6:]) == 0, "a hidden input gets a gradient"
    assert largest(gradient[1, :6]) > 0, "the inputs get no gradient"
    with torch.no_grad():
        short = x[1:, :6]
        assert_close(y[1:], module.inner(short, **module.start(short)), "hidden against removed")
    with refused("mask"):
        module.inner(x, mask=mask[:, :5])


def check_slot_chance(build: Build) -> None:
    """What is drawn comes from the generator alone, or from the global one where none is given."""
    module = _started(build).inner
    x = build.input(2, 9)
    with torch.no_grad():
        first = module(x, generator=torch.Generator().manual_seed(1))
        assert first.shape == (2, SLOTS["slots"], SLOTS["dim"])
        state = torch.get_rng_state()
        again = module(x, generator=torch.Generator().manual_seed(1))
        assert torch.equal(again, first), "the same generator gives other slots"
        assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
        torch.manual_seed(3)
        drawn = module(x)
        torch.manual_seed(3)
        assert torch.equal(module(x), drawn), "the same seed gives other slots"
    with refused("slots"):
        module(x, slots=draw(2, SLOTS["slots"], SLOTS["dim"] + 1))
