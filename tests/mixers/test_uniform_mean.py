"""The mean of all values: against the reference, attention with equal scores, and decoding."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.mixers.uniform_mean import uniform_mean_reference
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close


def build(causal=True, **options):
    options = {"dim": 12, "heads": 3, "dtype": torch.float64, **options}
    return zoo.create("uniform_mean", causal=causal, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_equals_reference(causal, hidden):
    mixer = build(causal, bias=True)
    x = draw(3, 17, 12)
    mask = torch.rand(3, 1, 1, 17) < 0.6
    mask[1] = False
    given = {"mask": mask} if hidden else {}

    def plainly(x, mask=None):
        seen = None if mask is None else mask[:, 0, 0]
        return mixer.proj(uniform_mean_reference(mixer.v(x), causal, seen))

    found = settle(mixer, x, **given)
    mixer.forward = plainly
    for name, value in settle(mixer, x, **given).items():
        assert_close(found[name], value, name, gradient=name != "output")


@pytest.mark.parametrize("causal", [False, True])
def test_equals_attention_with_equal_scores(causal):
    mixer = build(causal)
    attn = zoo.create("mha", 12, 3, causal=causal, dtype=torch.float64)
    with torch.no_grad():
        attn.project.qkv.weight[:24].zero_()
        attn.project.qkv.weight[24:].copy_(mixer.v.weight)
        attn.combine.proj.weight.copy_(mixer.proj.weight)
    x = draw(2, 7, 12)
    assert_close(mixer(x), attn(x), "attention with q = k = 0")


def test_by_hand():
    x = torch.tensor([[[6.0], [0.0], [3.0]]], dtype=torch.float64)
    mask = torch.tensor([[[[False, True, True]]]])
    for causal, plain, hidden in (
        (True, [6.0, 3.0, 3.0], [0.0, 0.0, 1.5]),
        (False, [3.0, 3.0, 3.0], [1.5, 1.5, 1.5]),
    ):
        mixer = build(causal, dim=1, heads=1)
        with torch.no_grad():
            mixer.v.weight.fill_(1.0)
            mixer.proj.weight.fill_(1.0)
        assert mixer(x).flatten().tolist() == plain
        assert mixer(x, mask=mask).flatten().tolist() == hidden


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
def test_decodes_as_in_parallel_with_hidden_tokens(pieces):
    mixer, cache = build(), zoo.LayerCache()
    x = draw(2, 9, 12)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., [0, 1, 5]] = False
    rows, done = [], 0
    for piece in x.split(pieces, 1):
        done += piece.shape[1]
        rows.append(mixer(piece, mask=mask[..., :done], cache=cache))
    assert_close(torch.cat(rows, 1), mixer(x, mask=mask), "decoded")
    assert cache.nbytes == 2 * (12 + 1) * 8


def test_without_causality_a_cache_adds_to_the_mean():
    mixer, cache = build(causal=False), zoo.LayerCache()
    x = draw(2, 9, 12)
    mixer(x[:, :4], cache=cache)
    assert_close(mixer(x[:, 4:], cache=cache), mixer(x)[:, 4:], "the later tokens see all")


def test_half_precision_sums_in_float32():
    mixer, cache = build(dtype=torch.bfloat16, dim=1, heads=1), zoo.LayerCache()
    with torch.no_grad():
        mixer.v.weight.fill_(1.0)
        mixer.proj.weight.fill_(1.0)
    # In bfloat16 a sum of ones stops at 256.
    y = mixer(torch.ones(1, 3000, 1, dtype=torch.bfloat16), cache=cache)
    assert bool((y == 1).all())
    assert cache.get_state("sum").dtype == torch.float32


def test_dropout_takes_a_value_from_all_later_means():
    mixer = build(dim=1, heads=1, dropout=0.5).train()
    with torch.no_grad():
        mixer.v.weight.fill_(1.0)
        mixer.proj.weight.fill_(1.0)
    x = torch.ones(1, 4000, 1, dtype=torch.float64)
    sums = mixer(x).detach().flatten() * torch.arange(1, 4001)
    steps = sums.diff().round(decimals=6)
    assert sorted(set(steps.tolist())) == [0.0, 2.0]
    assert mixer(x)[0, -1].item() == pytest.approx(1, abs=0.1)
    assert bool((mixer.eval()(x) == 1).all())


@pytest.mark.parametrize(
    ("options", "message"), [({"heads": 5}, "heads=5"), ({"dropout": -0.1}, "dropout=-0.1")]
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**options)


def test_bad_input():
    with pytest.raises(zoo.ZooError, match="uniform_mean"):
        build()(draw(2, 5, 12), mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(zoo.ZooError, match="dim=12"):
        build()(draw(2, 5, 3))
