"""Triplet attention: golden values, the fused form against the paper's, ties, symmetries, input."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from residual_names import set_norms

import zoo
from zoo.errors import ZooError
from zoo.feature import _triplet_maps, _triplet_planes
from zoo.feature._triplet_planes import PlaneConv
from zoo.feature.triplet import TripletAttention
from zoo.host.spec import canonical
from zoo.models.vision.hosts import resnet
from zoo.ops import flops
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close
from zoo.timm import feature, init_special

CONTRACT_OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "no_spatial": True},
    {"kernel_size": 5, "branches": ["hc", "hw"]},
]
ROUTES = ("fused", "reference")
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=["bands", "steps"])
def planes(request, monkeypatch):
    """Both ways to convolve planes, whatever their size."""
    monkeypatch.setattr(_triplet_planes, "SHORT", {"bands": 100, "steps": 0}[request.param])


def build(route="fused", noise=0.3, **options):
    module = TripletAttention(**{"dtype": torch.float64, **options})
    with torch.no_grad():
        for p in module.parameters():
            p.add_(noise * torch.randn_like(p))
        for name in module.branches:
            norm = module.get_submodule(name).conv.bn
            norm.running_mean.fill_(0.2)
            norm.running_var.fill_(1.7)
    module.route = route
    return module


def settle(module, x, cotangent):
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * cotangent).sum().backward()
    return {"y": y, "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}


def golden_module(tensors, config, route, dtype=torch.float64, **options):
    options |= {"kernel_size": config["kernel_size"], "bn_momentum": config["bn_momentum"]}
    module = TripletAttention(config["C"], dtype=dtype, **options)
    prefix = "param.nospatial." if "no_spatial" in options else "param."
    state = {n: tensors[prefix + n] for n in module.state_dict() if "num_batches" not in n}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name for name in missing)
    set_norms(module, config)
    module.route = route
    return module


def compare(tensors, metadata, route, memory, dtype):
    config = metadata["config"]
    x, w = (tensors[f"in.{n}"].to(dtype).contiguous(memory_format=memory) for n in "xw")
    module = golden_module(tensors, config, route, dtype).eval()
    found = settle(module, x, w)
    assert_close(found.pop("y"), tensors["out.eval"], "eval")
    for name, grad in found.items():
        assert_close(grad, tensors[f"grad.eval.{name}"], name, gradient=True)
    found = settle(module.train(), x, w)
    assert_close(found["y"], tensors["out.train"], "train")
    assert_close(found["x"], tensors["grad.train.x"], "x in training", gradient=True)
    for name, value in module.named_buffers():
        if "num_batches" not in name:
            assert_close(value, tensors[f"out.running_after_train.{name}"], name)
    module = golden_module(tensors, config, route, dtype, no_spatial=True).eval()
    found = settle(module, x, w)
    assert_close(found["y"], tensors["out.nospatial.eval"], "no_spatial")
    assert_close(found["x"], tensors["grad.nospatial.eval.x"], "no_spatial: x", gradient=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("route", ROUTES)
def test_golden(golden, route, memory, dtype, planes):
    compare(*golden("triplet"), route, memory, dtype)


def test_another_golden_file(other_golden, planes):
    file = other_golden("triplet")
    for route in ROUTES:
        for memory in FORMATS:
            for dtype in (torch.float64, torch.float32):
                compare(*file, route, memory, dtype)


OPTIONS = [
    {},
    {"kernel_size": 1},
    {"kernel_size": 3, "no_spatial": True},
    {"kernel_size": 5, "branches": ["hw"]},
    {"kernel_size": 3, "branches": ("cw", "hw")},
]
SHAPES = [(3, 5, 7, 4), (2, 1, 1, 2), (2, 3, 40, 37), (2, 9, 1, 6), (1, 32, 8, 9)]


# In training BatchNorm takes the scale of a 1 x 1 kernel out again: its gradient is rounding alone.
CASES = [(o, t) for o in OPTIONS for t in (True, False) if not (t and o.get("kernel_size") == 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("options", "training"), CASES)
def test_fused_equals_reference(options, shape, training, monkeypatch, planes):
    monkeypatch.setattr(_triplet_maps, "LOT_BYTES", 1)  # a sample at a time
    monkeypatch.setattr(_triplet_maps, "SMALL", 0)
    module = build(**options).train(training)
    x, w = draw(*shape), draw(*shape, seed=1)
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    module.route = "reference"
    expected = settle(module, x, w)
    expected_buffers = {n: b.clone() for n, b in module.named_buffers()}
    for memory in FORMATS:
        module.load_state_dict(buffers, strict=False)
        module.route = "fused"
        found = settle(module, x.contiguous(memory_format=memory), w)
        for name, value in expected.items():
            assert_close(found[name], value, name, gradient=name != "y")
        for name, value in module.named_buffers():
            assert_close(value.double(), expected_buffers[name].double(), name)


@pytest.mark.parametrize("memory", FORMATS)
def test_ties_give_all_to_the_first(memory, monkeypatch):
    """Whole numbers tie everywhere; `amax` would split what the official code gives to one."""
    monkeypatch.setattr(_triplet_maps, "SMALL", 0)
    x = draw(4, 6, 40, 5).round().contiguous(memory_format=memory)
    module = build(kernel_size=3).train()
    found, module.route = settle(module, x, w := draw(*x.shape, seed=1)), "reference"
    expected = settle(module, x, w)
    assert_close(found["x"], expected["x"], "x", gradient=True)
    _, places = _triplet_maps._max_and_place(torch.zeros(1, 2, 3, 40), 3)
    assert not places.any()


@pytest.mark.parametrize("training", [True, False])
def test_the_formulas_for_compilers_and_other_devices(training, monkeypatch):
    monkeypatch.setattr(_triplet_maps, "_plain", lambda x: True)
    x, w = draw(3, 5, 7, 4).round(decimals=0), draw(3, 5, 7, 4, seed=1)
    module = build("reference", kernel_size=3).train(training)
    expected = settle(module, x, w)
    module.route = "fused"
    for name, value in settle(module, x, w).items():
        assert_close(value, expected[name], name, gradient=name != "y")


def test_without_gradients_nothing_is_located(monkeypatch):
    module, x = build(), draw(2, 3, 5, 4)
    expected = module.eval()(x)
    monkeypatch.setattr(_triplet_maps, "_max_and_place", None)
    assert torch.equal(module(x), expected)
    with torch.no_grad():
        assert torch.equal(module(x.requires_grad_()), expected)


def test_second_derivatives(planes):
    module = build(kernel_size=3).train()
    x = draw(2, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(module, (x,))

    def of_weight(weight):
        names = {"cw.conv.conv.weight": weight}
        return torch.func.functional_call(module, names, (x.detach(),))

    weight = module.cw.conv.conv.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(of_weight, (weight,))


def test_plane_convolution_alone(planes):
    conv = PlaneConv(5, dtype=torch.float64)
    z = draw(3, 2, 4, 7)
    expected = F.conv2d(z, conv.weight, padding=2)
    assert_close(conv(z), expected, "planes")
    turned = z.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(conv(turned), expected, "planes, other way round in memory")
    with torch.autocast("cpu"):
        assert_close(conv(z), expected, "planes under autocast")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own clones
def test_the_operator_is_well_formed(planes):
    z, weight = draw(2, 2, 4, 3).requires_grad_(), draw(1, 2, 3, 3).requires_grad_()
    torch.library.opcheck(torch.ops.zoo.triplet_planes.default, (z, weight))


def test_operations_are_those_of_the_convolutions():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    module = TripletAttention(kernel_size=3)
    products = 2 * 2 * 2 * 9 * (3 * 5 + 4 * 3 + 4 * 5)
    assert flops.count(lambda: module(x)) == products
    assert flops.count(lambda: module(x).sum().backward()) == 3 * products


def test_by_hand():
    """k = 1 on one sample of 1 x 2 x 2: every gate can be written down."""
    module = TripletAttention(1, kernel_size=1, branches=["cw", "hw"], dtype=torch.float64).eval()
    with torch.no_grad():
        module.cw.conv.conv.weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
        module.hw.conv.conv.weight.copy_(torch.tensor([0.5, 0.25]).view(1, 2, 1, 1))
        module.hw.conv.bn.weight.fill_(1.0)
        for branch in (module.cw, module.hw):
            branch.conv.bn.running_var.fill_(1 - 1e-5)
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    # Columns (1, 3) and (-2, 4): max + 2 mean is 3 + 4 and 4 + 2; alone, 0.75 of each element.
    gates = [[1 / (1 + math.exp(-v)) for v in (7.0, 6.0)]] * 2
    own = torch.sigmoid(0.75 * x)
    expected = x * (torch.tensor(gates, dtype=torch.float64) + own) / 2
    assert_close(module(x[None, None])[0, 0], expected, "by hand")


@pytest.mark.parametrize("route", ROUTES)
def test_gates_between_a_half_and_one(route):
    module = build(route).train()
    x = draw(2, 4, 6, 5)
    y = module(x)
    assert bool((y.abs() <= x.abs()).all())
    assert torch.equal(y.sign(), x.sign())
    for name in module.branches:
        norm = module.get_submodule(name).conv.bn
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
    y = module(x)
    assert_close(y, 0.5 * x, "half")
    assert route == "reference" or torch.equal(y, 0.5 * x)
    for name in module.branches:
        torch.nn.init.constant_(module.get_submodule(name).conv.bn.bias, 50.0)
    assert_close(module(x), x, "open")


def test_transposing_the_map_swaps_branches():
    first, second = build().eval(), build().eval()
    state = first.state_dict()
    pairs = {"cw": "hc", "hc": "cw", "hw": "hw"}
    swapped = {
        pairs[name[:2]] + name[2:]: v.transpose(2, 3) if v.ndim == 4 else v
        for name, v in state.items()
    }
    second.load_state_dict(swapped)
    x = draw(2, 4, 6, 5)
    assert_close(second(x.transpose(2, 3)), first(x).transpose(2, 3), "transposed")


def test_the_order_of_channels_matters():
    module, x = build().eval(), draw(2, 6, 5, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.allclose(module(x[:, order]), module(x)[:, order], atol=1e-3)


def test_samples_do_not_meet_outside_training():
    module, x = build().eval(), draw(4, 3, 5, 6)
    assert_close(module(x)[1:2], module(x[1:2]), "alone")
    assert not torch.allclose(module.train()(x)[1:2], module(x[1:2]))


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 300), ({"kernel_size": 3}, 60), ({"no_spatial": True}, 200), ({"branches": ["hc"]}, 100)],
)
def test_parameters(options, count):
    for channels in (None, 3, 64):
        module = TripletAttention(channels, **options)
        assert sum(p.numel() for p in module.parameters()) == count
        assert len(list(module.buffers())) == 3 * len(module.branches)
        assert all(b.numel() == 1 for b in module.buffers())


def test_the_running_statistics_move_slowly():
    module, x = TripletAttention(bn_momentum=0.25, dtype=torch.float64), draw(2, 3, 4, 5)
    assert TripletAttention().cw.conv.bn.momentum == 0.01
    z = torch.stack((x.amax(2), x.mean(2)), 1)
    u = F.conv2d(z, module.cw.conv.conv.weight, padding=3)
    module(x)
    assert_close(module.cw.conv.bn.running_mean, 0.25 * u.mean()[None], "mean")
    assert_close(module.cw.conv.bn.running_var, 0.75 + 0.25 * u.var()[None], "variance")


def test_start():
    """Official: kaiming_normal by fan_out (std sqrt(2 / k^2)), BatchNorm 1, but 0 for hw."""
    module = TripletAttention(kernel_size=31)
    for name in ("cw", "hc", "hw"):
        branch = module.get_submodule(name).conv
        assert float(branch.conv.weight.detach().std()) == pytest.approx(math.sqrt(2) / 31, rel=0.1)
        assert branch.bn.weight.item() == (name != "hw")
        assert branch.bn.bias.item() == 0.0
    only = TripletAttention(branches=["hw"])
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(only(x), 0.5 * x)


def test_a_resnet_does_not_undo_the_start():
    model = timm.create_model("resnet18", block_args={"attn_layer": feature("triplet")})
    torch.nn.init.ones_(model.layer1[0].se.hw.conv.bn.weight)
    init_special(model)
    assert model.layer1[0].se.hw.conv.bn.weight.item() == 0.0
    spec = "triplet(kernel_size=3,no_spatial=True)"
    model = resnet(spec, image_shape=(1, 8, 8), num_classes=3, variant="resnet10t", width=8)
    blocks = [m for m in model.modules() if isinstance(m, TripletAttention)]
    assert len(blocks) == 4
    assert all(b.branches == ("cw", "hc") and b.kernel_size == 3 for b in blocks)
    model.zero_grad()
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()


def test_branches_by_name():
    assert TripletAttention(no_spatial=True).branches == ("cw", "hc")
    assert TripletAttention(branches=["hw", "cw"]).branches == ("cw", "hw")
    both = TripletAttention(no_spatial=True, branches=("hc",))
    assert both.branches == ("hc",)
    spec = "triplet(branches=['cw', 'hc'],kernel_size=7)"
    assert canonical(spec) == "triplet(branches=['cw', 'hc'])"
    assert "branches=('hw',)" in repr(zoo.create("triplet(branches=['hw'])", 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", FORMATS)
def test_half_precision(memory, dtype):
    module = build(dtype=torch.float32).eval()
    x, w = (draw(2, 5, 9, 8, seed=i, dtype=dtype).to(memory_format=memory) for i in (0, 1))
    with torch.autocast("cpu"):
        found = settle(module, x, w)
    assert found["y"].dtype == found["x"].dtype == dtype
    module.double().route = "reference"
    expected = settle(module, x.double(), w.double())
    for name, value in expected.items():
        assert_close(found[name], value, name, gradient=name != "y", dtype=dtype)


def test_types_are_kept_under_autocast():
    module, x = build(dtype=torch.float32).train(), draw(2, 4, 5, 6, dtype=torch.float32)
    expected = module(x)
    with torch.autocast("cpu"):
        assert_close(module(x), expected, "autocast")
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size=4 must be an odd number .*\(nearest: 3, 5\)"),
        ({"kernel_size": 0}, "kernel_size=0 must be"),
        ({"kernel_size": True}, "kernel_size=True must be"),
        ({"kernel_size": 3.0}, "kernel_size=3.0 must be"),
        ({"channels": 0}, "channels=0 must be"),
        ({"no_spatial": "yes"}, "no_spatial='yes' must be True or False"),
        ({"bn_momentum": 1.5}, r"bn_momentum=1.5 must be a number in \[0, 1\]"),
        ({"branches": []}, r"branches=\[\] must be a list of some of cw, hc, hw"),
        ({"branches": "cw"}, "branches='cw' must be a list"),
        ({"branches": ["wh"]}, "unknown branch of 'triplet' 'wh'; did you mean 'hw'"),
        ({"branches": ["cw", "cw"]}, "branches=.* must be a list of different values"),
        ({"branches": ["cw", "hw"], "no_spatial": True}, "no_spatial=True leaves out .*'hw'"),
    ],
)
def test_options_that_are_not_possible(options, message):
    with pytest.raises(ZooError, match=message):
        TripletAttention(**options)


def test_input_that_is_not_possible():
    module = TripletAttention()
    with pytest.raises(ZooError, match=r"x of shape \(2, 3, 4\) must be \(batch, channels"):
        module(torch.zeros(2, 3, 4))
    with pytest.raises(ZooError, match=r"x has dtype torch.int64; allowed: floating point"):
        module(torch.zeros(2, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ZooError, match=r"x of shape \(2, 3, 0, 4\) has an empty axis"):
        module(torch.zeros(2, 3, 0, 4))
    module.route = "fusd"
    with pytest.raises(ZooError, match="unknown route of 'triplet' 'fusd'; did you mean 'fused'"):
        module(torch.zeros(2, 3, 4, 4))
    for route in ROUTES:
        module.route = route
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(torch.ones(1, 1, 1, 1))
