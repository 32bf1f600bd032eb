"""A pretrained timm model does not change when a mechanism in its neutral setting is put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm_models import a_swin, a_vit, images, needs_own_tokens, rough
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from zoo.errors import CompatibilityError, ZooError
from zoo.registry import SOCKETS
from zoo.testing.subject import variants


@dataclass(frozen=True)
class Neutral:
    """How a mechanism is set so that it equals softmax attention.

    Args:
        spec: Specification.
        options: Options of `swap`.
        tune: Sets parameters that start anew.
        before: Prepares the model: where equality asks for something of the weights.
    """

    spec: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tune: Callable[[nn.Module], None] = lambda model: None
    before: Callable[[nn.Module], None] = lambda model: None


@torch.no_grad()
def zero(*names: str) -> Callable[[nn.Module], None]:
    """Zero the parameters whose names end so."""

    def run(model: nn.Module) -> None:
        found = [p for n, p in model.named_parameters() if n.endswith(names)]
        assert found
        for parameter in found:
            parameter.data.zero_()

    return run


def scores_above_zero(model: nn.Module) -> None:
    """Keys near one positive vector and queries near it: all their products are positive."""
    for module in model.modules():
        if hasattr(module, "qkv"):
            rows = len(module.qkv.weight) // 3
            module.qkv.weight.data[: 2 * rows] *= 0.02
            module.qkv.bias.data[: 2 * rows] = 1.0


def shared_keys(model: nn.Module) -> None:
    """The same key and value for all heads, which is all that one head for them can hold."""
    for module in model.modules():
        if hasattr(module, "qkv"):
            for x in (module.qkv.weight.data, module.qkv.bias.data):
                heads = x.unflatten(0, (3, module.num_heads, -1))
                heads[1:] = heads[1:, :1].clone()


# Two heads in every layer, sixteen patches or a window of 4 x 4 (and a class token in the ViT).
NEUTRAL: dict[str, Neutral] = {
    "mha": Neutral("mha"),
    "none": Neutral("none"),
    "dot": Neutral("dot"),
    "all": Neutral("all"),
    "softmax": Neutral("softmax"),
    "concat": Neutral("concat"),
    "gqa": Neutral("gqa", {"kv_heads": 2}),
    "mqa": Neutral("mqa", before=shared_keys),
    "t5": Neutral("t5", tune=zero("position.table")),
    "transformer_xl": Neutral(
        "transformer_xl", tune=zero("position.u", "position.v", "w_r.weight")
    ),
    "cope": Neutral("cope"),
    "sliding_window": Neutral("sliding_window(window=64)"),
    "neighborhood": Neutral("neighborhood(kernel=4)"),
    "moba": Neutral("moba(block=4, topk=5)"),
    "cog": Neutral("cog", before=scores_above_zero),
    "talking_heads": Neutral("talking_heads"),
    "moh": Neutral("moh(shared_heads=2)", tune=zero("combine.shared.weight")),
}
# Settings that a mechanism has besides.
MORE: dict[str, Neutral] = {
    "moh on queries": Neutral("moh(router=query_norm, shared_heads=1, top_k=1)"),
    "moh of routed heads": Neutral("moh(shared_heads=0, top_k=2)", tune=zero("routed.weight")),
    "moba by its defaults": Neutral("moba"),
}
MIXERS = zoo.list(kind=[*SOCKETS, "mixer"])


def causal_only(spec: str) -> bool:
    return not zoo.info(spec.partition("(")[0]).traits.bidirectional


def outputs(model: nn.Module, x: Tensor, causal: bool) -> Tensor:
    if not causal:
        return model(x)
    return model.forward_head(model.forward_features(x, is_causal=True))


CASES = {**NEUTRAL, **MORE}
# The windows of timm's Swin are never causal, so nothing that is causal only could equal them.
HOSTED = [
    (host, case)
    for case, neutral in CASES.items()
    for host in ("vit", "registers", "swin")
    if host != "swin" or not causal_only(neutral.spec)
]


@pytest.mark.parametrize(("host", "case"), HOSTED)
def test_outputs_are_unchanged_in_the_neutral_setting(host: str, case: str) -> None:
    neutral = CASES[case]
    causal = causal_only(neutral.spec)
    if host == "swin":
        model = rough(a_swin(num_heads=(2, 2)))
    else:
        model = rough(a_vit(reg_tokens=2 if host == "registers" else 0))
    neutral.before(model)
    x = images()
    with torch.no_grad():
        wanted = outputs(model, x, causal)
        assert wanted.std() > 0.05
        report = zoo.swap(model, neutral.spec, **neutral.options, causal=causal)
        neutral.tune(model)
        assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
    assert len(report) == len({layer.name for layer in report}) == (4 if host == "swin" else 2)
    for layer in report:
        assert {*layer.copied, *layer.averaged} >= {"q", "k", "v", "proj"}


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in NEUTRAL])
def test_the_others_are_other_functions(name: str) -> None:
    """No mechanism is left out of the table above that belongs there, and none does nothing."""
    spec = variants(zoo.info(name))[0]
    causal = causal_only(spec)
    model = rough(a_vit())
    x = images()
    with torch.no_grad():
        before = outputs(model, x, causal)
        if getattr(zoo.info(name).cls, "embeds", False):
            with pytest.raises(CompatibilityError, match=f"'{name}' adds positions to embeddings"):
                zoo.swap(model, spec)
            return
        if needs_own_tokens(spec):
            with pytest.raises(CompatibilityError, match=f"'{name}' needs a token of its own"):
                zoo.swap(model, spec, causal=causal)
            return
        if causal:
            with pytest.raises(CompatibilityError, match=f"causal=False is not .+ '{name}'"):
                zoo.swap(model, spec)
        zoo.swap(model, spec, causal=causal)
        assert (model(x) - before).abs().max() > 1e-3


ACCEPTED = [
    name
    for name in MIXERS
    if not getattr(zoo.info(name).cls, "embeds", False)
    and not needs_own_tokens(variants(zoo.info(name))[0])
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_token_mixer_on_an_odd_grid_behind_prefix_tokens(name: str) -> None:
    spec = variants(zoo.info(name))[0]
    # 28 x 20 pixels: 7 x 5 patches behind a class token and three registers.
    model = a_vit(img_size=(28, 20), reg_tokens=3, dynamic_img_size=True)
    zoo.swap(model, spec, causal=causal_only(spec))
    x, labels = torch.randn(3, 3, 28, 20), torch.tensor([0, 3, 4])
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    parts = [part for part in model.blocks[0].attn.modules() if getattr(part, "grid", None)]
    if parts:
        assert (tuple(parts[0].grid), parts[0].prefix) == ((7, 5), 4)
        with pytest.raises(ZooError, match=r"x has 29 tokens, but the grid .+ make 39"):
            model(torch.randn(1, 3, 20, 20))


SIZES: dict[str, Any] = {
    **{"img_size": 16, "patch_size": 4, "num_classes": 5},
    **{"embed_dim": 32, "depth": 2, "num_heads": 4},
}
GROUPED = {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2}
VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "eva": lambda: Eva(**SIZES),
    "eva with rope": lambda: Eva(**SIZES, use_rot_pos_emb=True),
    "eva, q k v apart": lambda: Eva(**SIZES, use_rot_pos_emb=True, qkv_fused=False),
    "eva, mixed rope": lambda: Eva(**SIZES, use_rot_pos_emb=True, rope_type="mixed"),
    "eva, registers": lambda: Eva(**SIZES, use_rot_pos_emb=True, num_reg_tokens=2),
    "eva, grouped": lambda: Eva(**SIZES, use_rot_pos_emb=True, **GROUPED),
    "eva, half rotated": lambda: Eva(
        **SIZES, use_rot_pos_emb=True, attn_type="rope", rope_rotate_half=True
    ),
    "beit": lambda: Beit(**SIZES, use_rel_pos_bias=True),
    "beit, one table": lambda: Beit(**SIZES, use_shared_rel_pos_bias=True),
    "beit, no table": lambda: Beit(**SIZES),
    "relpos": lambda: VisionTransformerRelPos(**SIZES),
    "relpos, tables": lambda: VisionTransformerRelPos(
        **SIZES, rel_pos_type="bias", class_token=True, qk_norm=True
    ),
    "relpos, shared": lambda: VisionTransformerRelPos(**SIZES, shared_rel_pos=True),
}


@pytest.mark.parametrize("case", list(VARIANTS))
def test_variants_of_the_vit_keep_their_positions(case: str) -> None:
    model = rough(VARIANTS[case]())
    x = images()
    wanted = model(x)
    for _ in range(2):
        report = zoo.swap(model, "mha")
        assert {*report[1].copied} >= {"q", "k", "v", "proj"}
        assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
    state = model.state_dict()
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].attn.parameters())
    other = VARIANTS[case]().eval()
    zoo.swap(other, "mha")
    other.load_state_dict(state)
    assert_close(other(x), wanted, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[str, str, str]] = {
    "bias on a kernel": ("beit", "linear", "'linear' forms no scores .+ Beit .+ trait bias"),
    "bias on a module": ("relpos", "no_mixing", "'no_mixing' forms no scores"),
    "rope on a module": ("eva with rope", "no_mixing", "'no_mixing' has no queries and keys"),
    "rope twice": ("eva with rope", "mha+rope", "'rope': Eva has rotary positions of its own"),
    "rope on halves": ("eva with rope", "differential", "'differential.* q and k of width 4, but"),
    "rope of heads": ("eva, mixed rope", "mqa", "'mqa.* has 1 key heads for 4 heads"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_a_variant_cannot_keep_is_refused(case: str) -> None:
    host, spec, message = REFUSED[case]
    model = VARIANTS[host]()
    before = [block.attn for block in model.blocks]
    with pytest.raises(CompatibilityError, match=message):
        zoo.swap(model, spec)
    assert [block.attn for block in model.blocks] == before
