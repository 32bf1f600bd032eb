"""T5's bucketed bias: buckets, the bias in every route, decoding."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.host.engine import strips
from zoo.position.t5 import t5_buckets, t5_reference
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{}, {"buckets": 4, "max_distance": 5}]
ROUTES = ("dense", "engine", "sdpa_strips")
SIZES = [(32, 128), (8, 20), (4, 3), (6, 40), (10, 1000)]


def bucket(query, key, buckets, max_distance, causal):
    """Bucket of one pair, after the paper's words: one by one, then in growing ranges."""
    offset = 0
    if causal:
        distance = max(0, query - key)
    else:
        buckets //= 2
        distance = abs(query - key)
        offset = buckets if key > query else 0
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    # The released code works in float32, which decides where a distance on an edge falls.
    f32 = torch.tensor
    grown = f32(distance / exact).log() / f32(math.log(max_distance / exact)) * (buckets - exact)
    return offset + min(buckets - 1, exact + int(grown))


def gradients(attn, x, **inputs):
    """Output and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    attn.zero_grad()
    y = attn(x, **inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in attn.named_parameters()}}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), SIZES)
def test_buckets_equal_the_paper_one_by_one(causal, buckets, max_distance):
    distance = torch.arange(-300, 301)
    expected = [bucket(d, 0, buckets, max_distance, causal) for d in distance.tolist()]
    found = t5_buckets(distance, buckets, max_distance, causal)
    assert found.tolist() == expected
    # Every bucket is in use but the one for later keys at distance 0; further away never means
    # an earlier one.
    past = found[distance >= 0]
    used = set(range(buckets)) - (set() if causal else {buckets // 2})
    assert set(found.tolist()) == used or max_distance > 300
    assert bool((past.diff() >= 0).all())
    assert past[0] == 0


def test_buckets_of_t5_itself():
    causal = t5_buckets(torch.tensor([0, 15, 16, 127, 128, 9999, -4]), 32, 128, True)
    assert causal.tolist() == [0, 15, 16, 31, 31, 31, 0]
    both = t5_buckets(torch.tensor([0, 7, 8, 128, -1, -8, -128]), 32, 128, False)
    assert both.tolist() == [0, 7, 8, 15, 17, 24, 31]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), SIZES)
def test_buckets_equal_transformers(causal, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-2000, 2001)
    expected = t5.T5Attention._relative_position_bucket(
        -distance, bidirectional=not causal, num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(t5_buckets(distance, buckets, max_distance, causal), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_equals_brute_force(causal, route, scale, many_strips):
    attn = zoo.create(
        "t5(buckets=6,max_distance=9)", 12, 3, causal=causal, scale=scale, dtype=torch.float64
    )
    attn.route = route
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    q, k, v = attn.project(x, None, None)
    table = attn.position.table
    for positions in (torch.arange(11), torch.arange(11) * 2 + 30, torch.randint(0, 40, (2, 11))):
        scores = q @ k.transpose(-1, -2) * (scale or 0.5)
        for b, row in enumerate(positions.expand(2, 11)):
            for i in range(11):
                for j in range(11):
                    index = bucket(int(row[i]), int(row[j]), 6, 9, causal)
                    scores[b, :, i, j] = scores[b, :, i, j] + table[index]
        if causal:
            scores = scores.masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf)
        expected = attn.combine(scores.softmax(-1) @ v, x)
        assert_close(attn(x, positions=positions), expected)


def test_reference_looks_up_every_pair():
    scores, table = torch.zeros(1, 2, 3, 4), torch.randn(8, 2)
    q_pos, k_pos = torch.tensor([5, 6, 30]), torch.tensor([5, 0, 9, 29])
    found = t5_reference(scores, table, q_pos, k_pos, 20, causal=False)
    for i, query in enumerate(q_pos.tolist()):
        for j, key in enumerate(k_pos.tolist()):
            assert torch.equal(found[0, :, i, j], table[bucket(query, key, 8, 20, False)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_routes_agree_with_all_gradients(causal, batched, many_strips):
    attn = zoo.create("gqa+t5", 24, 6, kv_heads=3, causal=causal, buckets=8, dtype=torch.float64)
    x = torch.randn(3, 13, 24, dtype=torch.float64)
    inputs = {"mask": torch.rand(3, 1, 13, 13) > 0.2}
    if batched:
        inputs["positions"] = torch.randint(0, 200, (3, 13))
    found = {}
    for attn.route in ROUTES:
        found[attn.route] = gradients(attn, x, **inputs)
    assert found["dense"]["position.table"].abs().max() > 0
    for route in ("engine", "sdpa_strips"):
        for name, value in found["dense"].items():
            assert_close(found[route][name], value, f"{route} {name}", gradient=True)


def test_zero_table_is_plain_attention():
    attn, plain = zoo.create("t5", 12, 3), zoo.create("mha", 12, 3)
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if "position" not in k})
    torch.nn.init.zeros_(attn.position.table)
    x = torch.randn(2, 7, 12)
    assert_close(attn(x), plain(x))


@pytest.mark.parametrize("causal", [False, True])
def test_only_distances_matter(causal):
    attn = zoo.create("t5", 8, 2, causal=causal)
    x = torch.randn(2, 9, 8)
    assert torch.equal(attn(x), attn(x, positions=torch.arange(9) + 1000))


@pytest.mark.parametrize("batched", [False, True])
def test_term_alone_and_with_scores(batched):
    attn = zoo.create("differential+t5", 16, 2, causal=True)
    positions = torch.randint(0, 30, (2, 5)) if batched else torch.arange(5)
    call = attn.begin(torch.randn(2, 5, 16), positions=positions)
    (strip,) = strips(call, attn.select)
    scores = torch.randn(2, 4, 5, 5)
    term = attn.position.bias(strip, None)
    assert term.shape == (2 if batched else 1, 4, 5, 5)
    assert torch.equal(term[:, 0::2], term[:, 1::2])  # both maps of a head take its column
    assert not torch.equal(term[:, 0], term[:, 2])
    assert_close(attn.position.bias(strip, scores), scores + term)


@pytest.mark.parametrize("spec", ["t5", "sliding_window(window=4)+t5(buckets=4,max_distance=3)"])
def test_decoding_equals_parallel(spec):
    attn = zoo.create(spec, 12, 3, causal=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cache = zoo.LayerCache()
    steps = [attn(x[:, :4], cache=cache)]
    steps += [attn(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
    assert_close(torch.cat(steps, 1), attn(x))


def test_table_starts_normal_and_init_weights_draws_it_again():
    attn = zoo.create("t5", 256, 16, buckets=256, max_distance=999)
    table = attn.position.table.detach()
    assert abs(float(table.std()) - 1 / 16) < 0.003
    table.fill_(5.0)
    attn.init_weights()
    assert abs(float(table.std()) - 1 / 16) < 0.003


@pytest.mark.parametrize(
    ("causal", "options", "message"),
    [
        (True, {"buckets": 1}, r"buckets=1 of 't5' must be a whole .* of at least 2, where causal"),
        (False, {"buckets": 3}, r"buckets=3 .* at least 4 .*bidirectional"),
        (False, {"buckets": 7}, r"buckets=7 .* even .*nearest: 6, 8"),
        (True, {"buckets": 8.0}, "buckets=8.0"),
        (True, {"max_distance": 16}, "max_distance=16 of 't5' .* at least 17"),
        (False, {"max_distance": 8}, "max_distance=8 of 't5' .* at least 9"),
        (False, {"max_distance": "far"}, "max_distance='far'"),
    ],
)
def test_impossible_options_are_refused(causal, options, message):
    with pytest.raises(ZooError, match=message):
        zoo.create("t5", 8, 2, causal=causal, **options)
