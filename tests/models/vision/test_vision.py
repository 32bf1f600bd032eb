"""The vision models: a ViT over every token mixer, a ResNet over every feature mechanism."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from timm_models import Gate, OnGrid, Shrink, Special, needs_own_tokens, registered
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from zoo import models
from zoo.errors import CompatibilityError, ZooError
from zoo.models.vision.hosts import resnet, vit
from zoo.registry import SOCKETS
from zoo.testing.subject import variants

TINY: dict[str, Any] = {"image_shape": (1, 8, 8), "num_classes": 10}
SMALL: dict[str, Any] = {**TINY, "patch": 2, "dim": 16, "depth": 2, "heads": 2}
RESNET: dict[str, Any] = {**TINY, "variant": "resnet10t", "width": 8}
MIXERS = zoo.list(kind=[*SOCKETS, "mixer"])
FEATURES = [None, "gc", "coord", *zoo.list(kind="feature")]


def a_vit(name: str, **options: Any) -> VisionTransformer:
    """A ViT over any mechanism, causal where nothing else is possible."""
    entry = zoo.info(name)
    pos = "none" if getattr(entry.cls, "embeds", False) else "learned"
    causal = not entry.traits.bidirectional
    spec = options.pop("attention", name)
    return vit(spec, **{**SMALL, "pos": pos, "causal": causal, **options})


def step(model: nn.Module, x: Tensor, labels: Tensor, steps: int = 4) -> list[float]:
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", MIXERS)
def test_every_token_mixer_trains(name: str) -> None:
    # With the options of the contracts: a window of 7 does not fit the 4 x 4 tokens.
    spec = variants(zoo.info(name))[0]
    if needs_own_tokens(spec):
        with pytest.raises(CompatibilityError, match=f"'{name}' needs a token of its own after"):
            a_vit(name, attention=spec)
        return
    model = a_vit(name, attention=spec)
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    losses = step(model, x, labels)
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(model).eval()
    model.eval()
    assert_close(twin(x), model(x), atol=0, rtol=0)
    assert_close(model(x[2:3]), model(x)[2:3], atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_mechanism_trains(name: str | None) -> None:
    model = resnet(name, **RESNET)
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    losses = step(model, x, labels, steps=8)
    assert losses[-1] < losses[0]
    model.eval()
    assert_close(model(x[2:3]), model(x)[2:3], atol=1e-5, rtol=1e-5)
    attended = [block.se for block in model.modules() if hasattr(block, "se")]
    assert [module is None for module in attended] == [name is None] * 4


def test_by_name_with_the_options_checked() -> None:
    assert isinstance(models.create("vit", attention="mqa", **SMALL), VisionTransformer)
    assert isinstance(models.create("resnet", attention="se", **RESNET), ResNet)
    with pytest.raises(ZooError, match=r"unknown option of model 'vit' 'head'.*'heads'"):
        models.create("vit", head=2, **TINY)
    with pytest.raises(ZooError, match="image_shape"):
        models.create("resnet", num_classes=10)


def test_vit_has_the_sizes_of_the_published_formula() -> None:
    model = vit("mha", image_shape=(3, 32, 32), num_classes=10, patch=4, dim=192, depth=12, heads=3)
    # The same ViT with a class token, which has one more position: 5,362,762 parameters.
    assert sum(p.numel() for p in model.parameters()) == 5_362_762 - 2 * 192
    assert model.pos_embed.shape == (1, 64, 192)
    assert (model.num_prefix_tokens, model.global_pool) == (0, "avg")
    assert model.blocks[0].mlp.fc1.out_features == 768


def test_vit_options_reach_their_place() -> None:
    model = vit(
        "mha",
        **{**SMALL, "image_shape": (3, 8, 12)},
        mlp_ratio=2.0,
        pool="token",
        class_token=True,
        registers=2,
        bias=False,
        qk_norm=True,
        dropout=0.1,
        attention_dropout=0.2,
        drop_path=0.3,
    )
    block = model.blocks[1]
    assert block.mlp.fc1.weight.shape == (32, 16)
    assert (block.mlp.fc1.bias, block.attn.mixer.project.qkv.bias) == (None, None)
    assert block.attn.mixer.combine.proj.bias is None
    assert isinstance(block.attn.mixer.q_norm, nn.LayerNorm)
    assert (model.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p) == (0.1, 0.1, 0.1)
    assert block.attn.mixer.dropout == 0.2
    assert block.drop_path1.drop_prob == pytest.approx(0.3)
    assert model.pos_embed.shape == (1, 3 + 4 * 6, 16)
    assert model(torch.randn(2, 3, 8, 12)).shape == (2, 10)


def test_layouts_and_depths_of_vit() -> None:
    model = vit("differential", **{**SMALL, "depth": 4}, layers={"first": "mha", "last": "mqa"})
    assert [b.attn.mixer.spec for b in model.blocks] == [
        *("mha", "differential", "differential", "mqa")
    ]
    starts = [b.attn.mixer.normalize.lambda_init for b in model.blocks[1:3]]
    assert starts[0] != starts[1]


def test_initialisation_is_that_of_timm_and_special_parts_keep_theirs() -> None:
    model = vit("mha", **{**SMALL, "dim": 64})
    for name in ("project.qkv", "combine.proj"):
        linear = model.blocks[0].attn.mixer.get_submodule(name)
        assert 0.018 < linear.weight.std() < 0.022
        assert (linear.bias == 0).all()
    with registered("test_special", "project", Special):
        model = vit("test_special", **SMALL)
        assert (model.blocks[1].attn.mixer.project.linear.weight == 0.25).all()
        model.init_weights()
        assert (model.blocks[1].attn.mixer.project.linear.weight == 0.25).all()
        model(torch.randn(2, 1, 8, 8))
        assert list(zoo.auxiliary_losses(model)) == ["test_size"]


def test_special_feature_modules_keep_their_initialisation_in_a_resnet() -> None:
    class Zero(Gate):
        special_init = True

        def reset_parameters(self) -> None:
            nn.init.constant_(self.conv.weight, 0.5)

    with registered("test_zero", "feature", Zero):
        model = resnet("test_zero(slope=2.0)", **RESNET)
        assert all((model.layer4[0].se.conv.weight == 0.5).flatten())
        assert model.layer4[0].se.slope == 2.0
        assert resnet(Zero, **RESNET).layer1[0].se.slope == 1.0
        assert model.layer4[0].conv2.weight.std() > 0


def test_attention_sees_the_grid_of_patches_behind_the_prefix() -> None:
    with registered("test_grid", "position", OnGrid):
        options = {**SMALL, "image_shape": (1, 4, 8), "class_token": True, "registers": 1}
        model = vit("mha+test_grid", **options)
        part = model.blocks[1].attn.mixer.position
        assert (part.grid, part.prefix) == ((2, 4), 2)
        assert model(torch.randn(2, 1, 4, 8)).shape == (2, 10)


@pytest.mark.parametrize("spec", ["rope", "rope(grid=None)", "sinusoidal", "learned"])
def test_positions_from_the_spec_alone_tell_the_patches_apart(spec: str) -> None:
    model = vit(spec, pos="none", **SMALL).eval()
    assert model.pos_embed is None
    blind = vit("mha", pos="none", **SMALL).eval()
    for m in (model, blind):
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 1, 8, 8)
    swapped = x.roll(2, -1)  # whole patches move
    assert (model(x) - model(swapped)).abs().max() > 1e-3
    assert_close(blind(x), blind(swapped), atol=1e-4, rtol=1e-4)


def test_a_part_that_embeds_is_added_once_below_all_layers() -> None:
    model = vit("mha+learned", pos="none", **SMALL, layers={"first": "mqa+learned"})
    assert [b.attn.mixer.spec for b in model.blocks] == ["mqa", "mha"]
    table = model.norm_pre.part
    x = torch.randn(2, 16, 16)
    positions = torch.arange(16)
    assert_close(model.norm_pre(x), table.embed(x, positions), atol=0, rtol=0)
    for spec in ("mha+learned", "mha+sinusoidal"):
        replaced = vit(spec, pos="learned", **SMALL)
        assert replaced.pos_embed is None
        assert type(replaced.norm_pre).__name__ == "EmbedPositions"
    assert vit("mha+rope", **SMALL).pos_embed is not None
    with pytest.raises(ZooError, match=r"layers disagree.+'learned' and 'sinusoidal'"):
        vit("mha+sinusoidal", pos="none", **SMALL, layers={"first": "mha+learned"})


def test_causal_patches_see_what_came_before() -> None:
    model = vit("mha", causal=True, **SMALL).eval()
    x = torch.randn(1, 1, 8, 8)
    other = x.clone()
    other[..., 6:, :] += 1.0  # the last row of patches
    moved = (model.forward_features(x) - model.forward_features(other)).abs().amax(-1)[0]
    assert (moved > 1e-5).tolist() == [False] * 12 + [True] * 4


def test_resnet_of_the_published_size() -> None:
    # timm's resnet18 with ten classes, whose stem is 7 x 7 instead of 3 x 3.
    sizes: dict[str, Any] = {**TINY, "image_shape": (3, 32, 32)}
    counts = {
        name: sum(p.numel() for p in resnet(name, **sizes).parameters())
        for name in (None, "se", "eca", "cbam")
    }
    plain = 11_181_642 - 64 * 3 * (49 - 9)
    assert counts == {
        None: plain,
        "se": plain + 11_271_754 - 11_181_642,
        "eca": plain + 11_181_678 - 11_181_642,
        "cbam": plain + 11_269_482 - 11_181_642,
    }


@pytest.mark.parametrize(("stem", "side"), [("small", 4), ("large", 1)])
def test_resnet_stems(stem: str, side: int) -> None:
    model = resnet(None, **{**RESNET, "image_shape": (2, 32, 32)}, stem=stem)
    assert model.forward_features(torch.randn(2, 2, 32, 32)).shape == (2, 64, side, side)
    fan_out = model.conv1.weight[:, 0].numel()
    assert 0.7 < model.conv1.weight.std() / (2 / fan_out) ** 0.5 < 1.3


@pytest.mark.parametrize("zero", [True, False])
def test_residual_branches_start_at_zero_or_not(zero: bool) -> None:
    model = resnet("se", **RESNET, zero_init_last=zero, dropout=0.2, drop_path=0.3)
    assert [(b.bn2.weight == (0 if zero else 1)).all().item() for b in model.layer4] == [True]
    assert (model.drop_rate, model.layer4[0].drop_path.drop_prob) == (0.2, 0.3)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("variant", ["resnet50", "resnext50_32x4d", "res2net50_26w_4s"])
def test_every_feature_mechanism_in_every_kind_of_resnet(variant: str, name: str | None) -> None:
    model = resnet(name, **{**RESNET, "variant": variant, "width": 16, "blocks": (1, 1, 1, 1)})
    labels = torch.arange(6)
    nn.functional.cross_entropy(model(torch.randn(6, 1, 8, 8)), labels).backward()
    modules = [block.se for block in model.modules() if hasattr(block, "se")]
    assert len(modules) == 4
    assert [module is None for module in modules] == [name is None] * 4
    assert model.layer4[0].conv3.out_channels == 16 * 8 * 4


def test_variants_keep_what_their_names_say() -> None:
    small = {**RESNET, "width": 16, "blocks": (1, 1, 1, 1)}
    for variant, scale in (("res2net50_14w_8s", 8), ("res2net50_48w_2s", 2), ("res2net50d", 4)):
        assert resnet("se", **{**small, "variant": variant}).layer1[0].scale == scale
    model = resnet(None, **{**small, "variant": "resnext50_32x4d"})
    assert (model.layer1[0].conv2.groups, model.layer4[0].conv2.out_channels) == (32, 8 * 32)
    with pytest.raises(ZooError, match=r"width=14 leaves a branch .+ from 16 on"):
        resnet(None, **{**small, "variant": "resnext50_32x4d", "width": 14})


def test_maps_smaller_than_the_module_can_take_are_refused_when_it_is_built() -> None:
    with registered("test_shrink", "feature", Shrink):
        larger = {**RESNET, "image_shape": (1, 32, 32)}
        assert resnet("test_shrink", **larger)(torch.randn(2, 1, 32, 32)).shape == (2, 10)
        message = r"layer3\.0\.se: maps of 2 x 2 with 32 channels do not suit Shrink .+\(1, 8, 8\)"
        with pytest.raises(ZooError, match=message):
            resnet("test_shrink", **RESNET)
    with pytest.raises(ZooError, match=r"layer1\.0\.se: Pool turns maps .+ keeps their shape"):
        resnet(Pool, **RESNET)


class Pool(nn.AvgPool2d):
    """A module that does not keep the shape of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(2)


