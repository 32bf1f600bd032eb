"""Contracts on masks: hidden tokens are not seen, and rows that see nothing stay zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import zoo
from zoo.host.attention import Attention
from zoo.testing.promises import refused
from zoo.testing.subject import (
    Build,
    counts,
    draw,
    largest,
    routes_taken,
    settle,
    tiny_strips,
)
from zoo.testing.tolerances import assert_close
from zoo.testing.values import flag

# What masks are made of elsewhere: minus infinity, the lowest numbers of types, round numbers.
HIDDEN = (
    -torch.inf,
    *(torch.finfo(t).min for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    *(-1e4, -1e9),
)


def check_padding(build: Build) -> None:
    """Hidden keys do not influence the others, and padding equals running without it."""
    lengths = torch.tensor([9, 6])
    mask = zoo.padding_mask(lengths)
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        x = build.input(2, 9).requires_grad_()
        y = module(x, mask=mask)
        everything = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        assert_close(module(x, mask=everything), module(x), "a mask that hides nothing")
        real = module(x[1:, :6])
        assert_close(y[1:, :6], real, f"padded against not padded (causal={causal})")
        (gradient,) = torch.autograd.grad((y[1, :6] * draw(*y[1, :6].shape)).sum(), x)
        assert largest(gradient[1, 6:]) == 0, "padding has a gradient"
        other = x.detach().clone()
        other[1, 6:] = 30 * draw(3, x.shape[-1], seed=4)
        assert_close(module(other, mask=mask)[1, :6], y[1, :6], "real rows with new padding")
        front = everything.clone()
        front[1, ..., :3] = False
        if counts(module):
            with refused("counts tokens from the first"):
                module(x, mask=front)
            continue
        y = module(x, mask=front)
        other = x.detach().clone()
        other[1, :3] = 30 * draw(3, x.shape[-1], seed=5)
        changed = module(other, mask=front)
        assert_close(changed[1, 3:], y[1, 3:], "real rows with new padding in front")
        assert_close(changed[:1], y[:1], "the sample without padding")


def check_pairs(build: Build) -> None:
    """A mask of pairs hides exactly these pairs, in every form it may be given."""
    chance = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = (chance < 0.6) | torch.eye(8, dtype=torch.bool)
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        x = build.input(2, 8).requires_grad_()
        y = module(x, mask=mask)
        for i in range(8):
            (gradient,) = torch.autograd.grad(
                (y[:, i] * draw(2, x.shape[-1], seed=i)).sum(), x, retain_graph=True
            )
            leak = largest(gradient[~mask[:, 0, i]])
            assert leak == 0, f"row {i} sees a hidden key (causal={causal}): gradient {leak:.3g}"
        assert_close(module(x, mask=mask.expand(2, 4, 8, 8)), y, "the mask given for each head")
        one = mask[:1]
        assert_close(module(x, mask=one[0, 0]), module(x, mask=one), "the mask given as (N, M)")


def check_additive(build: Build) -> None:
    """A mask that is written as numbers hides what the boolean mask hides, whatever the numbers."""
    pairs = build.traits.mask == "any"
    chance = torch.rand(2, 1, 8 if pairs else 1, 8, generator=torch.Generator().manual_seed(2))
    seen = chance < 0.6
    seen[..., 0] = True  # no padding on the left, which parts that count refuse
    if pairs:
        seen[1, :, 3] = False  # a row without keys
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        x = build.input(2, 8)
        expected = settle(module, x, mask=seen)
        plain = torch.zeros(seen.shape, dtype=torch.float64)
        for hidden in HIDDEN:
            found = settle(module, x, bias=plain.masked_fill(~seen, hidden))
            for name, value in expected.items():
                what = f"{name}, hidden by {hidden:g} (causal={causal})"
                assert_close(found[name], value, what, gradient=name != "output")
        if not build.traits.bias:
            continue
        term = 0.5 * draw(*seen.shape, seed=3)
        given = module(x, mask=seen, bias=term)
        both = term.masked_fill(~seen, -torch.inf)
        assert_close(module(x, bias=both), given, f"a bias and a mask in one (causal={causal})")


def check_empty_rows(build: Build) -> None:
    """A row that may attend to nothing gets zeros from its heads and never NaN."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal))
        for mask in _emptying(build.traits.mask == "any", counts(module)):
            x = build.input(2, 9).requires_grad_()
            for heads, y in _passes(module, x, mask):
                assert bool(y.isfinite().all()), f"output not finite (causal={causal})"
                (gradient,) = torch.autograd.grad((y * draw(*y.shape)).sum(), x)
                assert bool(gradient.isfinite().all()), f"gradient not finite (causal={causal})"
                if heads is None:
                    continue
                triangle = torch.ones(9, 9, dtype=torch.bool)
                allowed = mask & (triangle.tril() if causal else triangle)
                empty = ~allowed.any(-1).expand(2, 4, 9)
                assert bool(empty.any())
                assert largest(heads[empty]) == 0, "an empty row is not zero"


def _emptying(pairs: bool, counting: bool) -> Iterator[Tensor]:
    keys = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    # The first rows of a causal pass see nothing, where a sample may begin with padding.
    keys[1, ..., 5 if counting else 0 : 8 if counting else 4] = False
    keys[0] = False  # no row of this sample sees anything
    yield keys
    if pairs:
        rows = torch.ones(1, 4, 9, 9, dtype=torch.bool)
        rows[:, 1, 2] = False
        rows[:, 3, 8] = False
        yield rows


def _passes(
    module: torch.nn.Module, x: Tensor, mask: Tensor
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Heads and output by the route of choice and, where that is another one, by the engine."""
    with tiny_strips(), routes_taken() as taken:
        found = _heads(module, x, mask)
    yield found
    if not isinstance(module, Attention) or module.attend is not None or "engine" in taken:
        return
    module.route = "engine"
    with tiny_strips():
        found = _heads(module, x, mask)
    module.route = "auto"
    yield found


def _heads(module: torch.nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor]:
    if not isinstance(module, Attention):
        return None, module(x, mask=mask)
    with module.capture() as passes:
        y = module(x, mask=mask)
    return passes[0].heads, y
