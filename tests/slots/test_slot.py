"""Slot attention: official numbers, its equations, what makes it slot attention, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import read
from slot_numbers import DISTANCES, run, sizes, slot_cases, state

import zoo
from zoo.errors import ZooError
from zoo.slots import SlotVideo
from zoo.slots._sinkhorn import log_marginal, sinkhorn, sinkhorn_reference
from zoo.slots.slot import SlotAttention, slot_attention_reference
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [
    {"hidden": 6},
    {"hidden": 6, "iterations": 1, "normalizer": "sinkhorn"},
    {"hidden": 5, "iterations": 1, "distance": "l2", "temperature": 0.5, "init": "learned"},
    {"hidden": 5, "iterations": 1, "normalizer": "sinkhorn", "distance": "cosine"},
]
SMALL = {"dim_in": 6, "dim": 8, "slots": 4, "hidden": 10, "dtype": torch.float64}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return SlotAttention(**{**SMALL, **options})


def golden_module(tensors, config, case):
    """The official softmax knows no temperature and no scales."""
    options = {"distance": DISTANCES[config[f"{case}_distance"]]}
    if case == "sink":
        options |= {name: config[name] for name in ("temperature", "scale_cost", "scale_marginals")}
        options |= {"normalizer": "sinkhorn", "sinkhorn_iterations": config["n_sh_iters"]}
    module = SlotAttention(**sizes(tensors, config), **options)
    module.load_state_dict(state(tensors, case))
    return module


def compare_module(tensors, metadata, case):
    config = metadata["config"]
    found = run((tensors, metadata), golden_module(tensors, config, case))
    assert_close(found["out"], tensors[f"out.{case}.slots"], "slots")
    gradients = state(tensors, case, "grad")
    for name, value in gradients.items():
        # A shift of all queries leaves a softmax of products as it is: what there is, is rounding.
        if (case, name) == ("orig", "norm_slots.bias"):
            least = 1e-14 * float(gradients["norm_slots.weight"].abs().max())
            assert float(value.abs().max()) < least
            assert float(found[name].abs().max()) < least
        else:
            assert_close(found[name], value, f"gradient of {name}", gradient=True)


@pytest.mark.parametrize("case", slot_cases(*read("slot")))
def test_official_numbers(golden, case):
    compare_module(*golden("slot"), case)


def test_another_golden_file(other_golden):
    file = other_golden("slot")
    for case in slot_cases(*file):
        compare_module(*file, case)


def test_a_round_is_the_reference():
    module = build(iterations=1)
    x, s = draw(2, 7, 6), draw(2, 4, 8, seed=1)
    for mask in (None, torch.arange(7) < torch.tensor([[7], [3]])):
        normed = module.norm_inputs(x)
        k, q = module.project_k(normed), module.project_q(module.norm_slots(s))
        update, weights = slot_attention_reference(k, q, module.project_v(normed), mask)
        after = module.gru(update.flatten(0, 1), s.flatten(0, 1)).unflatten(0, (2, 4))
        after = after + module.mlp(module.norm_mlp(after))
        y, found = module(x, s, mask=mask, return_weights=True)
        assert_close(found, weights, "weights")
        assert_close(y, after, "slots")


def test_weights_compete_over_slots_and_average_over_inputs():
    _, weights = build()(draw(2, 7, 6), return_weights=True)
    assert_close(weights.sum(1), torch.ones(2, 4, dtype=torch.float64), "sum over inputs")
    assert float((weights.detach().sum(2) - 4 / 7).abs().max()) > 1e-3


def test_one_slot_takes_the_plain_mean():
    module = build(slots=1, iterations=1)
    x, s = draw(2, 5, 6), draw(2, 1, 8, seed=1)
    y, weights = module(x, s, return_weights=True)
    assert_close(weights, torch.full((2, 5, 1), 0.2, dtype=torch.float64), "weights")
    mean = module.project_v(module.norm_inputs(x)).mean(1)
    after = module.gru(mean, s[:, 0])
    assert_close(y[:, 0], after + module.mlp(module.norm_mlp(after)), "slot")


def test_the_softmax_is_one_round_of_sinkhorn_with_unit_masses():
    k, q, v = draw(2, 7, 8), draw(2, 4, 8, seed=1), draw(2, 7, 8, seed=2)
    _, weights = slot_attention_reference(k, q, v, eps=1e-8)
    zeros = torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    plan, *_ = sinkhorn(-k @ q.mT / math.sqrt(8), *zeros, iterations=1)
    assert float((plan - weights).abs().max()) < 1e-7


@pytest.mark.parametrize("n", [1, 5, 9])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_reverse_sweep_of_sinkhorn_is_the_gradient(n, temperature):
    inputs = [draw(2, n, 3), draw(2, n, seed=1), draw(2, 3, seed=2), draw(2, 3, seed=3)]
    results = []
    for function in (sinkhorn_reference, sinkhorn):
        c, a, b, v = (t.clone().requires_grad_() for t in inputs)
        plan, u, w = function(
            c, log_marginal(a.exp()), b, iterations=4, temperature=temperature, v=v
        )
        loss = (plan * draw(*plan.shape, seed=4)).sum() + (u * u).sum() + (w * inputs[2]).sum()
        results.append([plan, u, w, *torch.autograd.grad(loss, (c, a, b, v))])
    for i, (found, expected) in enumerate(zip(results[1], results[0], strict=True)):
        assert_close(found, expected, f"result {i}", gradient=i > 2)


def test_columns_of_a_plan_sum_to_their_mass_and_rows_approach_theirs():
    cost, a, b = 4 * draw(2, 9, 4), draw(2, 9, seed=1).softmax(1), draw(2, 4, seed=2).softmax(1)
    errors = []
    for rounds in (1, 5, 200):
        plan, *_ = sinkhorn(cost, a.log(), b.log(), iterations=rounds)
        assert float((plan.sum(1) - b).abs().max()) < 1e-12
        errors.append(float((plan.sum(2) - a).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("normalizer", ["softmax", "sinkhorn"])
def test_slots_that_start_equal_stay_equal(normalizer):
    module = build(normalizer=normalizer, init="identical")
    y = module(draw(3, 7, 6)).detach()
    assert float((y - y[:, :1]).abs().max()) < 1e-12


@pytest.mark.parametrize("normalizer", ["softmax", "sinkhorn"])
def test_a_sample_without_inputs_takes_nothing(normalizer):
    module = build(normalizer=normalizer)
    x = draw(2, 5, 6).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    y, weights = module(x, draw(2, 4, 8, seed=1), mask=mask, return_weights=True)
    assert bool(y.isfinite().all())
    assert float(weights[1].detach().abs().max()) == 0
    y.sum().backward()
    assert float(x.grad[1].abs().max()) == 0
    assert bool(x.grad.isfinite().all())


def test_rounds_and_slots_may_change_between_passes():
    module = build()
    x, s = draw(2, 7, 6), draw(2, 3, 8, seed=1)
    assert module(x, s).shape == (2, 3, 8)
    module.iterations = 1
    once = module(x, s)
    again = module(x, once)
    module.iterations = 2
    assert_close(module(x, s), again, "two rounds")


def test_detached_slots_cut_the_gradient_between_rounds():
    x, s = draw(2, 7, 6), draw(2, 4, 8, seed=1).requires_grad_()
    whole, cut = build(), build(detach_slots=True)
    assert_close(cut(x, s), whole(x, s), "slots")
    cut(x, s).sum().backward()
    assert s.grad is None


@pytest.mark.parametrize("init", ["learned_random", "fixed_random", "learned", "identical"])
def test_how_slots_begin(init):
    module = build(init=init)
    x = draw(3, 5, 6)
    start = module.start(3, x, torch.Generator().manual_seed(0))
    assert start.shape == (3, 4, 8)
    trained = {n for n, _ in module.named_parameters() if n.startswith("slots_")}
    assert (
        trained
        == {
            "learned_random": {"slots_mu", "slots_log_sigma"},
            "fixed_random": set(),
            "learned": {"slots_start"},
            "identical": {"slots_start"},
        }[init]
    )
    alike = [bool((start == start[:, :1]).all()), bool((start == start[:1]).all())]
    assert alike == [init == "identical", init in ("learned", "identical")]
    if init == "fixed_random":
        assert "slots_mu" in module.state_dict()
    bound = math.sqrt(3 / 8)
    values = module.slots_mu if "random" in init else module.slots_start
    assert float(values.detach().abs().max()) <= bound


def test_random_slots_have_the_learned_mean_and_deviation():
    module = build(slots=5000)
    with torch.no_grad():
        module.slots_mu.fill_(2.0)
        module.slots_log_sigma.fill_(math.log(3.0))
    start = module.start(2, draw(1), torch.Generator().manual_seed(0)).detach()
    assert float(start.mean()) == pytest.approx(2, abs=0.05)
    assert float(start.std()) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("noise", ["none", "fixed", "learned"])
def test_slots_are_carried_over_frames(noise):
    module = build()
    video = SlotVideo(module, noise=noise, dtype=torch.float64)
    x, s = draw(2, 3, 7, 6), draw(2, 4, 8, seed=1)
    mask = torch.arange(7) < torch.tensor([7, 5, 6])[:, None]
    mask = mask.expand(2, 3, 7)
    y, weights = video(x, s, mask=mask, return_weights=True)
    assert y.shape == (2, 3, 4, 8)
    assert weights.shape == (2, 3, 7, 4)
    assert_close(y[:, 0], module(x[:, 0], s, mask=mask[:, 0]), "first frame")
    second = module(x[:, 1], y[:, 0], mask=mask[:, 1])
    gap = float((y[:, 1] - second).detach().abs().max())
    assert gap < 1e-12 if noise == "none" else gap > 1e-3
    losses = zoo.auxiliary_losses(video)
    assert set(losses) == ({"slot_noise"} if noise == "learned" else set())
    if noise == "learned":
        losses["slot_noise"].backward()
        assert float(video.spread.weight.grad.abs().max()) > 0


def test_the_divergence_of_learned_noise_by_hand():
    video = SlotVideo(build(), noise="learned", sigma=0.5, kl_weight=1.0, dtype=torch.float64)
    with torch.no_grad():
        video.spread.weight.zero_()
        video.spread.bias.copy_(torch.tensor([0.3] * 8 + [math.log(0.04)] * 8))
    video(draw(1, 2, 5, 6))
    expected = math.log(0.5 / 0.2) + (0.04 + 0.09) / (2 * 0.25) - 0.5
    assert video.aux_losses["slot_noise"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim_in": 0}, "dim_in=0 must be a whole number of at least 1"),
        ({"slots": 0}, "slots=0 must be"),
        ({"iterations": 0}, "iterations=0 must be"),
        (
            {"normalizer": "sinkhorn", "sinkhorn_iterations": 1.5},
            "sinkhorn_iterations=1.5 must be",
        ),
        (
            {"sinkhorn_iterations": 3},
            "sinkhorn_iterations=3 does nothing with normalizer='softmax'",
        ),
        ({"scale_marginals": 2.0}, "scale_marginals=2.0 does nothing with normalizer='softmax'"),
        ({"normalizer": "sinkhorn", "eps": 1e-6}, "does nothing with normalizer='sinkhorn'"),
        ({"normalizer": "sinkhorm"}, "did you mean 'sinkhorn'"),
        ({"distance": "l1"}, "unknown distance 'l1'"),
        ({"init": "random"}, "unknown init 'random'"),
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
        ({"normalizer": "sinkhorn", "scale_marginals": -1.0}, "scale_marginals=-1.0 must be"),
        ({"eps": 0.0}, "eps=0.0 must be"),
        ({"detach_slots": "no"}, "detach_slots='no' must be True or False"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_inputs_that_do_not_fit_are_named():
    module = build()
    with pytest.raises(ZooError, match=r"x of shape \(2, 5, 7\) must be .*dim_in=6"):
        module(draw(2, 5, 7))
    with pytest.raises(ZooError, match=r"slots of shape \(1, 4, 8\) must be \(batch=2"):
        module(draw(2, 5, 6), draw(1, 4, 8))
    with pytest.raises(ZooError, match=r"mask of shape .* must be boolean"):
        module(draw(2, 5, 6), mask=torch.ones(2, 5))
    with pytest.raises(ZooError, match="unknown noise 'some'"):
        SlotVideo(module, noise="some")
    with pytest.raises(ZooError, match="sigma=0 must be"):
        SlotVideo(module, sigma=0)
    with pytest.raises(ZooError, match=r"must be \(batch, frames >= 1"):
        SlotVideo(module)(draw(2, 5, 6))
    with pytest.raises(ZooError, match="mask of shape"):
        SlotVideo(module)(draw(2, 3, 5, 6), mask=torch.ones(2, 5).bool())
