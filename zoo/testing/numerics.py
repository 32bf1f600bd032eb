"""Contracts on numbers: gradients, half precision, compilation, extreme scores."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from zoo.host.attention import Attention
from zoo.testing.subject import Build, Started, largest, settle
from zoo.testing.tolerances import assert_close
from zoo.testing.values import flag


def check_gradcheck(build: Build) -> None:
    """Analytic gradients of the input and of all parameters equal finite differences."""
    whole = build.entry.kind in ("feature", "slots")
    small: dict[str, Any] = {} if whole else {"dim": 8, "heads": 2}
    for causal in build.modes:
        module = build(dtype=torch.float64, **small, **flag(build, causal)).eval()
        x = build.input(2, 5)[..., : small.get("dim")].requires_grad_()
        names = [name for name, _ in module.named_parameters()]

        def forward(
            x: Tensor, *values: Tensor, module: nn.Module = module, names: list[str] = names
        ) -> Tensor:
            return functional_call(module, dict(zip(names, values, strict=True)), (x,))

        values = [p.detach().clone().requires_grad_() for p in module.parameters()]
        torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)


def check_half(build: Build) -> None:
    """Under bfloat16 autocast, and all in bfloat16, results are finite and near float32's."""
    for causal in build.modes:
        module = build(dtype=torch.float32, **flag(build, causal)).eval()
        x = build.input(2, 9, dtype=torch.float32)
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype in (torch.bfloat16, torch.float32), f"output of type {y.dtype}"
        what = f"bfloat16 autocast (causal={causal})"
        assert_close(y, expected, what, dtype=torch.bfloat16, backend="autocast")
        if any(p.requires_grad for p in module.parameters()):
            y.float().square().mean().backward()
        for name, parameter in module.named_parameters():
            gradient = parameter.grad
            if isinstance(module, Started) and gradient is None:
                continue  # the start that the given one replaces
            assert gradient is not None
            assert bool(gradient.isfinite().all()), f"{name}: gradient under {what} not finite"
        y = module.to(torch.bfloat16)(x.bfloat16())
        assert y.dtype == torch.bfloat16, f"output of type {y.dtype} in bfloat16"
        assert_close(y, expected, "all in bfloat16", backend="autocast")


def check_compile(build: Build) -> None:
    """torch.compile takes the whole graph, for any length, and gives the same results."""
    for causal in build.modes[-1:]:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        torch._dynamo.reset()
        compiled: Any = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
        for length in (7, 12):
            x = build.input(2, length)
            expected = settle(module, x)
            found = settle(compiled, x)  # its parameters are named _orig_mod.*
            for name, value in expected.items():
                key = name if name in found else f"_orig_mod.{name}"
                assert_close(found[key], value, f"compiled: {name}", gradient=name != "output")
    torch._dynamo.reset()


def check_vmap(build: Build) -> None:
    """torch.func maps over samples and over an ensemble of weights, gradients included."""
    for causal in build.modes[-1:]:
        facts: dict[str, Any] = {"dtype": torch.float64, **flag(build, causal)}
        ensemble = [build(seed=seed, **facts).eval() for seed in range(2)]
        first = ensemble[0]
        x = build.input(2, 9)
        weights, buffers = stack_module_state(ensemble)

        def loss(
            weights: dict[str, Tensor],
            buffers: dict[str, Tensor],
            x: Tensor,
            first: nn.Module = first,
        ) -> tuple[Tensor, Tensor]:
            y = functional_call(first, (weights, buffers), (x,))
            return y.square().sum(), y

        with warnings.catch_warnings():
            # Operations without a rule of their own are looped over by torch, which says so.
            warnings.filterwarnings("ignore", ".*batching rule.*", UserWarning)
            with torch.no_grad():
                y = vmap(first)(x[:, None])[:, 0]
            assert_close(y, first(x), f"mapped over samples (causal={causal})")
            if not weights:
                continue
            gradients, found = vmap(grad(loss, has_aux=True), in_dims=(0, 0, None))(
                weights, buffers, x
            )
        for i, module in enumerate(ensemble):
            module.zero_grad()
            y = module(x)
            assert_close(found[i], y, f"mapped over an ensemble (causal={causal})")
            y.square().sum().backward()
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    what = f"{name} of an ensemble (causal={causal})"
                    assert_close(gradients[name][i], parameter.grad, what, gradient=True)


def check_large(build: Build) -> None:
    """Scores of size 1e4 leave outputs and gradients finite."""
    for causal in build.modes:
        for dtype in (torch.float32, torch.float64):
            module = build(dtype=dtype, **flag(build, causal))
            found = settle(module, 200 * build.input(2, 9, dtype=dtype))
            for name, value in found.items():
                assert bool(value.isfinite().all()), f"{name} is not finite at scores of 1e4"


def score_size(build: Build) -> float:
    """Largest score that `check_large` makes in plain attention, to see that it is large."""
    module = build(dtype=torch.float64)
    assert isinstance(module, Attention)
    q, k, _ = module.project(200 * build.input(2, 9), None, None)
    return largest(q @ k.transpose(-1, -2) * module.scale)
