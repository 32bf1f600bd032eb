"""Differential attention: golden values, groupings of keys, lambda, the fast route."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_files import read, under

import zoo
from zoo.models.language.decoder_lm import DecoderLM
from zoo.normalize.differential import (
    Differential,
    differential_attention_reference,
    initial_lambda,
    pair_keys,
)
from zoo.parts import Layout
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{}, {"kv_grouping": "official"}]
ROUTES = ("auto", "engine", "dense")


def build(spec="differential", heads=4, **options):
    options = {"dim": 8 * heads, "heads": heads, "dtype": torch.float64, **options}
    return zoo.create(spec, **options)


def golden_host(config, case, dim, route):
    """The layer of a case; its groups stand under the name of the case where there are any."""
    style, _, base = config["rope"].split()
    spec = (
        f"differential(kv_grouping=official, eps={config['eps']})"
        f"+rope(style={style}, base={float(base)})"
    )
    heads = config["num_heads"]
    facts = {"kv_heads": config.get(f"{case}_kv_heads", heads), "depth": config["depth"]}
    # Theirs is the width of a query, ours that of a value.
    facts["head_dim"] = 2 * config["head_dim"]
    return zoo.create(spec, dim, heads, causal=True, route=route, **facts)


def golden_cases(tensors, metadata):
    return [name.removesuffix(".y") for name in under(tensors, "out.") if name.endswith(".y")]


def compare_case(tensors, metadata, case, route):
    x = tensors[f"in.{case}.x"].clone().requires_grad_()
    attn = golden_host(metadata["config"], case, x.shape[-1], route)
    names = ("q_proj", "k_proj", "v_proj")
    own = {
        "combine.proj.weight": "out_proj.weight",
        "normalize.norm.weight": "subln.weight",
        **{f"normalize.lambda_{n}": f"lambda_{n}" for n in ("q1", "k1", "q2", "k2")},
    }

    def mapped(prefix):
        found = {key: tensors[f"{prefix}.{name}"] for key, name in own.items()}
        stacked = [tensors[f"{prefix}.{name}.weight"] for name in names]
        return {**found, "project.qkv.weight": torch.cat(stacked)}

    attn.load_state_dict(mapped(f"param.{case}"))
    y = attn(x)
    (y * tensors[f"in.{case}.cotangent"]).sum().backward()
    assert_close(y, tensors[f"out.{case}.y"], "output")
    assert_close(x.grad, tensors[f"grad.{case}.in.x"], "x", gradient=True)
    expected = mapped(f"grad.{case}.param")
    for name, parameter in attn.named_parameters():
        assert_close(parameter.grad, expected[name], name, gradient=True)
    if f"out.{case}.lambda_init" in tensors:
        init = torch.tensor([attn.normalize.lambda_init])
        assert_close(init, tensors[f"out.{case}.lambda_init"], "lambda_init")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", golden_cases(*read("baseline_diff")))
def test_golden(golden, case, route):
    compare_case(*golden("baseline_diff"), case, route)


def test_another_golden_file(other_golden):
    file = other_golden("baseline_diff")
    for case in golden_cases(*file):
        for route in ROUTES:
            compare_case(*file, case, route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("grouping", ["pair", "official"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_reference_for_every_grouping(kv_heads, grouping, causal, route):
    options = {"kv_heads": kv_heads, "causal": causal, "kv_grouping": grouping, "depth": 2}
    attn = build(**options)
    x = draw(2, 7, 32)

    def plainly(x):
        q, k, v = attn.project(x, None, None)
        part = attn.normalize
        y = differential_attention_reference(
            q, k, v, part.lambda_(), causal=causal, grouping=grouping
        )
        scale = y.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        return attn.combine(y * scale * part.norm.weight * (1 - part.lambda_init), x)

    attn.route = route
    found = settle(attn, x)
    attn.forward = plainly
    for name, value in settle(attn, x).items():
        assert_close(found[name], value, name, gradient=name != "output")


def test_groupings_differ_only_where_keys_are_shared():
    x = draw(2, 7, 32)
    for kv_heads in (4, 2):
        first = build(kv_heads=kv_heads)
        second = build(kv_heads=kv_heads, kv_grouping="official")
        second.load_state_dict(first.state_dict())
        same = torch.allclose(first(x), second(x))
        assert same == (kv_heads == 4)


def test_official_grouping_gives_both_maps_one_key_head():
    """The pitfall of the code: with H / G even, maps that share queries cancel but for lambda."""
    attn = build(kv_heads=2, kv_grouping="official")
    with torch.no_grad():
        q = attn.project.qkv.weight[:32].view(4, 2, 4, 32)
        q[:, 1] = q[:, 0]
    q, k, _ = attn.project(draw(1, 5, 32), None, None)
    _, weights = attn(draw(1, 5, 32), need_weights=True)
    keys = k.repeat_interleave(2, 1)[:, ::2]  # key heads 0, 0, 1, 1, 2, 2, 3, 3
    one = (q[:, ::2] @ keys.transpose(-1, -2) * attn.scale).softmax(-1)
    assert_close(weights, (1 - attn.normalize.lambda_()) * one, "weights")


def test_pair_keys_keeps_the_pairs_of_a_group():
    k = torch.arange(4.0).view(1, 4, 1, 1)
    assert pair_keys(k, 4).flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_difference_by_hand():
    part = build(heads=1).normalize
    log3 = math.log(3)
    scores = torch.tensor([[[[0.0, log3]], [[0.0, 0.0]]]], dtype=torch.float64)
    factor = part.lambda_().item()
    expected = torch.tensor([0.25 - 0.5 * factor, 0.75 - 0.5 * factor], dtype=torch.float64)
    assert_close(part(scores, None)[0, 0, 0], expected, "1:3 minus 1:1")


def test_lambda_by_hand():
    part = build(heads=1, depth=0).normalize
    assert part.lambda_init == pytest.approx(0.2)
    assert initial_lambda(3) == pytest.approx(0.8 - 0.6 * math.exp(-0.9))
    with torch.no_grad():
        for vector in (part.lambda_q1, part.lambda_k1, part.lambda_q2, part.lambda_k2):
            vector.zero_()
        part.lambda_q1[1], part.lambda_k1[1] = 2.0, 0.5
        part.lambda_q2[0], part.lambda_k2[0] = 1.0, -1.0
    assert part.lambda_().item() == pytest.approx(math.e - math.exp(-1) + 0.2)


def test_rows_sum_to_one_minus_lambda():
    attn = build(causal=True, depth=1)
    _, weights = attn(draw(2, 9, 32), need_weights=True)
    total = weights.sum(-1)
    assert_close(total, (1 - attn.normalize.lambda_()).expand_as(total), "sum of a row")
    assert float(weights.detach().min()) < 0


@pytest.mark.parametrize("causal", [False, True])
def test_lambda_zero_is_attention_with_wide_values_and_a_norm(causal):
    attn = build(causal=causal)
    part = attn.normalize
    with torch.no_grad():
        for vector in (part.lambda_q1, part.lambda_k1, part.lambda_q2, part.lambda_k2):
            vector.zero_()
        part.lambda_q1[0], part.lambda_k1[0] = 1.0, math.log(1 - part.lambda_init)
        part.norm.weight.copy_(draw(8))
    x = draw(2, 7, 32)
    q, k, v = attn.project(x, None, None)
    y = F.scaled_dot_product_attention(q[:, ::2], k[:, ::2], v, is_causal=causal)
    y = F.rms_norm(y, (8,), part.norm.weight, 1e-5) * (1 - part.lambda_init)
    assert_close(attn(x), attn.combine(y, x), "lambda = 0")


@pytest.mark.parametrize("grouping", ["pair", "official"])
@pytest.mark.parametrize("causal", [False, True])
def test_routes_agree_at_odd_shapes(many_strips, causal, grouping):
    attn = build(causal=causal, kv_heads=2, kv_grouping=grouping, head_dim=6)
    x = draw(3, 17, 32)
    cases = [{}]
    if not causal:
        keys = zoo.padding_mask(torch.tensor([17, 9, 0]))
        heads = torch.rand(3, 4, 1, 17) < 0.6
        cases += [{"mask": keys}, {"mask": heads}, {"bias": draw(1, 4, 17, 17, seed=3)}]
        cases += [{"context": draw(3, 5, 32, seed=4)}]
    for inputs in cases:
        attn.route = "dense"
        expected = settle(attn, x, **inputs)
        for route in ("engine", "pair_sdpa"):
            attn.route = route
            for name, value in settle(attn, x, **inputs).items():
                what = f"{route} {list(inputs)} {name}"
                assert_close(value, expected[name], what, gradient=name != "output")


@pytest.mark.parametrize("grouping", ["pair", "official"])
def test_decodes_as_in_parallel_with_grouped_keys(grouping):
    attn = build(causal=True, kv_heads=2, kv_grouping=grouping)
    x, cache = draw(2, 9, 32), zoo.LayerCache()
    with torch.no_grad():
        pieces = [attn(piece, cache=cache) for piece in x.split([4, 1, 1, 3], 1)]
        assert_close(torch.cat(pieces, 1), attn(x), "decoded")
    assert cache.get("k").shape == (2, 4, 9, 4), "the cache holds the groups, not their copies"


def test_fast_route_and_why_not():
    attn = build(causal=True)
    x = draw(2, 5, 32)
    assert attn.explain(x).route == "pair_sdpa"
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert "is_causal" in attn.explain(x, mask=mask).refused["pair_sdpa"]
    wide = build()
    bias, rows = draw(5, 5), torch.ones(5, 5, dtype=torch.bool)
    assert "not both" in wide.explain(x, mask=mask, bias=bias).refused["pair_sdpa"]
    assert "rows" in wide.explain(x, mask=rows).refused["pair_sdpa"]
    cache = zoo.LayerCache()
    with torch.no_grad():
        attn(x, cache=cache)
    assert "cached" in attn.explain(x, cache=cache).refused["pair_sdpa"]
    dropped = build(dropout=0.5).train()
    assert "dropout" in dropped.explain(x).refused["pair_sdpa"]
    windowed = build("differential+sliding_window(window=2)", causal=True)
    assert "sliding_window" in windowed.explain(x).refused["pair_sdpa"]
    assert "alibi" in build("differential+alibi").explain(x).refused["pair_sdpa"]


@pytest.mark.parametrize("position", ["alibi", "t5", "transformer_xl"])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_pairs_equal_tiled_pairs_under_parts_that_read_keys(position, causal):
    few = build(f"differential+{position}", kv_heads=2, causal=causal)
    many = build(f"differential+{position}", kv_heads=4, causal=causal)
    state = few.state_dict()
    q, k, v = state["project.qkv.weight"].split([few.project.sizes[i] for i in range(3)])
    pairs = k.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)  # a group holds a pair
    values = v.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict({**state, "project.qkv.weight": torch.cat([q, pairs, values])})
    x = draw(2, 7, 32)
    assert_close(few(x), many(x))
    if causal:
        cache = zoo.LayerCache()
        steps = [few(x[:, i : i + 1], cache=cache) for i in range(7)]
        assert_close(torch.cat(steps, 1), many(x))
        assert cache.get("k").shape[1] == 4


def test_depth_and_start_in_a_model():
    model = DecoderLM(11, dim=16, depth=3, heads=2, attention="differential")
    found = [block.attn.normalize.lambda_init for block in model.blocks]
    assert found == [initial_lambda(i) for i in range(3)]
    assert all(torch.equal(b.attn.normalize.norm.weight, torch.ones(8)) for b in model.blocks)
    part = Differential(Layout(1, 1, 1, 1, 20000, 4))
    assert part.lambda_k2.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, r"head_dim=7 of 'differential' must be an even .*6, 8"),
        ({"kv_grouping": "pairs"}, r"'pairs'.*did you mean 'pair'"),
        ({"eps": 0.0}, r"eps=0.0"),
        ({"depth": -1}, r"depth=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**options)
