"""Token mixers in timm's ViT by its own argument: zoo.timm.bind."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm_models import (
    Deep,
    Mean,
    Special,
    a_vit,
    images,
    registered,
    rough,
)
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from zoo.errors import CompatibilityError, ZooError
from zoo.registry import SOCKETS, Traits
from zoo.timm import bind, swap


def embeds(name: str) -> bool:
    return getattr(zoo.info(name).cls, "embeds", False)


# Whatever is registered: new mechanisms are covered without a change here.
MIXERS = [
    name
    for name in zoo.list(kind=[*SOCKETS, "mixer"], traits={"bidirectional": True})
    if not embeds(name)
]


def test_bound_class_works_by_name_of_a_timm_model() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        num_classes=10,
        attn_layer=bind("mha"),
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert [type(b.attn.mixer) for b in model.blocks] == [zoo.Attention] * 12


def told(name: str) -> type[nn.Module]:
    """The mechanism bound, and told how many tokens there are, as fope has to be."""
    return bind(name, **({"max_len": 17} if zoo.info(name).kind in SOCKETS else {}))


@pytest.mark.parametrize("name", MIXERS)
def test_every_token_mixer_trains_in_a_vit(name: str) -> None:
    model = a_vit(told(name), class_token=False, global_pool="avg")
    x, labels = images(), torch.tensor([0, 3, 4])
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    gradients = [p.grad for p in model.blocks[0].attn.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", MIXERS)
def test_every_token_mixer_keeps_samples_apart_and_takes_bf16(name: str) -> None:
    model = rough(a_vit(told(name)))
    x = images()
    with torch.no_grad():
        whole, alone = model(x), model(x[1:2])
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(half).all()
    assert (half.float() - whole).abs().max() < 0.25 * whole.abs().max()


@pytest.mark.parametrize("name", MIXERS)
def test_every_token_mixer_survives_state_dict_deepcopy_and_pickle(name: str) -> None:
    model = rough(a_vit(told(name)))
    other = a_vit(told(name)).eval()
    other.load_state_dict(model.state_dict())
    x = images()
    with torch.no_grad():
        wanted = model(x)
        for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(twin(x), wanted, atol=0, rtol=0)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("proj_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_timm_attention_with_its_weights(
    qkv_bias: bool, proj_bias: bool, qk_norm: bool
) -> None:
    options = {"qkv_bias": qkv_bias, "proj_bias": proj_bias, "qk_norm": qk_norm, "reg_tokens": 2}
    model = rough(a_vit(**options))
    bound = a_vit(bind("mha"), **options).eval()
    names = {"mixer.project.qkv": "qkv", "mixer.combine.proj": "proj", "mixer.q_norm": "q_norm"}
    names["mixer.k_norm"] = "k_norm"
    state = model.state_dict()
    wanted = {}
    for key in bound.state_dict():
        source = key
        for ours, theirs in names.items():
            source = source.replace(f"attn.{ours}.", f"attn.{theirs}.")
        wanted[key] = state.pop(source)
    assert not state  # every weight of timm's has its place
    bound.load_state_dict(wanted)
    x = images()
    assert_close(bound(x), model(x), atol=1e-5, rtol=1e-5)


def masks() -> dict[str, Tensor]:
    free = torch.rand(3, 2, 7, 7) > 0.4
    free |= torch.eye(7, dtype=torch.bool)
    added = torch.randn(3, 2, 7, 7)
    return {
        "bool of rank 2": free[0, 0],
        "bool of rank 3": free[0],
        "bool of rank 4": free[:, :1],
        "keys": free[:, :1, :1] | torch.tensor([True] + [False] * 6),
        "float of rank 2": added[0, 0],
        "float of rank 4": added,
        "minus infinity": added.masked_fill(~free, -torch.inf),
    }


@pytest.mark.parametrize("case", list(masks()))
@pytest.mark.parametrize("route", ["auto", "engine"])
def test_masks_mean_what_they_mean_to_timm(case: str, route: str) -> None:
    model = rough(a_vit(attn_drop_rate=0.0))
    theirs = model.blocks[0].attn
    swap(model, "mha", route=route)
    ours = model.blocks[0].attn
    mask = masks()[case]
    x = torch.randn(3, 7, 16)
    assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), atol=1e-5, rtol=1e-5)


def test_causal_when_bound_causal_and_only_then() -> None:
    x = torch.randn(2, 5, 16)
    theirs = timm.layers.Attention(16, 2)
    layer = bind("mha", causal=True)(16, 2)
    layer.mixer.project.qkv.load_state_dict(theirs.qkv.state_dict())
    layer.mixer.combine.proj.load_state_dict(theirs.proj.state_dict())
    wanted = theirs(x, is_causal=True)
    for is_causal in (True, False):
        assert_close(layer(x, is_causal=is_causal), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ZooError, match=r"is_causal=True.*bind\('mha', causal=True\)"):
        bind("mha")(16, 2)(x, is_causal=True)


def test_dropouts_are_those_of_timm() -> None:
    layer = bind("mha")(16, 2, attn_drop=0.3, proj_drop=0.5)
    assert layer.mixer.dropout == 0.3
    x = torch.randn(4, 9, 16)
    dropped = (layer(x) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    layer.eval()
    assert_close(layer(x), layer(x), atol=0, rtol=0)
    assert (layer(x) != 0).all()


def test_qk_norm_is_the_norm_that_timm_gives_or_rmsnorm() -> None:
    given = bind("mha")(16, 2, qk_norm=True, norm_layer=functools.partial(nn.LayerNorm, eps=0.5))
    assert isinstance(given.mixer.q_norm, nn.LayerNorm)
    assert (given.mixer.k_norm.eps, given.mixer.k_norm.normalized_shape) == (0.5, (8,))
    assert isinstance(bind("mha")(16, 2, qk_norm=True).mixer.q_norm, nn.RMSNorm)
    assert bind("mha")(16, 2).mixer.q_norm is None


def test_options_reach_host_and_parts() -> None:
    layer = bind("gqa+softmax", kv_heads=2, route="engine")(16, 4)
    assert (layer.mixer.kv_heads, layer.mixer.route) == (2, "engine")
    layer = bind("sliding_window", window=5)(16, 4)
    assert layer.mixer.spec == "sliding_window(window=5)"
    assert layer.mixer.select.width == 5


def test_devices_and_dtypes() -> None:
    layer = bind("mha")(16, 2, qk_norm=True, norm_layer=nn.LayerNorm, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in bind("mha")(16, 2, device="meta").parameters()} == {"meta"}


def test_depth_is_told_to_parts_that_ask() -> None:
    with registered("test_deep", "normalize", Deep):
        model = a_vit(bind("test_deep"), depth=3)
        assert [b.attn.mixer.normalize.depth for b in model.blocks] == [0, 1, 2]
        model = a_vit(depth=3)
        swap(model, "test_deep", layers={"first": "mha"})
        assert [b.attn.mixer.part_names["normalize"] for b in model.blocks] == [
            *("softmax", "test_deep", "test_deep")
        ]
        assert [b.attn.mixer.normalize.depth for b in model.blocks[1:]] == [1, 2]
        assert model.eval()(images()).shape == (3, 5)
        model.init_weights(mode="reset")  # must not run the initialisation of timm's DiffAttention


def test_special_initialisation_survives_every_scheme_of_timm() -> None:
    with registered("test_special", "project", Special):
        for scheme in ("", "jax", "moco", "reset", "skip"):
            model = a_vit(bind("test_special"), weight_init=scheme)
            for block in model.blocks:
                assert (block.attn.mixer.project.linear.weight == 0.25).all()
                assert (block.attn.mixer.project.linear.bias == -1.0).all()
        assert model.blocks[0].attn.mixer.combine.proj.weight.std() > 0.01
        model = a_vit()
        swap(model, "test_special")
        assert (model.blocks[1].attn.mixer.project.linear.weight == 0.25).all()
        assert 0.015 < model.blocks[1].attn.mixer.combine.proj.weight.std() < 0.025


def test_auxiliary_losses_are_found() -> None:
    with registered("test_special", "project", Special):
        model = a_vit(bind("test_special"))
        model(images())
        losses = zoo.auxiliary_losses(model)
        assert list(losses) == ["test_size"]
        own = [b.attn.mixer.project.aux_losses["test_size"] for b in model.blocks]
        assert_close(losses["test_size"], own[0] + own[1])


def test_whole_modules_get_what_they_ask_for() -> None:
    with registered("test_mean", "mixer", Mean, traits=Traits(causal=False, mask="keys")):
        layer = bind("test_mean", power=2.0)(16, num_heads=3, qkv_bias=True)
        assert layer.mixer.power == 2.0
        x = torch.randn(2, 4, 16)
        assert_close(layer(x), x + x.mean(1, keepdim=True))
        mask = torch.tensor([True, True, False, False])
        assert_close(layer(x, mask), x + x[:, :2].mean(1, keepdim=True))
        with pytest.raises(ZooError, match=r"test_mean.*forms no scores"):
            layer(x, torch.zeros(4, 4))
        with pytest.raises(ZooError, match=r"attn_drop=0.1: 'test_mean' has no dropout"):
            bind("test_mean")(16, attn_drop=0.1)
        with pytest.raises(ZooError, match="qk_norm=True: 'test_mean'"):
            bind("test_mean")(16, qk_norm=True)
        with pytest.raises(CompatibilityError, match=r"causal=True.*test_mean.*allowed: False"):
            bind("test_mean", causal=True)
        with pytest.raises(ZooError, match=r"unknown option of 'test_mean' 'powr'.*'power'"):
            bind("test_mean", powr=1.0)
        model = a_vit()
        assert len(swap(model, "test_mean")) == 2
        assert model(images()).shape == (3, 5)


def test_whole_modules_have_one_switch_for_biases() -> None:
    assert bind("no_mixing")(16, 2, qkv_bias=True).mixer.v.bias is not None
    assert bind("no_mixing")(16, 2, proj_bias=False).mixer.v.bias is None
    with pytest.raises(ZooError, match=r"qkv_bias=False with proj_bias=True: 'no_mixing'"):
        bind("no_mixing")(16, 2)


def test_parts_with_biases_of_their_own_refuse_uneven_ones() -> None:
    with registered("test_special", "project", Special):
        with pytest.raises(ZooError, match="qkv_bias=False with proj_bias=True: 'test_special'"):
            bind("test_special")(16, 2)
        layer = bind("test_special")(16, 2, qkv_bias=True, proj_bias=False)
        assert layer.mixer.combine.proj.bias is None


def test_compiles_without_a_break() -> None:
    model = rough(a_vit(bind("mha"), depth=1))
    x = images(2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-6)


BAD_BINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown name": (lambda: bind("mah"), "unknown mechanism 'mah'.*'mha'"),
    "a class": (lambda: bind(zoo.Attention), r"takes a name.*package\.module:Class"),
    "an instance": (lambda: bind(zoo.create("mha", dim=4, heads=2)), "takes a name"),
    "a partial": (lambda: bind(functools.partial(bind("mha"))), "options beside it"),
    "unknown option": (
        lambda: bind("gqa", kv_head=2),
        "unknown option of 'gqa' 'kv_head'.*kv_heads",
    ),
    "option of timm": (lambda: bind("mha", dropout=0.1), "told by timm; set attn_drop_rate"),
    "heads": (lambda: bind("mha", heads=2), "told by timm; set num_heads"),
    "embedding": (lambda: bind("sinusoidal"), "'sinusoidal' adds positions.*pos_embed"),
    "causal only": (lambda: bind("gru"), r"causal=False is not possible with 'gru'.*True"),
    "scale_norm": (lambda: bind("mha")(16, scale_norm=True), "scale_norm=True.*allowed: False"),
    "width": (lambda: bind("mha")(16, num_heads=3), "dim=16 is not divisible by heads=3"),
    "map": (
        lambda: bind("mha")(16, 2)(torch.zeros(1, 16, 3, 3)),
        r"\(1, 16, 3, 3\) is a feature map.*zoo\.timm\.feature",
    ),
    "integer mask": (
        lambda: bind("mha")(16, 2)(torch.zeros(1, 3, 16), torch.ones(3, 3, dtype=torch.int64)),
        "dtype torch.int64; allowed: torch.bool or floating",
    ),
    "mask of rank 5": (
        lambda: bind("mha")(16, 2)(torch.zeros(1, 3, 16), torch.zeros(1, 1, 1, 3, 3)),
        "does not fit",
    ),
}


@pytest.mark.parametrize("case", list(BAD_BINDS))
def test_bad_input_of_bind_is_refused_with_the_way_out(case: str) -> None:
    call, message = BAD_BINDS[case]
    with pytest.raises(ZooError, match=message):
        call()
