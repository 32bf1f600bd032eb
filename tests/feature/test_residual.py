"""Residual attention: golden modules, the fast form against the equations, its identities."""

from __future__ import annotations

import pytest
import timm
import torch
from golden_files import read, under
from residual_names import golden_cases, kind_of, names_of_module, set_norms
from torch import nn

import zoo
from zoo import models
from zoo.errors import ZooError
from zoo.feature._residual_units import Unit, sigmoid_gate
from zoo.feature.residual import AttentionModule
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [
    {},
    {"depth": 2, "mask": "spatial", "pool": "pad", "extra_adds": True, "t": 1},
    {"depth": 0, "mask": "channel", "residual": False, "r": 0},
]
ROUTES = ("fused", "reference")


def a_module(depth="auto", channels=8, seed=0, **options) -> AttentionModule:
    """A module in float64 with noise on all parameters and running statistics."""
    torch.manual_seed(seed)
    options.setdefault("dtype", torch.float64)
    module = AttentionModule(channels, depth, **options)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.add_(0.2 * torch.randn_like(value))
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return module


def golden_module(tensors, config, case):
    depth, extra_adds = kind_of(config, case)
    names = names_of_module(depth)
    pool = "ceil" if "ceil" in config["max_pool"] else "pad"
    module = AttentionModule(config["channels"], depth, pool=pool, extra_adds=extra_adds)
    state = {k: v for k, v in module.state_dict().items() if "num_batches" in k}
    for key, value in under(tensors, f"param.{case}.").items():
        (place,) = [p for p in names if key.startswith(f"{p}.")]
        state[names[place] + key.removeprefix(place)] = value
    module.load_state_dict(state)
    set_norms(module, config)
    return module


def compare_module(tensors, metadata, case, route):
    module = golden_module(tensors, metadata["config"], case)
    module.route = route
    x = tensors[f"in.{case}.x"].clone().requires_grad_()
    y = module.eval()(x)
    assert_close(y, tensors[f"out.{case}.eval"], "output in evaluation")
    (y * tensors[f"in.{case}.w"]).sum().backward()
    assert_close(x.grad, tensors[f"grad.{case}.eval.x"], "gradient", gradient=True)
    if f"out.{case}.train" in tensors:
        assert_close(module.train()(x), tensors[f"out.{case}.train"], "output in training")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", golden_cases(*read("residual_attention")))
def test_golden_modules(golden, case, route):
    compare_module(*golden("residual_attention"), case, route)


def test_another_golden_file(other_golden):
    file = other_golden("residual_attention")
    for case in golden_cases(*file):
        for route in ROUTES:
            compare_module(*file, case, route)


