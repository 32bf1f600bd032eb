"""Contracts on values: shapes, who depends on whom, and that all ways to compute agree."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.errors import ZooError
from zoo.host import routes
from zoo.host.attention import Attention
from zoo.testing.subject import (
    SLOTS,
    Build,
    Started,
    draw,
    largest,
    routes_taken,
    settle,
    tiny_strips,
)
from zoo.testing.tolerances import assert_close


def check_shape(build: Build) -> None:
    """The output has the input's shape, type and device, for any layout, and x is left alone."""
    slots = build.entry.kind == "slots"
    for causal in build.modes:
        for dtype in (torch.float32, torch.float64):
            module = build(dtype=dtype, **flag(build, causal))
            for batch, length in ((1, 1), (2, 7), (3, 13)):
                x = build.input(batch, length, dtype=dtype)
                kept = x.clone()
                y = module(x)
                due = (batch, *map(SLOTS.get, ("slots", "dim"))) if slots else x.shape
                assert y.shape == due, f"output of shape {tuple(y.shape)} for {tuple(x.shape)}"
                assert y.dtype == dtype, f"output of type {y.dtype} for {dtype}"
                assert y.device == x.device
                assert bool(y.isfinite().all()), f"output not finite at {tuple(x.shape)}"
                assert torch.equal(x, kept), "the input was changed in place"
                strided = torch.stack([x, -x], -1)[..., 0]
                assert_close(module(strided), y, "output of a strided input")


def flag(build: Build, causal: bool) -> dict[str, bool]:
    """The argument `causal`, where the constructor has it."""
    return {"causal": causal} if build.takes("causal") else {}


def check_gradients(build: Build) -> None:
    """Every parameter and the input get a finite gradient that is not zero."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal))
        if isinstance(module, Started):
            module.own = True  # what a given start leaves out gets its gradient too
        found = settle(module, build.input(2, 13))
        wanted = [n for n, p in module.named_parameters() if p.requires_grad]
        for name in ["x", *wanted]:
            assert name in found, f"{name} gets no gradient (causal={causal})"
            assert bool(found[name].isfinite().all()), f"gradient of {name} is not finite"
            assert largest(found[name]) > 0, f"gradient of {name} is zero"


def check_causal(build: Build) -> None:
    """No output depends on a later token, by gradient and by changing the later tokens."""
    module = build(causal=True, dtype=torch.float64)
    x = build.input(2, 9).requires_grad_()
    y = module(x)
    cotangent = draw(*y.shape, seed=3)
    for i in range(x.shape[1] - 1):
        (gradient,) = torch.autograd.grad(
            (y[:, i] * cotangent[:, i]).sum(), x, retain_graph=True, materialize_grads=True
        )
        leak = largest(gradient[:, i + 1 :])
        assert leak == 0, f"causal=True: d y_{i} / d x_j is {leak:.3g} for some j > {i}"
        other = x.detach().clone()
        other[:, i + 1 :] = 3 * draw(*other[:, i + 1 :].shape, seed=i + 10)
        with torch.no_grad():
            changed = module(other)
        assert_close(
            changed[:, : i + 1], y[:, : i + 1], f"causal=True: outputs up to {i}, new future"
        )


def check_bidirectional(build: Build) -> None:
    """With causal=False some output depends on a later token."""
    module = build(causal=False, dtype=torch.float64)
    x = build.input(2, 9)
    other = x.clone()
    other[:, 1:] += draw(*other[:, 1:].shape, seed=3)
    with torch.no_grad():
        change = largest(module(other)[:, 0] - module(x)[:, 0])
    assert change > 1e-9, "causal=False: the first output does not see the second token or later"


def check_batch(build: Build) -> None:
    """A sample's output depends on that sample alone."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        x = build.input(3, 8).requires_grad_()
        y = module(x)
        for b in range(3):
            assert_close(module(x[b : b + 1]), y[b : b + 1], f"sample {b} alone")
        (gradient,) = torch.autograd.grad((y[0] * draw(*y[0].shape)).sum(), x)
        assert largest(gradient[1:]) == 0, "sample 0 depends on another sample"


