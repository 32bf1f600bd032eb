"""Linear attention: the quadratic form, chunks, the state, masks, and what is refused."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.attend.linear import linear_attention_reference
from zoo.ops import flops
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close


def build(causal=True, spec="linear", **options):
    options = {"dim": 12, "heads": 3, "dtype": torch.float64, **options}
    return zoo.create(spec, causal=causal, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 7, 64, 133])
def test_equals_reference(causal, kv_heads, length):
    attn = build(causal, heads=4, kv_heads=kv_heads)
    x = draw(2, length, 12)

    def plainly(x):
        q, k, v = attn.project(x, None, None)
        k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
        return attn.combine(linear_attention_reference(q, k, v, causal=causal), x)

    found = settle(attn, x)
    attn.forward = plainly
    for name, value in settle(attn, x).items():
        assert_close(found[name], value, name, gradient=name != "output")


def test_by_hand():
    q = torch.zeros(1, 1, 2, 1, dtype=torch.float64)  # phi = 1
    k = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)  # phi = 2, 1
    v = torch.tensor([[[[3.0], [9.0]]]], dtype=torch.float64)
    y = linear_attention_reference(q, k, v, causal=True, eps=0.0)
    assert y.flatten().tolist() == [3.0, 5.0]  # (2 * 3 + 1 * 9) / 3
    assert linear_attention_reference(q, k, v, eps=0.0).flatten().tolist() == [5.0, 5.0]
    # Below zero elu(x) + 1 is exp(x).
    low = linear_attention_reference(q, -k, v, eps=0.0)[0, 0, 0, 0].item()
    e = torch.tensor(-1.0).exp().item()
    assert low == pytest.approx((3 * e + 9) / (e + 1))


@pytest.mark.parametrize("causal", [False, True])
def test_the_quadratic_route_agrees(causal):
    attn = build(causal, heads=4, kv_heads=2)
    x, mask = draw(1, 71, 12), torch.ones(1, 1, 1, 71, dtype=torch.bool)
    mask[..., 5:9] = False
    for inputs in ({}, {"mask": mask}, {"cu_seqlens": torch.tensor([0, 4, 4, 71])}):
        attn.route = "auto"
        expected = settle(attn, x, **inputs)
        attn.route = "reference"
        for name, value in settle(attn, x, **inputs).items():
            assert_close(value, expected[name], name, gradient=name != "output")
    with torch.no_grad():
        cache = zoo.LayerCache()
        rows = [attn(piece, cache=cache) for piece in x.split([50, 21], 1)]
        attn.route, other = "auto", zoo.LayerCache()
        wanted = [attn(piece, cache=other) for piece in x.split([50, 21], 1)]
    assert_close(torch.cat(rows, 1), torch.cat(wanted, 1), "decoded by the quadratic route")
    attn.route = "linear_triton"
    with pytest.raises(zoo.ZooError, match="cannot take this pass"):
        attn(x)


@pytest.mark.parametrize("spec", ["linear", "linear+rope"])
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9], [70, 65, 1]])
def test_prefill_and_decoding_equal_the_parallel_form(spec, pieces):
    attn, cache = build(spec=spec, kv_heads=1), zoo.LayerCache()
    x = draw(2, sum(pieces), 12)
    with torch.no_grad():
        rows = [attn(piece, cache=cache) for piece in x.split(pieces, 1)]
        assert_close(torch.cat(rows, 1), attn(x), "decoded")
    assert cache.nbytes == 2 * 1 * 4 * 5 * 8, "batch x key heads x D (D + 1) doubles"


def test_state_is_float32_for_half_precision():
    attn, cache = build(dtype=torch.bfloat16), zoo.LayerCache()
    attn(draw(2, 5, 12, dtype=torch.bfloat16), cache=cache)
    assert cache.get_state("linear").dtype == torch.float32


def test_sums_outgrow_half_precision_but_not_the_result():
    """5,000 keys with features near 20 sum to 1e5, which float16 does not hold."""
    attn = build(dtype=torch.float16, dim=4, heads=1)
    with torch.no_grad():
        attn.project.qkv.weight[:8].fill_(5.0)
    x = torch.ones(1, 5000, 4, dtype=torch.float16)
    y = attn(x)
    assert_close(y, attn(x[:, :1]).expand_as(y), "the mean of equal values")


def test_without_causality_a_cache_adds_to_the_keys():
    attn, cache = build(causal=False), zoo.LayerCache()
    x = draw(2, 9, 12)
    with torch.no_grad():
        first, second = attn(x[:, :4], cache=cache), attn(x[:, 4:], cache=cache)
        assert_close(first, attn(x[:, :4]), "the first tokens see one another")
        assert_close(second, attn(x)[:, 4:], "the others see all")


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys_are_as_if_absent(causal):
    attn = build(causal)
    x = draw(1, 9, 12)
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    y = attn(x, mask=mask[None, None, None])
    assert_close(y[:, mask], attn(x[:, mask]), "real tokens")
    x[:, ~mask] = 1e6  # whatever stands at a hidden token
    assert_close(attn(x, mask=mask[None, None, None])[:, mask], y[:, mask], "other padding")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_weights_times_values_is_the_output(causal, kv_heads):
    attn = build(causal, kv_heads=kv_heads)
    x = draw(2, 9, 12)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :2] = False
    _, _, v = attn.project(x, None, None)
    with attn.capture() as passes:
        _, weights = attn(x, mask=mask, need_weights=True)
    assert_close(passes[0].heads, weights @ v, "heads")
    seen = weights.detach()
    assert float(seen.min()) == 0
    assert float((seen[1].sum(-1) - 1).abs().max()) < 1e-5
    assert float(seen[0, ..., :2].abs().max()) == 0


def test_no_weights_once_keys_are_gone():
    attn, cache = build(), zoo.LayerCache()
    x = draw(1, 4, 12)
    attn(x, cache=cache, need_weights=True)
    with pytest.raises(zoo.ZooError, match="no weights with a cache"):
        attn(x, cache=cache, need_weights=True)


def test_weights_stay_positive_on_rotated_queries_and_keys():
    _, weights = build(False, "linear+rope")(draw(2, 9, 12), need_weights=True)
    assert float(weights.detach().min()) > 0


def test_dropout_hides_keys_from_all_queries_and_keeps_the_mean():
    attn = build(causal=False, dim=4, heads=1, dropout=0.5)
    with torch.no_grad():
        attn.combine.proj.weight.copy_(torch.eye(4))
    x = draw(1, 6, 4)
    plain = attn.eval()(x)
    total = attn.train()(x.expand(5000, -1, -1))
    assert float((total.mean(0) - plain).detach().abs().max()) < 0.05
    _, _, v = attn.project(x, None, None)
    # One draw for each key: the outputs are weights times values with some values gone.
    _, weights = attn.eval()(x, need_weights=True)
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6).double()
    possible = torch.stack([weights[0, 0] @ (v[0, 0] * s[:, None]) for s in subsets])
    nearest = (possible - total[0]).abs().amax((1, 2)).min()
    assert float(nearest.detach()) < 1e-12


def test_cost_is_linear_in_the_length():
    attn = build(dtype=torch.float32)
    counts = []
    for length in (1024, 4096):
        x = draw(1, length, 12, dtype=torch.float32)
        counts.append(flops.count(lambda x=x: attn(x)))
    assert 0 < counts[1] <= 4 * counts[0]


def test_autocast_leaves_the_sums_alone():
    attn = build(dtype=torch.float32)
    x = draw(2, 9, 12, dtype=torch.float32)
    q, k, v = (t.bfloat16() for t in attn.project(x, None, None))
    expected = linear_attention_reference(q.float(), k.float(), v.float(), causal=True)
    with torch.autocast("cpu", torch.bfloat16), attn.capture() as passes:
        attn(x)
    assert_close(passes[0].heads, expected, "heads", dtype=torch.bfloat16)


def test_what_features_cannot_take_is_refused():
    with pytest.raises(zoo.CompatibilityError, match=r"scale=0\.3"):
        build(scale=0.3)
    with pytest.raises(zoo.CompatibilityError, match="bias"):
        build(spec="linear+alibi")
    with pytest.raises(zoo.CompatibilityError, match="sliding_window"):
        build(spec="linear+sliding_window")
    with pytest.raises(zoo.ZooError, match="hide keys only"):
        build()(draw(1, 5, 12), mask=torch.ones(5, 5, dtype=torch.bool))