OPTIONS = [
    {},
    {"depth": 0, "p": 0, "t": 1, "r": 0},
    {"depth": 1, "mask": "channel", "pool": "pad"},
    {"depth": 1, "mask": "channel", "residual": False},
    {"depth": 2, "mask": "spatial", "residual": False, "extra_adds": True},
    {"depth": 2, "p": 2, "t": 1, "r": 2, "pool": "pad", "extra_adds": True},
    {"depth": 3, "residual": False},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fast_equals_reference_in_all_gradients(options, training):
    for size in ((8, 8), (13, 9)):
        found = []
        for route in ROUTES:
            module = a_module(**options).train(training)
            module.route = route
            x = draw(4, 8, *size)  # of two values a BatchNorm keeps nothing but the sign
            found.append({**settle(module, x), **dict(module.named_buffers())})
            assert found[-1]["output"].shape == x.shape
        fast, slow = found
        assert set(fast) == set(slow)
        assert {name for name, _ in module.named_parameters()} < set(slow)
        for name, value in slow.items():
            if value.is_floating_point():
                assert_close(fast[name], value, name, gradient=name != "output")


@pytest.mark.parametrize("residual", [True, False])
def test_the_gate_has_first_and_second_derivatives(residual):
    m, t = (draw(2, 3, 2, 2, seed=i).requires_grad_() for i in range(2))
    gate = m.sigmoid()
    assert_close(sigmoid_gate(m, t, residual), (residual + gate) * t, "output")
    torch.autograd.gradcheck(lambda m, t: sigmoid_gate(m, t, residual), (m, t))
    torch.autograd.gradgradcheck(lambda m, t: sigmoid_gate(m, t, residual), (m, t))
    whole = torch.func.vmap(lambda m, t: sigmoid_gate(m, t, residual))(m, t)
    assert_close(whole, (residual + gate) * t, "vmap")


def test_the_gate_keeps_its_two_inputs_and_nothing_else():
    m, t = (draw(2, 3, 4, 4, seed=i).requires_grad_() for i in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        sigmoid_gate(m, t, True)
    assert {x.data_ptr() for x in kept} == {m.data_ptr(), t.data_ptr()}


@pytest.mark.parametrize("size", [(13, 7), (7, 7), (2, 9), (6, 6)])
@pytest.mark.parametrize("pool", ["ceil", "pad"])
def test_any_size_is_kept(size, pool):
    depth = 2 if min(size) >= 4 else 1
    module = a_module(depth, pool=pool).eval()
    assert module(draw(1, 8, *size)).shape == (1, 8, *size)


@pytest.mark.parametrize(("residual", "factor"), [(True, 1.5), (False, 0.5)])
@pytest.mark.parametrize("route", ROUTES)
def test_a_head_of_zeros_is_a_mask_of_a_half(residual, factor, route):
    module = a_module(2, residual=residual, p=1).eval()
    module.route = route
    nn.init.zeros_(module.mask_branch.head.conv2.weight)
    x = draw(2, 8, 8, 8)
    trunk = module.trunk(module.pre(x))
    assert_close(module(x), module.post(factor * trunk), "output")
    assert torch.equal(module.masks(x), torch.full_like(x, 0.5))


@pytest.mark.parametrize("mask", ["mixed", "channel"])
def test_without_a_mask_it_is_its_trunk_exactly(mask):
    module = a_module(2, mask=mask).eval()
    head = module.mask_branch.head
    with torch.no_grad():
        # Scores far below zero; for the channel mask, which has no such end, scores of zero.
        head.bn2.weight.zero_()
        head.bn2.bias.fill_(1e3 if mask == "mixed" else -1.0)
        head.conv2.weight.fill_(-1.0)
    x = draw(2, 8, 8, 8).to(memory_format=torch.channels_last)  # as inside: equal to the last bit
    assert torch.equal(module(x), module.post(module.trunk(module.pre(x))))
    assert torch.equal(module.masks(x), torch.zeros_like(x))
    module.residual = False
    assert torch.equal(module(x), module.post(torch.zeros_like(x)))


@pytest.mark.parametrize("mask", ["mixed", "channel", "spatial"])
def test_the_mask_is_what_its_name_says(mask):
    module = a_module(2, mask=mask)
    found = module.masks(draw(2, 8, 9, 11)).detach()
    assert found.shape == (2, 8, 9, 11)
    if mask == "channel":
        norm = found.square().sum(1)
        assert_close(norm, torch.ones_like(norm), "squared norm")
        assert (found < 0).any()
        return
    assert 0 < found.min() < found.max() < 1
    if mask == "spatial":
        scores = found.logit()
        assert_close(scores.mean((2, 3)), torch.zeros(2, 8, dtype=torch.float64), "mean")
        # Up to the 1e-5 that keeps a constant channel finite.
        spread = scores.var((2, 3), correction=0)
        assert 0.9 < float(spread.min()) < float(spread.max()) < 1


def test_the_mask_alone_filters_gradients_of_the_trunk():
    """d(M T) = M dT: where the mask is zero nothing reaches the trunk of the naive form."""
    m, t = draw(1, 2, 3, 3), draw(1, 2, 3, 3, seed=1).requires_grad_()
    m[:, 0] = -1e4
    sigmoid_gate(m, t, False).sum().backward()
    assert not t.grad[:, 0].any()
    assert_close(t.grad[:, 1], m[:, 1].sigmoid(), "gradient of the trunk")


def test_a_mask_by_hand():
    """One channel group, no units in the mask: pooling, interpolation, head, gate."""
    module = AttentionModule(4, 1, p=0, t=1, r=0).double().eval()
    with torch.no_grad():
        module.trunk[0].conv3.weight.zero_()  # the trunk is the identity
        for conv in (module.mask_branch.head.conv1, module.mask_branch.head.conv2):
            conv.weight.copy_(torch.eye(4)[:, :, None, None])
        for bn in (module.mask_branch.head.bn1, module.mask_branch.head.bn2):
            bn.running_var.fill_(1 - bn.eps)
    x = torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 1, 2, 2).expand(1, 4, 2, 2)
    # Pooled to its maximum of 4, spread over the map again; both ReLUs leave it.
    gate = 1 / (1 + torch.exp(torch.tensor(-4.0, dtype=torch.float64)))
    assert_close(module(x), (1 + gate) * x, "output")
    module.residual = False
    assert_close(module(x), gate * x, "naive output")


def test_parameters_have_no_unused_projection():
    for depth, units in ((0, 6), (1, 6), ("auto", 6), (2, 9), (3, 12)):
        count = sum(p.numel() for p in AttentionModule(256, depth, device="meta").parameters())
        unit = 256 * 64 * 2 + 9 * 64 * 64 + 2 * (256 + 64 + 64)
        assert count == units * unit + 2 * 256 * 256 + 4 * 256
    assert not [n for n, _ in a_module(3).named_parameters() if "shortcut" in n]


def test_auto_pools_once_where_there_is_room():
    auto, one, none = a_module("auto"), a_module(1), a_module(0)
    for module in (one, none):
        module.load_state_dict(auto.state_dict())
    for size in ((2, 2), (5, 4)):
        x = draw(3, 8, *size)
        assert_close(auto(x), one(x), f"map {size}")
        assert not torch.allclose(auto(x), none(x))
    for size in ((1, 1), (1, 6)):
        x = draw(3, 8, *size)
        assert_close(auto(x), none(x), f"map {size}")


def test_in_a_resnet_down_to_maps_of_one_pixel():
    model = timm.create_model(
        "resnet10t", num_classes=2, block_args={"attn_layer": zoo.timm.feature("residual")}
    )
    x = torch.randn(2, 3, 37, 45)  # maps of 10 x 12, 5 x 6, 3 x 3, 2 x 2
    assert model(x).shape == (2, 2)
    model(torch.randn(2, 3, 20, 20)).sum().backward()  # the last map is 1 x 1
    assert all(p.grad is not None for p in model.parameters())


def test_units_start_as_their_shortcuts_in_any_host():
    x = draw(2, 8, 6, 6, dtype=torch.float32)
    module = AttentionModule(8)
    assert_close(module(x), (1 + module.masks(x)) * x, "output")
    assert not torch.allclose(AttentionModule(8, zero_init=False)(x), module(x))
    hosted = models.create("resnet", attention="residual", image_shape=(1, 8, 8), num_classes=2)
    found = [m for m in hosted.modules() if isinstance(m, Unit)]
    assert found
    assert not any(m.conv3.weight.any() for m in found)
    assert all(m.conv1.weight.any() for m in found)


def test_the_layout_of_the_host_is_kept():
    module = a_module(1, dtype=torch.float32)
    x = draw(2, 8, 6, 7, dtype=torch.float32)
    assert module(x).is_contiguous()
    last = module(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


BAD = {
    "channels": ({"channels": 6}, r"channels=6 must be a multiple of 4 .*\(nearest: 4, 8\)"),
    "no channels": ({"channels": 0}, "channels=0 must be"),
    "depth": ({"depth": -1}, "depth=-1 must be a whole number of at least 0, or 'auto'"),
    "depth name": ({"depth": "deep"}, "depth='deep' must be"),
    "p": ({"p": -1}, "p=-1 must be a whole number of at least 0"),
    "t": ({"t": 0}, "t=0 must be a whole number of at least 1"),
    "r": ({"r": 1.5}, "r=1.5 must be a whole number of at least 0"),
    "mask": ({"mask": "chanel"}, "unknown mask 'chanel'; did you mean 'channel'"),
    "pool": ({"pool": "floor"}, "unknown pool 'floor'.*ceil"),
    "residual": ({"residual": 1}, "residual=1 must be True or False"),
    "extra_adds": ({"extra_adds": None}, "extra_adds=None must be True or False"),
    "zero_init": ({"zero_init": 0}, "zero_init=0 must be True or False"),
    "nothing to add to": ({"extra_adds": True, "depth": 0}, "extra_adds=True .* depth=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case):
    options, message = BAD[case]
    with pytest.raises(ZooError, match=message):
        AttentionModule(**{"channels": 8, **options})


def test_bad_maps_are_named():
    module = a_module(3)
    with pytest.raises(ZooError, match=r"7 x 9 is too small for depth=3.*at least 8"):
        module(draw(1, 8, 7, 9))
    with pytest.raises(ZooError, match=r"9 x 7 is too small"):
        module.masks(draw(1, 8, 9, 7))
    with pytest.raises(ZooError, match=r"\(1, 4, 8, 8\) must be \(batch, channels=8"):
        module(draw(1, 4, 8, 8))
    with pytest.raises(ZooError, match=r"\(8, 8, 8\) must be"):
        module(draw(8, 8, 8))
    with pytest.raises(ZooError, match=r"x has dtype torch.int64"):
        module(torch.zeros(1, 8, 8, 8, dtype=torch.int64))
    with pytest.raises(ZooError, match=r"has an empty axis"):
        module(draw(1, 8, 0, 8))
    module.route = "fusd"
    with pytest.raises(ZooError, match="unknown route of 'residual' 'fusd'; did you mean 'fused'"):
        module(draw(1, 8, 8, 8))
