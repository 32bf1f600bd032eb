"""Residual attention networks: the published graph, counts, timm's methods, the recipes' model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_files import under
from residual_names import names_of_net, set_norms, widths_of_net
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import zoo
from zoo import models
from zoo.errors import CompatibilityError, ZooError
from zoo.feature._residual_units import Unit
from zoo.feature.residual import AttentionModule
from zoo.models.vision.residual_attention import (
    ResidualAttentionNet,
    TrunkModule,
    attention56,
    attention92,
    attention_cifar,
    fitting_depths,
    residual_attention,
)
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

TINY: dict[str, Any] = {"widths": (16, 16, 16, 24), "stem": "cifar", "num_classes": 3}
SMALL: dict[str, Any] = {"image_shape": (1, 8, 8), "num_classes": 10, "width": 8}


def golden_net(tensors: dict[str, Tensor], config: dict[str, Any]) -> ResidualAttentionNet:
    """Attention-56, whose graph the names say, with the channels of the file."""
    options: dict[str, Any] = {"pool": "ceil" if "ceil" in config["max_pool"] else "pad"}
    options["in_chans"] = tensors["param.conv1.weight"].shape[1]
    options["num_classes"] = len(tensors["param.classifier.weight"])
    net = ResidualAttentionNet((1, 1, 1), widths_of_net(tensors), **options).eval()
    names, state, used = names_of_net(), {}, set()
    for key, value in net.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if kind == "num_batches_tracked":
            state[key] = value
            continue
        theirs = f"param.{names[layer]}.{kind.removeprefix('running_')}"
        used.add(theirs)
        state[key] = tensors[theirs]
    assert used == {key for key in tensors if key.startswith("param.")}
    net.load_state_dict(state)
    set_norms(net, config)
    return net


def compare_graph(tensors: dict[str, Tensor], metadata: dict[str, Any], route: str | None) -> None:
    net = golden_net(tensors, metadata["config"]).double()  # as the golden values were computed
    seen: dict[str, Tensor] = {}
    for i, letter in enumerate("ABC"):
        module = net.stages[i][1]
        module.route = route
        assert isinstance(module, AttentionModule)
        assert module.depth == 3 - i

        def note(module: Any, args: Any, out: Tensor, name: str = f"Attention{letter}_1") -> None:
            seen[name] = out
            seen[f"{name}/mask"] = module.masks(args[0])

        module.register_forward_hook(note)
    net.stages[3].register_forward_hook(lambda *a: seen.update({"post_res_4_3": a[2]}))
    with torch.no_grad():
        seen["classifier"] = net(tensors["in.x"].double())
    expected = under(tensors, "out.")
    assert set(seen) == set(expected)
    for name, value in expected.items():
        assert_close(seen[name], value, name, dtype=torch.float32)


@pytest.mark.parametrize("route", [None, "reference"])
def test_golden_graph(golden, route):
    compare_graph(*golden("residual_attention_net"), route)


def test_another_golden_file(other_golden):
    file = other_golden("residual_attention_net")
    for route in (None, "reference"):
        compare_graph(*file, route)


def test_counts_of_the_published_networks():
    for make, parameters, depth in ((attention56, 31_810_728, 56), (attention92, 52_466_344, 92)):
        net = make(device="meta")
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert net.depth == weighted_layers(net) == depth


def weighted_layers(net: nn.Module) -> int:
    """Convolutions and linear maps on the trunk's path, projections left out."""
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum("mask_branch" not in n and "shortcut" not in n for n in layers)


@pytest.mark.parametrize(("m", "depth"), [(1, 56), (2, 92), (3, 128), (4, 164)])
def test_depth_of_the_cifar_networks(m, depth):
    net = attention_cifar(m, device="meta")
    assert net.depth == weighted_layers(net) == 36 * m + 20 == depth
    assert net.conv1.weight.shape == (32, 3, 3, 3)
    assert [stage[1].depth for stage in list(net.stages)[:3]] == [2, 1, 0]
    maps, _ = net.forward_intermediates(torch.empty(2, 3, 32, 32, device="meta"))[::-1]
    assert [tuple(x.shape[1:]) for x in maps] == [
        *((32, 32, 32), (128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4))
    ]