BAD_VITS: dict[str, tuple[dict[str, Any], str]] = {
    "patch": ({"patch": 3}, "patch=3 must divide height 8 and width 8"),
    "patch type": ({"patch": 2.0}, "patch=2.0 must be a whole number"),
    "heads": ({"heads": 3}, "heads=3 must divide dim=16"),
    "no heads": ({"heads": 0}, "heads=0 must be a whole number of at least 1"),
    "depth": ({"depth": 0}, "depth=0"),
    "classes": ({"num_classes": -1}, "num_classes=-1"),
    "registers": ({"registers": -1}, "registers=-1 must be a whole number of at least 0"),
    "shape": ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\) must be \(channels"),
    "height": ({"image_shape": (1, 0, 8)}, "image_shape: height=0"),
    "mlp": ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 must be a number above 0"),
    "dropout": ({"dropout": 1.0}, r"dropout=1.0 must be a number in \[0, 1\)"),
    "positions": ({"pos": "learn"}, "unknown pos 'learn'; did you mean 'learned'"),
    "pool": ({"pool": "mean"}, "unknown pool 'mean'"),
    "token": ({"pool": "token"}, "pool='token' needs class_token=True"),
    "name": ({"attention": "mah"}, "unknown mechanism 'mah'"),
    "layers": ({"layers": {"frist": "mha"}}, "unknown key of layers 'frist'"),
    "feature": (
        {"attention": "test_gate"},
        r"'test_gate' is of kind 'feature'.+zoo\.timm\.feature",
    ),
}


