"""MESH: official numbers, the sweep by hand against autograd, ties that break, bad input."""

from __future__ import annotations

import re
from ast import literal_eval

import pytest
import torch
from golden_files import read, under
from slot_numbers import DISTANCES, run, sizes, slot_cases, state

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
BACKENDS = ("torch", "reference")
FORMS = [(mesh_reference, sinkhorn_reference), (mesh, sinkhorn)]


def build(seed=0, **options):
    torch.manual_seed(seed)
    return MESH(**{**SMALL, **options})


def options_of(config, case):
    """Ours for those of the official code."""
    given = dict(config[case])
    words = given.pop("as_", None)
    if words is not None:  # as another case, but for one switch
        other, _, change = words.partition(" but ")
        name, _, value = change.partition("=")
        return {**options_of(config, other), name: literal_eval(value)}
    options = {"distance": DISTANCES[given.pop("pairwise_distance")]}
    # Of a length that is learned the file has the value, among the parameters.
    options["learn_mesh_lr"] = given.pop("lr", None) is not None
    return {**options, **given}


def golden_module(tensors, config, case, backend):
    options = options_of(config, case)
    options |= {"sinkhorn_iterations": config["n_sh_iters"], "mesh_steps": config["n_mesh_iters"]}
    options |= {"temperature": config["temperature"], "noise_scale": config["noise_scale"]}
    options["reuse_uv"] = config["reuse_u_v"]
    module = MESH(**sizes(tensors, config), **options, backend=backend)
    module.load_state_dict(state(tensors, case))
    return module


def compare_module(tensors, metadata, case, backend):
    module = golden_module(tensors, metadata["config"], case, backend)
    found = run((tensors, metadata), module, noise=tensors["in.noise"])
    assert_close(found["out"], tensors[f"out.{case}.slots"], "slots")
    for name, value in state(tensors, case, "grad").items():
        assert_close(found[name], value, f"gradient of {name}", gradient=True)


def functional_input(tensors, config):
    """Cost, marginals, the noisy cost and the length of a step that the functions were given."""
    cost, a, b = (tensors[f"in.fn.{name}"].clone().requires_grad_() for name in ("C", "a", "b"))
    cases = [case for case in config.values() if isinstance(case, dict)]
    lr = next(case["mesh_lr"] for case in cases if "mesh_lr" in case)
    return cost, a, b, cost + config["noise_scale"] * tensors["in.fn.noise"], lr


def number(digits):
    """05 in a name is 0.5, 1 is 1."""
    return float(f"0.{digits[1:]}" if digits.startswith("0") else digits)


def compare_functions(tensors, metadata, descend, plan_of):
    config, wanted = metadata["config"], under(tensors, "out.fn.")
    rounds, weight = {"iterations": config["n_sh_iters"]}, tensors["in.fn.w"]
    cost, a, b, noisy, lr = functional_input(tensors, config)
    log_a, log_b = log_marginal(a), log_marginal(b)
    plan, u, v = plan_of(cost, log_a, log_b, **rounds)
    for name, value in {"T": plan, "u": u, "v": v}.items():
        assert_close(value, wanted[f"sinkhorn.{name}"], f"sinkhorn {name}")
    gradients = torch.autograd.grad((plan * weight).sum(), (cost, a, b))
    for name, value in zip(("C", "a", "b"), gradients, strict=True):
        assert_close(value, tensors[f"grad.fn.sinkhorn.{name}"], f"d{name}", gradient=True)
    log_a, log_b = log_marginal(a), log_marginal(b)
    steps = {"steps": config["n_mesh_iters"], **rounds}
    sharp, v = descend(noisy, log_a, log_b, lr=lr, **steps)
    plan, *_ = plan_of(sharp, log_a, log_b, v=v, **rounds)
    assert_close(sharp, wanted["mesh.C"], "cost")
    assert_close(v, wanted["mesh.v"], "v")
    assert_close(plan, wanted["mesh.T"], "plan")
    (gradient,) = torch.autograd.grad((plan * weight).sum(), cost, retain_graph=True)
    assert_close(gradient, tensors["grad.fn.mesh.C"], "dC", gradient=True)
    # Other options stand in the names: sinkhorn_t05_i3, mesh_noreuse_lr1_it2.
    met = []
    for name, value in wanted.items():
        if found := re.fullmatch(r"sinkhorn_t(\d+)_i(\d+)\.T", name):
            options = {"temperature": number(found[1]), "iterations": int(found[2])}
            assert_close(plan_of(cost, log_a, log_b, **options)[0], value, name)
            met.append("plan")
        elif found := re.fullmatch(r"mesh_noreuse_lr(\d+)_it(\d+)\.C", name):
            options = {"lr": number(found[1]), "steps": int(found[2]), "reuse": False, **rounds}
            fresh, none = descend(noisy, log_a, log_b, **options)
            assert none is None
            assert_close(fresh, value, name)
            met.append("cost of fresh starts")
    assert sorted(set(met)) == ["cost of fresh starts", "plan"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", slot_cases(*read("mesh")))
def test_official_numbers_of_the_module(golden, case, backend):
    compare_module(*golden("mesh"), case, backend)


@pytest.mark.parametrize(("descend", "plan_of"), FORMS)
def test_official_numbers_of_the_functions(golden, descend, plan_of):
    compare_functions(*golden("mesh"), descend, plan_of)


def test_another_golden_file(other_golden):
    file = other_golden("mesh")
    for backend in BACKENDS:
        for case in slot_cases(*file):
            compare_module(*file, case, backend)
    for forms in FORMS:
        compare_functions(*file, *forms)
    compare_entropy(*file)


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


def compare_entropy(tensors, metadata):
    config = metadata["config"]
    cost, a, b, noisy, lr = functional_input(tensors, config)
    rounds = {"iterations": config["n_sh_iters"]}
    plain, *_ = sinkhorn(cost, a.log(), b.log(), **rounds)
    sharp, v = mesh(noisy, a.log(), b.log(), lr=lr, steps=config["n_mesh_iters"], **rounds)
    low, *_ = sinkhorn(sharp, a.log(), b.log(), v=v, **rounds)
    found = [entropy(plan.detach()) for plan in (plain, low)]
    theirs = [entropy(tensors[f"out.fn.{name}.T"]) for name in ("sinkhorn", "mesh")]
    assert found == pytest.approx(theirs)
    assert found[0] > found[1]


def test_entropy_falls(golden):
    compare_entropy(*golden("mesh"))


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