def test_images_of_224_pixels_have_the_sizes_of_the_paper():
    net = attention56(device="meta")
    _, maps = net.forward_intermediates(torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(x.shape[1:]) for x in maps] == [
        *((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
    ]
    for info, x in zip(net.feature_info, maps, strict=True):
        assert x.shape[1] == info["num_chs"]
        assert x.shape[2] == 224 // info["reduction"]
        net.get_submodule(info["module"])
    assert [fitting_depths(s) for s in (56, 32, 28, 8)] == [(3, 2, 1), *[(2, 1, 0)] * 3]


def test_the_trunk_alone_and_naive_modules():
    """With masks of zero the network is the plain one; the naive form then passes nothing on."""
    torch.manual_seed(0)
    plain = ResidualAttentionNet(**TINY, gate=nn.Identity, zero_init=False).eval()
    torch.manual_seed(0)
    net = ResidualAttentionNet(**TINY, zero_init=False).eval()
    state = net.state_dict()
    net.load_state_dict({**state, **plain.state_dict()})
    attended = [m for m in net.modules() if isinstance(m, AttentionModule)]
    for module in attended:
        nn.init.constant_(module.mask_branch.head.bn2.bias, 1e3)
        nn.init.constant_(module.mask_branch.head.conv2.weight, -1.0)
    x = draw(2, 3, 16, 16, dtype=torch.float32)
    assert torch.equal(net(x), plain(x))
    for module in attended:
        module.residual = False
    assert torch.equal(net(x)[0], net(2 * x)[1])
    assert not torch.equal(plain(x)[0], plain(2 * x)[0])


def test_masks_shrink_what_naive_modules_pass_on():
    """Units that are shortcuts: a module multiplies by 1 + M or by M, so 1.5 or 0.5 to the m."""
    x = draw(2, 3, 16, 16, dtype=torch.float32)
    for residual, factor in ((True, 1.5), (False, 0.5)):
        net = ResidualAttentionNet((3, 0, 0), **TINY, residual=residual).eval()
        for module in net.modules():
            if isinstance(module, AttentionModule):
                nn.init.zeros_(module.mask_branch.head.conv2.weight)
        first = net.stages[0][0](net._stem(x))
        assert_close(net.stages[0](net._stem(x)), factor**3 * first, "three modules")


def test_stochastic_depth_rises_along_the_trunk():
    net = ResidualAttentionNet((1, 2, 1), **TINY, drop_path_rate=0.5)
    rates = [getattr(u.drop_path, "drop_prob", 0.0) for u in net.trunk_units()]
    assert rates == pytest.approx(torch.linspace(0, 0.5, len(rates)).tolist())
    assert isinstance(net.stages[3][2].drop_path, DropPath)
    masks = [u for n, u in net.named_modules() if isinstance(u, Unit) and "mask_branch" in n]
    assert masks
    assert not any(isinstance(u.drop_path, DropPath) for u in masks)
    x = draw(4, 3, 8, 8, dtype=torch.float32)
    nn.init.normal_(net.stages[3][2].conv3.weight)
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_checkpointing_changes_neither_gradients_nor_statistics():
    torch.manual_seed(0)
    net = ResidualAttentionNet(**TINY, zero_init=False, drop_path_rate=0.3, dtype=torch.float64)
    twin = copy.deepcopy(net)
    twin.set_grad_checkpointing()
    x = draw(3, 3, 8, 8)
    kept = []
    for model in (net, twin):
        saved: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            y = model(x)
        kept.append(sum(saved))
        y.square().sum().backward()
    assert kept[1] < kept[0] / 4
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_close(q.grad, p.grad, name, gradient=True)
    for (name, p), q in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(p, q), name
    assert int(net.norm.num_batches_tracked) == int(
        twin.stages[0][1].pre[0].bn1.num_batches_tracked
    )
    twin.set_grad_checkpointing(False)
    assert not twin.grad_checkpointing


def test_the_methods_of_timm():
    net = ResidualAttentionNet(**TINY).eval()
    x = draw(2, 3, 8, 8, dtype=torch.float32)
    features = net.forward_features(x)
    assert features.shape == (2, 24, 1, 1)
    assert (features >= 0).all()
    assert torch.equal(net.forward_head(features), net(x))
    assert_close(net.forward_head(features, pre_logits=True), features.mean((2, 3)), "pre-logits")
    assert net.get_classifier() is net.fc
    assert net.get_classifier(name_only=True) == "fc"
    net.reset_classifier(7, "catavgmax")
    assert net(x).shape == (2, 7)
    assert (net.num_features, net.head_hidden_size) == (24, 48)
    net.reset_classifier(0, "")
    assert torch.equal(net(x), features)
    last, maps = net.forward_intermediates(x, indices=2, norm=True)
    assert torch.equal(maps[1], features)
    assert torch.equal(last, features)
    (first,) = net.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert_close(first, net.stages[0](net._stem(x)), "first stage")
    groups = param_groups_layer_decay(net, layer_decay=0.5)
    names = {id(p): n for n, p in net.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert set(scales) == {n for n, _ in net.named_parameters()}
    assert scales["conv1.weight"] < scales["stages.0.1.pre.0.conv1.weight"] < scales["norm.weight"]


@pytest.mark.parametrize(
    "attention",
    [
        *("residual", "residual(residual=False)", "residual(mask=channel)", None, "identity"),
        *("residual(depth=1, p=0, t=1)", "residual(pool=pad, extra_adds=True)", "se"),
    ],
)
@pytest.mark.parametrize("side", [8, 28])
def test_the_model_of_recipes_trains(attention, side):
    options = {**SMALL, "image_shape": (1, side, side), "drop_path": 0.1, "dropout": 0.1}
    net = residual_attention(attention, **options)
    x, labels = torch.randn(6, 1, side, side), torch.arange(6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(net(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    assert torch.allclose(net(x)[2:3], net(x[2:3]), atol=1e-5)
    kinds = {type(block) for stage in list(net.stages)[:3] for block in list(stage)[1:]}
    masked = attention is not None and attention.startswith("residual")
    assert kinds == {AttentionModule if masked else TrunkModule}


def test_arms_of_a_comparison_share_their_trunk():
    """Plain and attended networks differ by the masks alone, in parameters and in depth."""
    plain = residual_attention(None, **SMALL, modules=2)
    arms = [
        residual_attention(f"residual(residual={r})", **SMALL, modules=2) for r in (False, True)
    ]
    assert [weighted_layers(net) for net in (plain, *arms)] == [92] * 3
    for net in arms:
        trunk = {n: p.shape for n, p in net.named_parameters() if "mask_branch" not in n}
        assert trunk == {n: p.shape for n, p in plain.named_parameters()}
    assert residual_attention("residual", **SMALL, modules=[1, 0, 2]).depth == 9 * 4 + 20
    other = residual_attention("triplet" if "triplet" in zoo.list() else "cbam", **SMALL)
    assert other.stages[0][1].gate is not None


def test_by_name_and_from_a_specification_with_other_options():
    net = models.create("residual_attention", **SMALL, attention="residual(mask=spatial, r=0)")
    module = net.stages[0][1]
    assert (module.mask, len(module.mask_branch.bottom), module.depth) == ("spatial", 0, 2)
    one = residual_attention("residual(depth=auto)", **SMALL)
    assert [stage[1].depth for stage in list(one.stages)[:3]] == ["auto"] * 3
    large = residual_attention("residual", **{**SMALL, "image_shape": (3, 64, 64)}, stem="large")
    assert large.conv1.stride == (2, 2)
    assert large(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert residual_attention("residual", **SMALL, checkpointing=True).grad_checkpointing
    with pytest.raises(CompatibilityError, match="the model 'residual_attention' hosts: feature"):
        models.check_hosted("residual_attention", "mha")


@pytest.mark.slow
def test_it_compiles_and_runs_under_autocast():
    net = ResidualAttentionNet(**TINY).eval()
    x = draw(2, 3, 9, 11, dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), net(x), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).isfinite().all()


BAD_NETS = {
    "modules": ({"modules": (1, 1)}, r"modules=\(1, 1\) must be 3 whole numbers of at least 0"),
    "module": ({"modules": (1, -1, 1)}, "modules=.* must be 3 whole numbers"),
    "int": ({"modules": 2}, "modules=2 must be 3 whole numbers"),
    "widths": ({"widths": (8, 8, 8)}, "widths=.* must be 4 whole numbers of at least 4"),
    "multiple": ({"widths": (8, 8, 10, 8)}, "widths=.* must be multiples of 4"),
    "stem": ({"stem": "cifr"}, "unknown stem 'cifr'; did you mean 'cifar'"),
    "pool": ({"pool": "cel"}, "unknown pool 'cel'; did you mean 'ceil'"),
    "depths": ({"depths": (1, 1)}, r"depths=\(1, 1\) must be one for each of 3 stages"),
    "depth": ({"depths": (1, -1, 1)}, "depth=-1 must be"),
    "mask": ({"mask": "mixd"}, "unknown mask 'mixd'"),
    "classes": ({"num_classes": -1}, "num_classes=-1 must be a whole number of at least 0"),
    "channels": ({"in_chans": 0}, "in_chans=0 must be"),
    "drop": ({"drop_rate": 1.0}, r"drop_rate=1.0 must be a number in \[0, 1\)"),
    "drop path": ({"drop_path_rate": -0.1}, r"drop_path_rate=-0.1 must be a number in \[0, 1\)"),
    "global_pool": ({"global_pool": "mean"}, "unknown global_pool 'mean'"),
    "no pool": ({"global_pool": ""}, "global_pool='' leaves maps"),
    "gate and mask": ({"gate": nn.Identity, "mask": "channel"}, "mask belongs to masks"),
    "gate and depths": ({"gate": nn.Identity, "depths": (1, 1, 1)}, "depths belongs to masks"),
}


@pytest.mark.parametrize("case", BAD_NETS)
def test_bad_options_of_the_network_are_named(case):
    options, message = BAD_NETS[case]
    with pytest.raises(ZooError, match=message):
        ResidualAttentionNet(**{**TINY, **options})


BAD_MODELS = {
    "shape": ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\) must be \(channels, height, width"),
    "width": ({"width": 10}, r"width=10 must be a multiple of 4 .*\(nearest: 8, 12\)"),
    "classes": ({"num_classes": 0}, "num_classes=0 must be"),
    "modules": ({"modules": "2"}, "modules='2' must be 3 whole numbers"),
    "stem": ({"stem": "smal"}, "unknown stem 'smal'; did you mean 'small'"),
    "large": ({"stem": "large", "image_shape": (1, 7, 9)}, "stem='large' needs images of at least"),
    "attention": ({"attention": "residul"}, "unknown feature mechanism 'residul'.*'residual'"),
    "option": ({"attention": "residual(maks=mixed)"}, "unknown option of 'residual' 'maks'"),
    "kind": ({"attention": "mha"}, "'mha' is of kind 'project'"),
    "deep": ({"attention": "residual(extra_adds=True, depth=0)"}, "extra_adds=True .* depth=0"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_options_of_the_model_are_named(case):
    options, message = BAD_MODELS[case]
    with pytest.raises(ZooError, match=message):
        residual_attention(**{**SMALL, **options})


def test_bad_images_are_named():
    net = ResidualAttentionNet(**TINY)
    with pytest.raises(ZooError, match=r"\(2, 1, 8, 8\) must be \(batch, in_chans=3"):
        net(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ZooError, match="3 x 9 is too small for depth=2"):
        net(torch.zeros(2, 3, 3, 9))
    with pytest.raises(ZooError, match="unknown output_fmt 'NHWC'"):
        net.forward_intermediates(torch.zeros(2, 3, 8, 8), output_fmt="NHWC")
