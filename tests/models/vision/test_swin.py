"""The small Swin: every token mixer that can keep its bias and its mask."""

from __future__ import annotations

from typing import Any

import pytest
import timm.models.swin_transformer as timm_swin
import torch
from timm_models import needs_own_tokens, rough
from torch import nn
from torch.testing import assert_close

import zoo
from zoo import models
from zoo.errors import CompatibilityError, ZooError
from zoo.models.vision.swin import swin
from zoo.registry import SOCKETS
from zoo.testing.subject import variants
from zoo.timm import WindowAttention

SMALL: dict[str, Any] = {
    **{"image_shape": (1, 16, 16), "num_classes": 10, "patch": 2, "dim": 16},
    **{"depths": (2, 1), "heads": (2, 2), "window": 4},
}
MIXERS = zoo.list(kind=[*SOCKETS, "mixer"])


def refusal(spec: str) -> str | None:
    """Why a Swin cannot have this mechanism, by its traits."""
    entry = zoo.info(spec.partition("(")[0])
    if getattr(entry.cls, "embeds", False):
        return "adds positions to embeddings"
    if needs_own_tokens(spec):
        return "needs a token of its own"
    if entry.kind not in SOCKETS or not entry.traits.bias:
        return "forms no scores that Swin's relative position bias could be added to"
    return "takes no mask between pairs" if entry.traits.mask != "any" else None


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("image", [(16, 16), (28, 20)], ids=["16x16", "28x20"])
def test_every_token_mixer_trains_in_windows_or_says_why_not(
    name: str, image: tuple[int, int]
) -> None:
    entry = zoo.info(name)
    spec = variants(entry)[0]
    # 28 x 20 pixels are 7 x 5 tokens, which no window of 4 divides.
    sizes = {"image_shape": (1, *image), "patch": 2 if image == (16, 16) else 4}
    options = {**SMALL, **sizes, "causal": not entry.traits.bidirectional}
    reason = refusal(spec)
    if reason is not None:
        with pytest.raises(CompatibilityError, match=f"'{name}.*{reason}"):
            swin(spec, **options)
        return
    model = swin(spec, **options)
    x, labels = torch.randn(6, 1, *image), torch.arange(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    assert_close(model(x[2:3]), model(x)[2:3], atol=1e-5, rtol=1e-5)


def test_it_is_the_swin_of_timm() -> None:
    sizes = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
    plain = timm_swin.SwinTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=10, **sizes
    )
    model = swin("mha", **SMALL)
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, model)]
    assert count[0] == count[1]
    layers = [block.attn for stage in model.layers for block in stage.blocks]
    assert [type(layer) for layer in layers] == [WindowAttention] * 3
    assert any(model.layers[0].blocks[1].shift_size)
    table = layers[0].relative_position_bias_table
    assert 0.01 < table.std() < 0.03


def test_options_reach_their_place() -> None:
    model = swin(
        {"default": "mha", "first": "mqa"},
        **{**SMALL, "image_shape": (3, 16, 24), "window": (4, 3), "depths": (2, 2), "heads": 2},
        layers={"last": "sparsemax"},
        mlp_ratio=2.0,
        bias=False,
        dropout=0.1,
        attention_dropout=0.2,
        drop_path=0.3,
    )
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [b.attn.inner.mixer.spec for b in blocks] == ["mqa", "mha", "mha", "sparsemax"]
    assert [b.attn.inner.mixer.heads for b in blocks] == [2, 2, 4, 4]
    assert blocks[0].window_size == (4, 3)
    assert blocks[0].attn.inner.mixer.project.qkv.bias is None
    assert blocks[0].attn.inner.mixer.dropout == 0.2
    assert blocks[0].attn.inner.proj_drop.p == 0.1
    assert blocks[0].mlp.fc1.out_features == 32
    assert blocks[3].drop_path1.drop_prob == pytest.approx(0.3)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 10)


def test_by_name_and_on_the_grid_of_the_window() -> None:
    model = models.create("swin", attention="rope", **SMALL)
    assert model.layers[0].blocks[0].attn.inner.mixer.position.grid == (4, 4)
    x = torch.randn(2, 1, 16, 16)
    assert_close(rough(model)(x[:1]), model(x)[:1], atol=1e-4, rtol=1e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "patch": ({"patch": 3}, "patch=3 must divide height 16 and width 16"),
    "stages": ({"depths": ()}, "depths=.. must be whole numbers .*, the number of blocks"),
    "no blocks": ({"depths": (1, 0)}, r"depths=\(1, 0\) must be whole numbers of at least 1"),
    "heads": ({"heads": (2, 3)}, "heads=3 of stage 2 must divide its 32 channels"),
    "heads of a stage": ({"heads": (2,)}, "must be one number, or 2: one for each stage"),
    "window": ({"window": 0}, "window=0 must be a whole number of at least 1"),
    "sides": ({"window": (2, 2, 2)}, r"window=\(2, 2, 2\) must be 2 whole numbers"),
    "mlp": ({"mlp_ratio": 0}, "mlp_ratio=0 must be a number above 0"),
    "rate": ({"drop_path": 1.0}, r"drop_path=1.0 must be a number in \[0, 1\)"),
    "shape": ({"image_shape": (16, 16)}, "must be .channels, height, width"),
    "name": ({"attention": "mah"}, "unknown mechanism 'mah'"),
    "feature": ({"attention": "se"}, "'se' is of kind 'feature', but SwinTransformer has no place"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_of_swin(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ZooError, match=message):
        swin(**{**SMALL, **options})
