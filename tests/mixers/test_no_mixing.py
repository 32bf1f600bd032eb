"""The floor without mixing: identity weights, and what it shares with attention."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.mixers.no_mixing import no_mixing_reference
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close


def build(**options):
    return zoo.create("no_mixing", **{"dim": 12, "heads": 3, "dtype": torch.float64, **options})


@pytest.mark.parametrize("causal", [False, True])
def test_equals_attention_with_identity_weights(causal):
    mixer = build(causal=causal, bias=True)
    x = draw(2, 7, 12)
    mask = torch.rand(2, 1, 1, 7) < 0.5
    assert_close(mixer(x), mixer.proj(no_mixing_reference(mixer.v(x))), "output")
    expected = mixer.proj(no_mixing_reference(mixer.v(x), mask[:, 0, 0]))
    assert_close(mixer(x, mask=mask), expected, "output with hidden tokens")


def test_equals_attention_in_which_each_token_sees_itself():
    mixer = build()
    attn = zoo.create("mha", 12, 3, dtype=torch.float64)
    with torch.no_grad():
        attn.project.qkv.weight[24:].copy_(mixer.v.weight)
        attn.combine.proj.weight.copy_(mixer.proj.weight)
    x = draw(2, 7, 12)
    assert_close(mixer(x), attn(x, mask=torch.eye(7).bool()), "diagonal attention")
    assert mixer.v.weight.shape == (12, 12)


def test_by_hand():
    mixer = build(dim=2, heads=1)
    with torch.no_grad():
        mixer.v.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        mixer.proj.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    x = torch.tensor([[[1.0, 1.0], [5.0, 0.0]]], dtype=torch.float64)
    assert mixer(x).tolist() == [[[3.0, 2.0], [0.0, 10.0]]]


def test_no_token_sees_another():
    x = draw(1, 5, 12).requires_grad_()
    y = build()(x)
    for i in range(5):
        (gradient,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).tolist() == [j == i for j in range(5)]


def test_cache_counts_tokens_and_holds_nothing():
    mixer, cache = build(), zoo.LayerCache()
    x = draw(2, 5, 12)
    rows = [mixer(piece, cache=cache) for piece in x.split([2, 1, 2], 1)]
    assert_close(torch.cat(rows, 1), mixer(x), "decoded")
    assert (cache.length, cache.nbytes) == (5, 0)


def test_dropout_takes_whole_heads_of_a_token():
    mixer = build(dropout=0.5).train()
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(12))
    x = draw(2, 50, 12)
    ratio = (mixer(x) / mixer.v(x)).unflatten(-1, (3, 4))
    assert_close(ratio, ratio[..., :1].expand_as(ratio), "factor within a head")
    assert sorted(set(ratio.detach().round(decimals=9).flatten().tolist())) == [0.0, 2.0]
    assert_close(mixer.eval()(x), mixer.v(x), "outside training")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, r"dim=12 .*heads=5; nearest allowed heads=4"),
        ({"heads": 0}, "heads=0"),
        ({"dim": -2}, "dim=-2"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"window": 3}, "window"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, 5).bool(), "hide keys only"),
        (torch.ones(2, 1, 5, 5).bool(), "hide keys only"),
        (torch.ones(2, 3, 1, 5).bool(), "hide keys only"),
        (torch.ones(2, 1, 1, 4).bool(), "keys=5"),
        (torch.ones(3, 1, 1, 5).bool(), "batch=2"),
        (torch.ones(2, 1, 1, 5), "torch.bool"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(zoo.ZooError, match=message):
        build()(draw(2, 5, 12), mask=mask)


def test_bad_input():
    for shape in ((5, 12), (2, 5, 11)):
        with pytest.raises(zoo.ZooError, match="dim=12"):
            build()(draw(*shape))
