"""ALiBi: slopes, the bias in every route, decoding."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.host.engine import strips
from zoo.parts import Normalize
from zoo.position.alibi import alibi_reference, alibi_slopes
from zoo.testing.tolerances import assert_close

ROUTES = ("dense", "engine", "sdpa_strips")


class Difference(Normalize):
    """Two maps of scores make the weights of one head."""

    def change_layout(self, layout):
        return layout.with_(
            score_heads=2 * layout.heads, k_heads=2 * layout.k_heads, qk_dim=layout.qk_dim // 2
        )

    def forward(self, scores, mask):
        scores = scores if mask is None else scores.masked_fill(~mask, -1e30)
        first, second = scores.softmax(-1).unflatten(1, (-1, 2)).unbind(2)
        return first - 0.5 * second


def gradients(attn, x, **inputs):
    """Output and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    attn.zero_grad()
    y = attn(x, **inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in attn.named_parameters()}}


def brute_force(attn, x, positions):
    """Softmax attention with the reference's bias, written out."""
    q, k, v = attn.project(x, None, None)
    k, v = (t.repeat_interleave(attn.heads // t.shape[1], 1) for t in (k, v))
    scores = torch.cat(
        [
            alibi_reference(scores[None], row, row)
            for scores, row in zip(
                q @ k.transpose(-1, -2) * attn.scale,
                positions.expand(x.shape[:2]),
                strict=True,
            )
        ]
    )
    if attn.causal:
        length = x.shape[1]
        scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    return attn.combine(scores.softmax(-1) @ v, x)


def test_slopes_of_eight_heads():
    assert alibi_slopes(8).tolist() == [1 / 2**h for h in range(1, 9)]


@pytest.mark.parametrize("heads", [1, 2, 4, 16, 64])
def test_slopes_of_a_power_of_two(heads):
    expected = [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    assert_close(alibi_slopes(heads, torch.float64), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("heads", [3, 5, 6, 7, 12, 20])
def test_slopes_between_powers_of_two(heads):
    power = max(n for n in (1, 2, 4, 8, 16) if n < heads)
    first, finer = alibi_slopes(power), alibi_slopes(2 * power)
    expected = torch.cat((first, finer[::2][: heads - power]))
    assert_close(alibi_slopes(heads), expected)
    assert len(alibi_slopes(heads).unique()) == heads


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_equals_brute_force(causal, heads, route, many_strips):
    attn = zoo.create("alibi", 12, heads, causal=causal, route=route, dtype=torch.float64)
    x = torch.randn(3, 11, 12, dtype=torch.float64)
    each = torch.stack([torch.randperm(40)[:11] for _ in range(3)])
    for positions in (torch.arange(11), torch.arange(11) * 3 + 7, each):
        assert_close(attn(x, positions=positions), brute_force(attn, x, positions))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_routes_agree_with_all_gradients(causal, batched, many_strips):
    attn = zoo.create("gqa+alibi", 24, 6, kv_heads=3, causal=causal, dtype=torch.float64)
    x = torch.randn(3, 13, 24, dtype=torch.float64)
    inputs = {"mask": torch.rand(3, 1, 13, 13) > 0.2}
    if batched:
        inputs["positions"] = torch.randint(0, 50, (3, 13))
    found = {}
    for attn.route in ROUTES:
        found[attn.route] = gradients(attn, x, **inputs)
    for route in ("engine", "sdpa_strips"):
        for name, value in found["dense"].items():
            assert_close(found[route][name], value, f"{route} {name}", gradient=True)


def test_only_distances_matter():
    attn = zoo.create("alibi", 8, 2, causal=True)
    x = torch.randn(2, 9, 8)
    assert torch.equal(attn(x), attn(x, positions=torch.arange(9) + 1000))


def test_far_keys_get_less_than_near_ones():
    attn = zoo.create("alibi", 16, 8)
    same = torch.ones(1, 9, 16)
    weights = attn(same, need_weights=True)[1][0]
    ratio = weights[:, 0, 1:] / weights[:, 0, :-1]
    assert_close(ratio, (-alibi_slopes(8)).exp()[:, None].expand(-1, 8))
    assert_close(weights, weights.flip(-1, -2))  # equally to both sides


@pytest.mark.parametrize("batched", [False, True])
def test_term_alone_and_with_scores(batched):
    attn = zoo.create("alibi", 12, 3)
    positions = torch.randint(0, 30, (2, 5)) if batched else torch.arange(5)
    call = attn.begin(torch.randn(2, 5, 12), positions=positions)
    (strip,) = strips(call, attn.select)
    scores = torch.randn(2, 3, 5, 5)
    term = attn.position.bias(strip, None)
    assert term.shape == (2 if batched else 1, 3, 5, 5)
    assert_close(attn.position.bias(strip, scores), scores + term)


def test_two_maps_of_a_head_share_its_slope():
    attn = zoo.create(f"{__name__}:Difference+alibi", 12, 3)
    assert attn.layout.score_heads == 6
    call = attn.begin(torch.randn(1, 4, 12))
    (strip,) = strips(call, attn.select)
    term = attn.position.bias(strip, None)
    assert_close(term[0, :, 3, 0], -3 * alibi_slopes(3).repeat_interleave(2))


def test_half_precision_tells_large_distances_apart():
    attn = zoo.create("alibi", 16, 8, dtype=torch.bfloat16)
    x = torch.zeros(1, 3, 16, dtype=torch.bfloat16)
    call = attn.begin(x, positions=torch.tensor([0, 1000, 1001]))
    (strip,) = strips(call, attn.select)
    term = attn.position.bias(strip, attn.score(strip))
    assert_close(term[0, :, 0, 2] - term[0, :, 0, 1], -alibi_slopes(8))
    assert attn(x).dtype == torch.bfloat16


@pytest.mark.parametrize("spec", ["alibi", "sliding_window(window=4)+alibi"])
def test_decoding_equals_parallel(spec):
    attn = zoo.create(spec, 12, 3, causal=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cache = zoo.LayerCache()
    steps = [attn(x[:, :4], cache=cache)]
    steps += [attn(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
    assert_close(torch.cat(steps, 1), attn(x))


def test_holds_no_state_and_moves_from_meta():
    attn = zoo.create("alibi", 12, 3)
    assert not list(attn.position.state_dict())
    assert not list(attn.position.buffers())
    moved = zoo.create("alibi", 12, 3, device="meta").to_empty(device="cpu")
    moved.load_state_dict(attn.state_dict())
    x = torch.randn(2, 5, 12)
    assert torch.equal(moved(x), attn(x))