@pytest.mark.parametrize("case", list(BAD_VITS))
def test_bad_input_of_vit(case: str) -> None:
    options, message = BAD_VITS[case]
    with registered("test_gate", "feature", Gate), pytest.raises(ZooError, match=message):
        vit(**{**SMALL, **options})


def test_causal_only_mechanisms_say_so() -> None:
    with pytest.raises(CompatibilityError, match="causal=False is not possible with 'gru'"):
        vit("gru", **SMALL)
    assert vit("gru", causal=True, **SMALL)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


BAD_RESNETS: dict[str, tuple[dict[str, Any], str]] = {
    "token mixer": ({"attention": "mha"}, r"'mha' is of kind 'project'.+zoo\.timm\.bind"),
    "unknown": ({"attention": "sse"}, "unknown feature mechanism 'sse'; did you mean"),
    "variant": ({"variant": "resnet12"}, "unknown variant of a ResNet 'resnet12'; did you mean"),
    "attentive variant": ({"variant": "seresnet18"}, "unknown variant of a ResNet"),
    "width": ({"width": 7}, r"width=7 must be an even number .*\(nearest: 6, 8\)"),
    "no blocks": ({"blocks": (1, 1, 1)}, r"blocks=\(1, 1, 1\) must be 4 whole numbers"),
    "empty stage": ({"blocks": (1, 1, 1, 0)}, r"blocks=\(1, 1, 1, 0\) must be 4 whole numbers"),
    "stem": ({"stem": "tiny"}, "unknown stem 'tiny'"),
    "shape": ({"image_shape": (1, 8)}, "image_shape"),
    "drop path": ({"drop_path": -0.1}, r"drop_path=-0.1 must be a number in \[0, 1\)"),
}


@pytest.mark.parametrize("case", list(BAD_RESNETS))
def test_bad_input_of_resnet(case: str) -> None:
    options, message = BAD_RESNETS[case]
    with pytest.raises(ZooError, match=message):
        resnet(**{**RESNET, **options})