def check_equivariance(build: Build) -> None:
    """Without positions and causality, permuting the tokens permutes the outputs."""
    module = build(dtype=torch.float64, **flag(build, False)).eval()
    x = build.input(2, 11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    assert_close(module(x[:, order]), module(x)[:, order], "outputs of permuted tokens")


def check_positions(build: Build) -> None:
    """Giving the default positions, for all samples or for each, changes nothing."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal))
        x = build.input(2, 9)
        y = module(x)
        steps = torch.arange(9)
        for positions in (steps, steps.expand(2, 9)):
            given = module(x, positions=positions)
            assert_close(given, y, f"positions of shape {tuple(positions.shape)}")


def check_packed(build: Build) -> None:
    """Sequences packed into one sample get the outputs and gradients that each gets alone."""
    ends = [0, 5, 6, 6, 13]
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal))
        assert isinstance(module, Attention)
        x = build.input(1, 13)
        bounds = torch.tensor(ends, dtype=torch.int32)
        pieces = [x[:, a:b] for a, b in pairwise(ends) if a < b]
        with torch.no_grad():
            alone = torch.cat([module(piece) for piece in pieces], 1)
            assert_close(module(x, cu_seqlens=bounds), alone, "packed sequences")
            with tiny_strips():
                assert_close(module(x, cu_seqlens=bounds), alone, "packed, in strips")
            if build.traits.mask != "none":
                seen = torch.ones(1, 1, 1, 13, dtype=torch.bool)
                seen[..., [4, 11, 12]] = False  # the ends of two sequences
                alone = torch.cat(
                    [module(x[:, a:b], mask=seen[..., a:b]) for a, b in pairwise(ends) if a < b],
                    1,
                )
                shown = seen[0, 0, 0]
                packed = module(x, cu_seqlens=bounds, mask=seen)
                assert_close(packed[:, shown], alone[:, shown], "packed, with hidden ends")
        found = settle(module, x, cu_seqlens=bounds)["x"]
        x = x.detach().requires_grad_()
        y = torch.cat([module(x[:, a:b]) for a, b in pairwise(ends) if a < b], 1)
        (expected,) = torch.autograd.grad((y * draw(*y.shape, seed=7)).sum(), x)
        if not zoo.auxiliary_losses(module):  # those of a batch are not sums over its sequences
            assert_close(found, expected, "gradient of packed sequences", gradient=True)


def check_grouped(build: Build) -> None:
    """Groups of heads share keys: as if each head had its own copy, where shapes let us copy."""
    for causal in build.modes:
        facts: dict[str, Any] = {"dtype": torch.float64, **flag(build, causal)}
        groups = 2
        try:
            grouped = build(kv_heads=groups, **facts)
        except ZooError as error:
            assert "kv_heads=1" in str(error)  # noqa: PT017 (multi-query has no other number)
            groups = 1
            grouped = build(kv_heads=groups, **facts)
        assert isinstance(grouped, Attention)
        assert grouped.kv_heads == groups
        found = settle(grouped, build.input(2, 9))
        for name, parameter in grouped.named_parameters():
            assert name in found, f"{name} gets no gradient with kv_heads={groups}"
            assert found[name].shape == parameter.shape
        state = grouped.state_dict()
        weight = state.get("project.qkv.weight")
        layout = grouped.layout
        if weight is None or (layout.score_heads, layout.k_heads) != (4, groups):
            continue  # only the plain projection says how its rows are to be copied
        plain = Build("mha")(dtype=torch.float64)
        assert isinstance(plain, Attention)
        full = plain.project
        width = layout.qk_dim
        q, k, v = weight.split((4 * width, groups * width, groups * width))
        tiled = [w.unflatten(0, (groups, width)).repeat_interleave(4 // groups, 0) for w in (k, v)]
        full.load_state_dict({"qkv.weight": torch.cat([q, *(w.flatten(0, 1) for w in tiled)])})
        x = build.input(2, 9)
        expected = copy.copy(grouped)
        expected._modules = {**grouped._modules, "project": full}
        assert_close(grouped(x), expected(x), f"kv_heads={groups}, against the keys tiled to 4")


def check_cross(build: Build) -> None:
    """Queries meet a context of another length; hidden context is not seen; caching it is safe."""
    module = build(dtype=torch.float64, **flag(build, False)).eval()
    x, context = build.input(2, 7), build.input(2, 11, seed=1).requires_grad_()
    y = module(x, context)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad((y * draw(*y.shape)).sum(), context)
    assert largest(gradient) > 0, "the context has no influence"
    assert_close(module(x[:, :5], context), y[:, :5], "fewer queries on the same context")
    if build.traits.mask != "none":
        mask = zoo.padding_mask(torch.tensor([11, 6]))
        hidden = context.detach().clone()
        hidden[1, 6:] = 30 * draw(5, x.shape[-1], seed=4)
        seen = module(x, context, mask=mask)
        assert_close(module(x, hidden, mask=mask), seen, "outputs with new hidden context")
        short = module(x[1:], context[1:, :6])
        assert_close(seen[1:], short, "hidden context against no such context")
    if build.traits.decode:
        cache = zoo.LayerCache()
        with torch.no_grad():
            steps = [module(x[:, i : i + 1], context, cache=cache) for i in range(7)]
        assert_close(torch.cat(steps, 1), y, "queries one at a time on a cached context")


def check_bias(build: Build) -> None:
    """An additive bias acts on the scores: zero is none, and it gets its gradient."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        x = build.input(2, 7)
        y = module(x)
        zero = torch.zeros(7, 7, dtype=torch.float64)
        assert_close(module(x, bias=zero), y, "outputs with a bias of zero")
        bias = draw(2, 4, 7, 7, seed=2).requires_grad_()
        biased = module(x, bias=bias)
        assert largest(biased - y) > 1e-9, "the bias has no influence"
        (gradient,) = torch.autograd.grad((biased * draw(*y.shape)).sum(), bias)
        assert bool(gradient.isfinite().all())
        assert largest(gradient) > 0, "the bias gets no gradient"
        if causal:
            future = torch.ones(7, 7, dtype=torch.bool).triu(1)
            assert largest(gradient[..., future]) == 0, "bias of a later key is used"


def check_weights(build: Build) -> None:
    """need_weights gives (B, H, N, M) whose product with v is what the heads put out."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        assert isinstance(module, Attention)
        x = build.input(2, 7)
        values: list[tuple[Tensor, Tensor]] = []

        def remember(m: object, a: object, out: Any, values: list[Any] = values) -> None:
            values.append(out[1:])

        with module.capture() as passes, module.project.register_forward_hook(remember):
            y, weights = module(x, need_weights=True)
        assert_close(y, module(x), "output beside the weights")
        assert weights.shape == (2, 4, 7, 7), f"weights of shape {tuple(weights.shape)}"
        (seen,) = passes
        assert seen.pattern is not None
        assert_close(seen.pattern, weights, "captured pattern")
        _, v = module.project.read(*values[0])
        v = v.repeat_interleave(4 // v.shape[1], 1)
        heads = module.project.finish(weights @ v)
        if module.attend is None:
            heads = module.normalize.finish(heads)
        assert_close(seen.heads, heads, "output of the heads against weights times values")
        if causal:
            assert largest(weights.triu(1)) == 0, "weights above the diagonal under causal=True"


def check_distribution(build: Build) -> None:
    """Where the distribution is a softmax, the weights of a row are positive and sum to one."""
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        _, weights = module(build.input(2, 9), need_weights=True)
        assert bool((weights >= 0).all()), "a weight is negative"
        total = weights.sum(-1)
        assert_close(total, torch.ones_like(total), "sum of a row's weights")


def check_strips(build: Build) -> None:
    """Every route, and the engine cut into many strips, gives the dense output and gradients."""
    cases: list[dict[str, Any]] = [{}]
    if build.traits.mask != "none":
        cases.append({"mask": zoo.padding_mask(torch.tensor([13, 8]))})
    if build.traits.mask == "any":
        chance = torch.rand(2, 4, 13, 13, generator=torch.Generator().manual_seed(1))
        cases.append({"mask": chance < 0.5})
    for causal in build.modes:
        module = build(dtype=torch.float64, **flag(build, causal)).eval()
        assert isinstance(module, Attention)
        x = build.input(2, 13)
        every = routes.candidates(module)
        names = ["auto", *dict.fromkeys(route.name for route in every)]
        by_name = {route.name for route in every if not route.auto}
        for inputs in cases:
            module.route = "dense"
            expected = settle(module, x, **inputs)
            module.route = "auto"
            done = set(module.explain(x, **inputs).refused)
            for name in names:
                if name in done:
                    continue
                module.route = name
                # What only its name brings is not explained unless it was asked for.
                if name in by_name and _refuses_pass(module, x, inputs):
                    continue
                with tiny_strips(), routes_taken() as taken:
                    found = settle(module, x, **inputs)
                if name == "auto":
                    done |= set(taken) - by_name  # by its name it would be the same again
                assert found.keys() == expected.keys(), f"route {name}: gradients are missing"
                for item, value in expected.items():
                    where = f"route {name}, causal={causal}, {list(inputs)}: {item}"
                    assert_close(found[item], value, where, gradient=item != "output")


def _refuses_pass(module: Attention, x: Tensor, inputs: dict[str, Any]) -> bool:
    try:
        module.explain(x, **inputs)
    except ZooError as error:
        return "cannot take this pass" in str(error)
    return False
