"""Sliding window: what is seen, the blocked route against the plain form, the rolling cache."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.host import engine
from zoo.ops import flops
from zoo.select.sliding_window import sliding_window_attention, sliding_window_reference
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{"window": 4}]


def build(causal, window, spec="sliding_window", **options):
    options = {"dim": 12, "heads": 3, "dtype": torch.float64, **options}
    return zoo.create(spec, causal=causal, window=window, **options)


def seen(attn, length):
    """Keys that each row gives weight to."""
    _, weights = attn(draw(1, length, attn.dim), need_weights=True)
    return [row.nonzero().flatten().tolist() for row in weights[0, 0].detach()]


def test_window_by_hand():
    assert seen(build(True, 3), 5) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    both_sides = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    assert seen(build(False, 2), 5) == both_sides
    assert seen(build(False, 3), 5) == both_sides  # 3 // 2 to either side
    assert seen(build(True, 1), 3) == [[0], [1], [2]] == seen(build(False, 1), 3)


@pytest.mark.parametrize("window", [9, 10, 40])
def test_a_window_over_all_is_plain_attention(window):
    x = draw(2, 9, 12)
    for causal in (False, True):
        # To both sides the window has to be twice as wide to reach from end to end.
        attn = build(causal, window if causal else 2 * window)
        plain = zoo.create("mha", 12, 3, causal=causal, dtype=torch.float64)
        plain.load_state_dict(attn.state_dict())
        assert_close(attn(x), plain(x), f"causal={causal}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "window", "block"),
    [
        (37, 5, 4),  # ragged tail
        (32, 4, 4),  # no tail
        (33, 8, 16),
        (29, 1, 4),
        (23, 6, 64),  # one block is too large
        (20, 9, 11),  # exactly one block
        (21, 2, 1),
    ],
)
def test_blocks_equal_reference(causal, length, window, block):
    q, k, v = (draw(2, 3, length, 4, seed=i).requires_grad_() for i in range(3))
    hidden = torch.rand(2, 1, 1, length, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[1, ..., : length // 2] = True  # whole windows without a key
    cotangent = draw(2, 3, length, 4, seed=9)
    for mask in (None, ~hidden):
        y = sliding_window_attention(q, k, v, window, causal, mask=mask, block=block)
        expected = sliding_window_reference(q, k, v, window, causal, mask)
        assert_close(y, expected, "output")
        found = torch.autograd.grad(y, (q, k, v), cotangent)
        due = torch.autograd.grad(expected, (q, k, v), cotangent)
        for name, a, b in zip("qkv", found, due, strict=True):
            assert_close(a, b, f"gradient of {name}", gradient=True)


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_routes_agree_at_odd_shapes(many_strips, causal, kv_heads):
    attn = build(causal, 5, kv_heads=kv_heads)
    x = draw(3, 19, 12)
    pairs = torch.rand(3, 1, 19, 19) < 0.7
    keys = zoo.padding_mask(torch.tensor([19, 8, 0]))
    cases = [{}, {"mask": keys}, {"mask": pairs}, {"bias": draw(1, 3, 19, 19)}]
    for inputs in cases:
        attn.route = "dense"
        expected = settle(attn, x, **inputs)
        attn.route = "auto"
        taken = attn.explain(x, **inputs)
        routes = ["engine", "sdpa_strips", *(["windowed"] if taken.route == "windowed" else [])]
        assert ("windowed" in routes) == (
            inputs.keys() <= {"mask"} and pairs is not inputs.get("mask")
        )
        for route in routes:
            attn.route = route
            for name, value in settle(attn, x, **inputs).items():
                what = f"{route} {list(inputs)} {name}"
                assert_close(value, expected[name], what, gradient=name != "output")


def test_the_fast_route_runs_on_many_blocks():
    attn = build(True, 16, dtype=torch.float32)
    x = draw(2, 700, 12, dtype=torch.float32)  # 4 blocks of 128 and a tail
    attn.route = "windowed"
    found = settle(attn, x)
    attn.route = "engine"
    for name, value in settle(attn, x).items():
        assert_close(found[name], value, name, gradient=name != "output")


def test_fast_route_and_why_not():
    x = draw(2, 9, 12)
    mask = torch.ones(2, 3, 1, 9, dtype=torch.bool)
    attn = build(True, 4)
    assert attn.explain(x).route == "windowed"
    assert "no more than two windows" in attn.explain(x[:, :8]).refused["windowed"]
    assert "bias" in attn.explain(x, bias=draw(9, 9)).refused["windowed"]
    assert "for all heads" in attn.explain(x, mask=mask).refused["windowed"]
    assert "bias" in build(True, 4, "sliding_window+alibi").explain(x).refused["windowed"]
    sparse = build(True, 4, "sliding_window+sparsemax").explain(x)
    assert "sparsemax" in sparse.refused["windowed"]
    cache = zoo.LayerCache()
    with torch.no_grad():
        attn(x, cache=cache)
    assert "cached" in attn.explain(draw(2, 12, 12), cache=cache).refused["windowed"]


@pytest.mark.parametrize("pieces", [[1] * 11, [7, 1, 3], [11], [2, 9]])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_decodes_with_a_rolling_cache(window, pieces):
    attn, cache = build(True, window), zoo.LayerCache()
    x = draw(2, 11, 12)
    with torch.no_grad():
        rows = [attn(piece, cache=cache) for piece in x.split(pieces, 1)]
        assert_close(torch.cat(rows, 1), attn(x), "decoded")
    assert cache.length == 11
    assert cache.get("k").shape[2] == min(window, 11)
    assert cache.get("positions").tolist() == list(range(11))[-window:]


def test_the_window_goes_by_index_whatever_the_positions():
    attn = build(True, 3, "sliding_window+rope")
    x = draw(1, 7, 12)
    far = torch.arange(7) * 100
    _, near_weights = attn(x, need_weights=True)
    _, far_weights = attn(x, positions=far, need_weights=True)
    assert torch.equal(near_weights > 0, far_weights > 0)
    assert float((near_weights - far_weights).detach().abs().max()) > 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_strips_hold_the_keys_of_their_windows_only(many_strips, causal):
    attn = build(causal, 6)
    back, ahead = (5, 0) if causal else (3, 3)
    x = draw(2, 40, 12)
    with torch.no_grad():
        call = attn.begin(x)
    found = list(engine.strips(call, attn.select))
    assert len(found) > 4
    for strip in found:
        assert strip.keys.start == max(0, strip.rows.start - back)
        assert strip.keys.stop == min(40, strip.rows.stop + ahead)


def test_cost_grows_with_the_length_and_not_its_square():
    attn = build(True, 32, dtype=torch.float32)
    counts = []
    for length in (1024, 2048):
        x = draw(1, length, 12, dtype=torch.float32)
        q, k, v = attn.project(x, None, None)
        counts.append(
            flops.count(lambda q=q, k=k, v=v: sliding_window_attention(q, k, v, 32, True))
        )
    assert 0 < counts[1] < 2.3 * counts[0]


def test_dropout_of_the_fast_route_keeps_the_mean():
    q, k = draw(1, 2, 4000, 4), draw(1, 2, 4000, 4, seed=1)
    v = torch.ones(1, 2, 4000, 4, dtype=torch.float64)
    y = sliding_window_attention(q, k, v, 16, True, dropout=0.5)
    assert float(y.std()) > 0.1
    assert abs(float(y.mean()) - 1) < 0.03


def test_reach_grows_with_the_depth():
    """After n layers of window W a token has seen n (W - 1) + 1 tokens."""
    layers = [build(True, 3) for _ in range(3)]
    x = draw(1, 12, 12).requires_grad_()
    y = x
    for layer in layers:
        y = layer(y)
    (gradient,) = torch.autograd.grad(y[0, -1].sum(), x)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 5 + [True] * 7


@pytest.mark.parametrize("window", [0, -3, 2.5, "wide", True])
def test_bad_window(window):
    with pytest.raises(zoo.ZooError, match="window="):
        build(True, window)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"block": 0}, "block=0"),
        ({"k": draw(2, 2, 8, 3)}, r"k of shape \(2, 2, 8, 3\)"),
        (
            {"mask": torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()},
            r"mask of shape \(2, 1, 9, 9\)",
        ),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, r"mask of shape \(2, 9\)"),
        ({"mask": torch.ones(2, 1, 1, 9)}, "float32"),
    ],
    ids=str,
)
def test_the_function_refuses_what_it_cannot_compute(change, message):
    q, k, v = (draw(2, 2, 9, 3, seed=i) for i in range(3))
    with pytest.raises(zoo.ZooError, match=message):
        sliding_window_attention(**{"q": q, "k": k, "v": v, "window": 3, "causal": True, **change})


def test_shapes_alone_pass_through():
    attn = zoo.create("sliding_window(window=3)", 12, 3, device="meta")
    assert attn(torch.empty(2, 40, 12, device="meta")).shape == (2, 40, 12)


def test_context_is_refused():
    attn = build(False, 4)
    with pytest.raises(zoo.ZooError, match="context"):
        attn(draw(1, 3, 12), draw(1, 5, 12))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_flex_by_name(monkeypatch, causal):
    from torch.nn.attention.flex_attention import flex_attention

    from zoo.select import _flex

    monkeypatch.setattr(_flex, "_compiled", lambda grid: flex_attention)
    attn = zoo.create("sliding_window", 64, 4, causal=causal, window=6, kv_heads=2)
    x = draw(2, 37, 64, dtype=torch.float32)
    attn.route = "flex"
    with pytest.raises(zoo.ZooError, match=r"flex.*no backward"):
        attn(x)
    with torch.no_grad():
        y = attn(x)
        attn.route = "dense"
        assert_close(y, attn(x), "flex")


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_by_name(causal):
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("zoo.kernels.neighborhood", reason="needs its kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attn = zoo.create("sliding_window", 32, 2, causal=causal, window=6, kv_heads=1, device=device)
    x = draw(1, 37, 32, dtype=torch.float32).to(device).requires_grad_()
    results = []
    for route in ("sliding_window_triton", "dense"):
        attn.route = route
        y = attn(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *attn.parameters()])])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(a, b, f"result {i}", gradient=i > 0, backend="triton")
