"""Replacing attention in timm models that exist already: zoo.timm.swap."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm_models import (
    Deep,
    OnGrid,
    a_swin,
    a_vit,
    images,
    registered,
    rough,
)
from torch import nn
from torch.testing import assert_close

from zoo.errors import CompatibilityError, ZooError
from zoo.registry import Traits
from zoo.timm import TokenAttention, WindowAttention, swap


def test_grid_and_prefix_are_told_by_swap() -> None:
    with registered("test_grid", "position", OnGrid):
        model = a_vit(img_size=(16, 24), reg_tokens=2)
        swap(model, "mha+test_grid")
        part = model.blocks[0].attn.mixer.position
        assert (part.grid, part.prefix) == ((4, 6), 3)
        assert model(torch.randn(1, 3, 16, 24)).shape == (1, 5)
        swap(model, "mha+test_grid(grid=None)")
        assert model.blocks[0].attn.mixer.position.grid is None
        swap(model, "mha+test_grid", grid=(3, 9))
        part = model.blocks[0].attn.mixer.position
        assert (part.grid, part.prefix) == ((3, 9), 0)
        swap(model, "mha+test_grid(grid=(9, 3))")
        assert model.blocks[0].attn.mixer.position.grid == (9, 3)
        windows = a_swin()
        swap(windows, "mha+test_grid")
        assert windows.layers[0].blocks[0].attn.inner.mixer.position.grid == (4, 4)


def test_another_number_of_tokens_than_the_grid_has_is_refused() -> None:
    with registered("test_grid", "position", OnGrid):
        model = a_vit(dynamic_img_size=True)
        swap(model, "mha+test_grid")
        assert model(images()).shape == (3, 5)
        with pytest.raises(ZooError, match=r"x has 37 tokens, but the grid .* make 17"):
            model(torch.randn(1, 3, 24, 24))
        swap(model, "mha")
        assert model(torch.randn(1, 3, 24, 24)).shape == (1, 5)


def test_axial_rope_knows_rows_and_columns() -> None:
    model = a_vit(class_token=True, pos_embed="none")
    swap(model, "mha+rope")
    layer = model.eval().blocks[0].attn
    assert (layer.mixer.position.grid, layer.mixer.position.prefix) == ((4, 4), 1)
    with torch.no_grad():
        layer.mixer.project.qkv.weight.normal_()
        patch, other = torch.randn(2, 16)
        pattern = {}
        for move in (0, 1, 4, 5):  # to the right, down, both
            x = torch.zeros(1, 17, 16)
            x[0, 1 + move], x[0, 1 + 6 + move] = patch, other
            pattern[move] = layer.mixer(x, need_weights=True)[1][0, :, 1 + move, 1 + 6 + move]
            empty = layer.mixer(x, need_weights=True)[1][0, :, 1 + move, 16]
            pattern[move] = pattern[move] / empty
    for move in (1, 4, 5):
        assert_close(pattern[move], pattern[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3, "qk_norm": True},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"block_fn": timm.models.vision_transformer.ResPostBlock},
    ],
    ids=str,
)
def test_swapping_in_softmax_attention_changes_nothing(options: dict[str, Any]) -> None:
    model = rough(a_vit(**options))
    x = images()
    wanted = model(x)
    count = sum(p.numel() for p in model.parameters())
    for _ in range(2):  # the second time it replaces its own work
        assert len(swap(model, "mha")) == 2
        assert {type(b.attn).__mro__[1] for b in model.blocks} == {TokenAttention}
        assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
        assert sum(p.numel() for p in model.parameters()) == count
    assert not model.blocks[0].attn.training


def test_without_copy_the_weights_are_new() -> None:
    model = rough(a_vit())
    before = model.blocks[0].attn.qkv.weight
    swap(model, "mha", copy=False)
    assert (model.blocks[0].attn.mixer.project.qkv.weight != before).float().mean() > 0.99
    assert 0.015 < model.blocks[0].attn.mixer.project.qkv.weight.std() < 0.025
    assert (model.blocks[0].attn.mixer.project.qkv.bias == 0).all()


def test_keys_and_values_that_heads_share_are_the_mean_of_the_old_ones() -> None:
    model = rough(a_vit(num_heads=4))
    old = model.blocks[0].attn
    report = swap(model, "gqa", kv_heads=2)
    new = model.blocks[0].attn.mixer
    assert new.project.qkv.weight.shape == (16 + 8 + 8, 16)
    for kind, tensor in (("weight", old.qkv.weight), ("bias", old.qkv.bias)):
        q, k, v = getattr(new.project.qkv, kind).split((16, 8, 8))
        assert_close(q, tensor[:16], atol=0, rtol=0)
        for x, whole in ((k, tensor[16:32]), (v, tensor[32:])):
            assert_close(x[:4], (whole[:4] + whole[4:8]) / 2)
            assert_close(x[4:], (whole[8:12] + whole[12:]) / 2)
    assert_close(new.combine.proj.weight, old.proj.weight, atol=0, rtol=0)
    assert (report[0].copied, report[0].averaged, report[0].fresh) == (
        ("q", "proj"),
        ("k", "v"),
        (),
    )
    x = images()
    wanted = model(x)
    report = swap(model, "mha")  # heads that shared keys each get a copy
    assert (report[1].copied, report[1].averaged) == (("q", "k", "v", "proj"), ())
    assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_not_copied_and_the_report_says_so() -> None:
    model = rough(a_vit(qk_norm=True))
    old = model.blocks[0].attn
    report = swap(model, "differential")  # as large as mha, but its q and k are others
    new = model.blocks[0].attn.mixer
    assert new.project.qkv.weight[:32].abs().max() < 0.2
    assert_close(new.project.qkv.weight[32:], old.qkv.weight[32:], atol=0, rtol=0)
    assert report[0].name == "blocks.0.attn"
    assert report[0].copied == ("v", "proj")
    assert "mixer.project.qkv.weight (q, k)" in report[0].fresh
    assert "mixer.q_norm.weight" in report[0].fresh
    assert "mixer.normalize.lambda_q1" in report[0].fresh
    assert str(report).startswith("blocks.0.attn: differential; copied v, proj; fresh mixer.")
    report = swap(model, "mhe", copy=False)
    assert report[1].copied == ()
    assert set(report[1].fresh) == {n for n, _ in model.blocks[1].attn.named_parameters()}
    assert model.eval()(images()).shape == (3, 5)


def test_every_parameter_is_copied_averaged_or_fresh() -> None:
    for name in ("moh", "talking_heads", "mhe", "linear", "t5"):
        model = a_vit()
        report = swap(model, name)
        for layer in report:
            attn = model.get_submodule(layer.name)
            known = {"proj": "mixer.combine.proj."}
            taken = [known.get(item, "mixer.project.qkv.") for item in layer.copied]
            for parameter, _ in attn.named_parameters():
                said = parameter in layer.fresh
                assert said != any(parameter.startswith(prefix) for prefix in taken)


def test_layouts_and_lists_of_layers() -> None:
    model = a_vit(depth=4)
    report = swap(model, {"default": "mqa", "last": "mha"}, layers={"every": 2, "other": "alibi"})
    assert len(report) == 4
    assert [b.attn.mixer.spec for b in model.blocks] == ["mqa", "mha+alibi", "mqa", "mha"]
    specs = ["alibi", "mha", "mqa", "mha"]
    swap(model, specs)
    assert [b.attn.mixer.spec for b in model.blocks] == ["mha+alibi", "mha", "mqa", "mha"]
    with pytest.raises(ZooError, match="one entry for each of the 4 layers"):
        swap(model, ["mha"])
    with pytest.raises(ZooError, match="excludes the argument layers"):
        swap(model, specs, layers={"first": "mha"})
    with pytest.raises(ZooError, match=r"unknown key of layers 'frist'.*'first'"):
        swap(model, "mha", layers={"frist": "mha"})


def test_other_head_widths_and_dropouts_are_kept() -> None:
    model = a_vit(attn_drop_rate=0.1, proj_drop_rate=0.2).double()
    model.blocks[0].attn = timm.layers.Attention(16, 2, attn_head_dim=4).double()
    for _ in range(2):
        swap(model, "mha")
        assert [b.attn.mixer.head_dim for b in model.blocks] == [4, 8]
    assert model.blocks[1].attn.mixer.dropout == 0.1
    assert model.blocks[1].attn.proj_drop.p == 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("shifted_by", [None, 0], ids=["shifted", "not shifted"])
def test_swapping_in_swin_changes_nothing(shifted_by: int | None) -> None:
    model = rough(a_swin())
    for layer in model.layers:
        for block in layer.blocks if shifted_by == 0 else ():
            block.shift_size = (0, 0)
            block.register_buffer("attn_mask", None, persistent=False)
    with torch.no_grad():
        for layer in model.layers:
            for block in layer.blocks:
                block.attn.relative_position_bias_table.mul_(5.0)
    x = images()
    wanted = model(x)
    count = sum(p.numel() for p in model.parameters())
    for _ in range(2):
        assert len(swap(model, "mha")) == 4
        assert all(type(b.attn) is WindowAttention for layer in model.layers for b in layer.blocks)
        assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
        assert sum(p.numel() for p in model.parameters()) == count
    model.train()(x).sum().backward()
    tables = [p for n, p in model.named_parameters() if n.endswith("bias_table")]
    assert len(tables) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tables)
    twin = pickle.loads(pickle.dumps(model.eval()))
    assert_close(twin(x), wanted, atol=1e-5, rtol=1e-5)


def test_hidden_pairs_of_a_shifted_window_are_hidden_from_any_normalizer() -> None:
    model = rough(a_swin())
    swap(model, "sparsemax")
    block = model.layers[0].blocks[1]
    assert any(block.shift_size)
    x = torch.randn(8, 16, 8)  # two images of four windows
    wanted = block.attn(x, mask=block.attn_mask)
    region = block.attn_mask[3] == 0  # pairs of the last window that share a region
    moved = x.clone()
    moved[3, ~region[0]] += 1.0
    changed = (block.attn(moved, mask=block.attn_mask) - wanted).abs().amax(-1)[3]
    assert (changed[region[0]] == 0).all()
    assert (changed[~region[0]] > 0).all()


def test_swin_refuses_what_cannot_keep_its_bias_and_its_mask() -> None:
    with pytest.raises(CompatibilityError, match="'linear' forms no scores that Swin's relative"):
        swap(a_swin(), "linear")
    with pytest.raises(CompatibilityError, match="'no_mixing' forms no scores"):
        swap(a_swin(), "no_mixing")
    with registered("test_keys", "normalize", Deep, traits=Traits(mask="keys")):
        with pytest.raises(CompatibilityError, match="'test_keys' takes no mask between pairs"):
            swap(a_swin(), "test_keys")
        model = a_swin(window_size=8)
        assert not any(any(b.shift_size) for layer in model.layers for b in layer.blocks)
        assert len(swap(model, "test_keys")) == 4


@pytest.mark.filterwarnings("ignore:.*input value tensor is non-contiguous:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_swin_can_be_resized_after_the_swap() -> None:
    model = rough(a_swin())
    other = copy.deepcopy(model)
    swap(model, "mha")
    for m in (model, other):
        m.set_input_size((32, 32), window_size=8)
    x = torch.randn(2, 3, 32, 32)
    assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)


def test_models_that_cannot_be_swapped_are_left_alone() -> None:
    resnet = timm.create_model("resnet10t")
    with pytest.raises(ZooError, match=r"ResNet has no blocks.*zoo\.timm\.feature"):
        swap(resnet, "mha")
    model = a_vit()
    before = [b.attn for b in model.blocks]
    with pytest.raises(ZooError, match="heads=2"):
        swap(model, ["mha", "gqa(kv_heads=3)"])
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(ZooError, match="attention of block 1 is Identity"):
        swap(model, "mha")
    assert model.blocks[0].attn is before[0]
    model.blocks[1].attn = timm.layers.Attention(16, 2, gated=True)
    with pytest.raises(ZooError, match="'gate'"):
        swap(model, "mha")
    scaled = a_vit(scale_attn_norm=True)
    with pytest.raises(ZooError, match="'norm'"):
        swap(scaled, "mha")
    model.blocks[1].attn = timm.layers.Attention(16, 2, dim_out=8)
    with pytest.raises(ZooError, match="16 channels into 8"):
        swap(model, "mha")
