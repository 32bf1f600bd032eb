"""MESH: official numbers, the sweep by hand against autograd, ties that break, bad input."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.slots._sinkhorn import log_marginal, mesh, mesh_reference, sinkhorn, sinkhorn_reference
from zoo.slots.mesh import MESH
from zoo.slots.slot import SlotAttention
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

# A short descent: what is unrolled is compiled and differentiated in every contract.
CONTRACT_OPTIONS = [
    {"hidden": 6, "iterations": 1, "mesh_steps": 2, "sinkhorn_iterations": 2},
    {
        "hidden": 5,
        "iterations": 1,
        "mesh_steps": 1,
        "sinkhorn_iterations": 2,
        "learn_mesh_lr": True,
        "distance": "cosine",
        "reuse_uv": False,
        "exact": False,
        "init": "identical",
    },
]
SMALL = {"dim_in": 6, "dim": 8, "slots": 4, "hidden": 10, "dtype": torch.float64}
CASES = {
    "image": {},
    "video": {"distance": "cosine", "scale_cost": 6, "scale_marginals": 18},
    "learnlr": {"learn_mesh_lr": True},
    "detach": {"detach_slots": True},
}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return MESH(**{**SMALL, **options})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_official_numbers_of_the_module(golden, case, backend):
    numbers = golden("mesh")
    module = build(**CASES[case], backend=backend)
    module.load_state_dict(numbers.state(case))
    noise = numbers["in.noise"]
    if case == "detach":
        x = numbers["in.x"].requires_grad_()
        y = module(x, numbers["in.slots"], noise=noise)
        (y * numbers["in.w"]).sum().backward()
        found = {"out": y, "x": x.grad}
    else:
        found = numbers.run(module, noise=noise)
    assert_close(found["out"], numbers[f"out.{case}.slots"], "slots")
    for name, value in numbers.state(case, "grad").items():
        assert_close(found[name], value, f"gradient of {name}", gradient=True)


@pytest.mark.parametrize(
    ("descend", "plan_of"), [(mesh_reference, sinkhorn_reference), (mesh, sinkhorn)]
)
def test_official_numbers_of_the_functions(golden, descend, plan_of):
    numbers = golden("mesh")
    cost, a, b = (numbers[f"in.fn.{name}"].requires_grad_() for name in ("C", "a", "b"))
    weight = numbers["in.fn.w"]
    plan, u, v = plan_of(cost, log_marginal(a), log_marginal(b))
    for name, value in {"T": plan, "u": u, "v": v}.items():
        assert_close(value, numbers[f"out.fn.sinkhorn.{name}"], f"sinkhorn {name}")
    gradients = torch.autograd.grad((plan * weight).sum(), (cost, a, b))
    for name, value in zip(("C", "a", "b"), gradients, strict=True):
        assert_close(value, numbers[f"grad.fn.sinkhorn.{name}"], f"d{name}", gradient=True)
    half, *_ = plan_of(cost, log_marginal(a), log_marginal(b), iterations=3, temperature=0.5)
    assert_close(half, numbers["out.fn.sinkhorn_t05_i3.T"], "plan at temperature 0.5")
    noisy = cost + 1e-3 * numbers["in.fn.noise"]
    sharp, v = descend(noisy, log_marginal(a), log_marginal(b))
    plan, *_ = plan_of(sharp, log_marginal(a), log_marginal(b), v=v)
    assert_close(sharp, numbers["out.fn.mesh.C"], "cost")
    assert_close(v, numbers["out.fn.mesh.v"], "v")
    assert_close(plan, numbers["out.fn.mesh.T"], "plan")
    (gradient,) = torch.autograd.grad((plan * weight).sum(), cost)
    assert_close(gradient, numbers["grad.fn.mesh.C"], "dC", gradient=True)
    fresh, none = descend(noisy, log_marginal(a), log_marginal(b), lr=1.0, steps=2, reuse=False)
    assert none is None
    assert_close(fresh, numbers["out.fn.mesh_noreuse_lr1_it2.C"], "cost of fresh starts")


@pytest.mark.parametrize("n", [3, 6, 11])  # one input leaves no plan to choose, nor a gradient
@pytest.mark.parametrize("options", [{}, {"reuse": False}, {"steps": 2, "iterations": 3}])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_sweep_by_hand_is_autograd(n, options, hidden):
    mask = None
    if hidden:
        mask = torch.arange(n) < torch.tensor([[n], [n - 1]])
    inputs = [draw(2, n, 3).abs(), draw(2, n, seed=1), draw(2, 3, seed=2)]
    results = []
    for function in (mesh_reference, mesh):
        c, a, b = (t.clone().requires_grad_() for t in inputs)
        lr = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
        log_a, log_b = log_marginal(a.softmax(1), mask), log_marginal(b.softmax(1))
        sharp, v = function(c, log_a, log_b, lr=lr, **options)
        plan, *_ = sinkhorn(sharp, log_a, log_b, v=v)
        loss = (plan * draw(*plan.shape, seed=4)).sum() + sharp.square().sum()
        results.append([sharp, plan, *torch.autograd.grad(loss, (c, a, b, lr))])
    for i, (found, expected) in enumerate(zip(results[1], results[0], strict=True)):
        assert_close(found, expected, f"result {i}", gradient=i > 1)


def test_constant_warm_starts_change_the_gradient_only():
    inputs = [draw(2, 6, 3).abs(), draw(2, 6, seed=1), draw(2, 3, seed=2)]
    found = []
    for exact in (True, False):
        c, a, b = (t.clone().requires_grad_() for t in inputs)
        log_a, log_b = log_marginal(a.softmax(1)), log_marginal(b.softmax(1))
        sharp, v = mesh(c, log_a, log_b, lr=0.5, steps=2, exact=exact)
        plan, *_ = sinkhorn(sharp, log_a, log_b, iterations=1, v=v)
        found.append((plan, torch.autograd.grad(plan[0, 0, 0], c)[0]))
    assert_close(found[1][0], found[0][0], "plan")
    assert float((found[1][1] - found[0][1]).abs().max()) > 1e-6


def test_the_gradient_passes_to_the_cost_unchanged():
    cost = draw(1, 4, 3).requires_grad_()
    zeros = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda c: mesh(c, *zeros)[0], cost)
    assert_close(jacobian.reshape(12, 12), torch.eye(12, dtype=torch.float64), "dC_n / dC_0")


def entropy(plan):
    return float(torch.special.entr(plan.clamp(1e-20, 1)).mean((1, 2)).sum())


def test_entropy_falls(golden):
    numbers = golden("mesh")
    cost, a, b = numbers["in.fn.C"], numbers["in.fn.a"].log(), numbers["in.fn.b"].log()
    plain = entropy(sinkhorn(cost, a, b)[0])
    sharp, v = mesh(cost + 1e-3 * numbers["in.fn.noise"], a, b)
    low = entropy(sinkhorn(sharp, a, b, v=v)[0])
    assert (plain, low) == (pytest.approx(0.288, abs=1e-3), pytest.approx(0.148, abs=1e-3))


def test_ties_break_by_noise_alone():
    cost = torch.ones(1, 6, 2, dtype=torch.float64)
    a = torch.full((1, 6), 1 / 3, dtype=torch.float64).log()
    b = torch.zeros(1, 2, dtype=torch.float64)
    assert_close(sinkhorn(cost, a, b)[0], torch.full_like(cost, 1 / 6), "plan of equal costs")
    sharp, v = mesh(cost, a, b)
    plan = sinkhorn(sharp, a, b, v=v)[0]
    assert_close(plan[..., 0], plan[..., 1], "columns without noise")
    sharp, v = mesh(cost + 1e-3 * draw(1, 6, 2), a, b)
    plan = sinkhorn(sharp, a, b, v=v)[0][0]
    assert float((plan.amax(1) - 1 / 3).abs().max()) < 0.01
    assert float(plan.amin(1).max()) < 0.01
    assert plan.argmax(1).bincount().tolist() == [3, 3]


def test_equal_slots_are_separated_where_a_plain_plan_keeps_them():
    x = draw(3, 9, 6)
    module = build(init="identical")
    y = module(x, generator=torch.Generator().manual_seed(0)).detach()
    distances = torch.cdist(y, y)
    assert float(distances.amax((1, 2)).min()) > 0.1
    torch.manual_seed(0)
    plain = SlotAttention(**SMALL, init="identical", normalizer="sinkhorn")
    z = plain(x).detach()
    assert float((z - z[:, :1]).abs().max()) < 1e-12


def test_without_steps_it_is_sinkhorn_on_the_noisy_cost():
    module = build(mesh_steps=0, noise_scale=0.0)
    plain = SlotAttention(**SMALL, normalizer="sinkhorn")
    plain.load_state_dict(module.state_dict())
    x, s = draw(2, 7, 6), draw(2, 4, 8, seed=1)
    assert_close(module(x, s), plain(x, s), "slots")
    loud = build(mesh_steps=0, noise_scale=1.0)
    assert float((loud(x, s) - plain(x, s)).detach().abs().max()) > 1e-6


def test_the_noise_stays_for_all_rounds():
    x, s, noise = draw(2, 7, 6), draw(2, 4, 8, seed=1), draw(2, 7, 4, seed=2)
    module = build(noise_scale=0.5)
    y = module(x, s, noise=noise)
    module.iterations = 1
    for _ in range(3):
        s = module(x, s, noise=noise)
    assert_close(s, y, "three rounds one by one")


def test_it_runs_where_autograd_may_not():
    x, s, noise = draw(2, 7, 6), draw(2, 4, 8, seed=1), draw(2, 7, 4, seed=2)
    module = build()
    expected = module(x, s, noise=noise).detach()
    reference = build(backend="reference")
    with torch.no_grad():
        assert_close(reference(x, s, noise=noise), expected, "reference under no_grad")
    with torch.inference_mode():
        assert_close(module(x, s, noise=noise), expected, "under inference_mode")
        with pytest.raises(ZooError, match=r"Trainer\(inference_mode=False\)"):
            reference(x, s, noise=noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh_steps": -1}, "mesh_steps=-1 must be a whole number of at least 0"),
        ({"mesh_lr": 0}, "mesh_lr=0 must be a number above 0"),
        ({"mesh_lr": float("nan")}, "mesh_lr=nan must be"),
        ({"noise_scale": -0.1}, "noise_scale=-0.1 must be"),
        ({"reuse_uv": 1}, "reuse_uv=1 must be True or False"),
        ({"exact": "yes"}, "exact='yes' must be True or False"),
        ({"backend": "triton"}, "unknown backend 'triton'"),
        ({"distance": "l3"}, "unknown distance 'l3'"),
        ({"backend": "reference", "exact": False}, "backend='reference' is exact"),
        ({"mesh_steps": 0, "learn_mesh_lr": True}, "learn_mesh_lr=True needs mesh_steps"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_noise_that_does_not_fit_is_named():
    with pytest.raises(ZooError, match=r"noise of shape \(2, 7, 3\) must be \(2, 7, 4\)"):
        build()(draw(2, 7, 6), noise=draw(2, 7, 3))


def test_costs_beyond_the_range_of_factors_are_taken_in_logarithms():
    inputs = [400 * draw(2, 6, 3), draw(2, 6, seed=1).softmax(1).log(), draw(2, 3).softmax(1).log()]
    results = []
    for function in (sinkhorn_reference, sinkhorn):
        cost, a, b = (t.clone().requires_grad_() for t in inputs)
        plan, u, v = function(cost, a, b)
        loss = (plan * draw(2, 6, 3, seed=4)).sum() + u.square().mean() + v.square().mean()
        results.append([plan, *torch.autograd.grad(loss, (cost, a, b))])
    for i, (found, expected) in enumerate(zip(results[1], results[0], strict=True)):
        assert_close(found, expected, f"result {i}", gradient=i > 0)
    sharp, _ = mesh(inputs[0], *inputs[1:])
    assert bool(sharp.isfinite().all())


def test_the_backend_is_its_route():
    module = build()
    assert module.route is None
    module.route = "reference"
    assert module.backend == "reference"
    with pytest.raises(ZooError, match="did you mean 'reference'"):
        module.route = "referense"
