"""Rotary positions: both styles, partial, scaled and axial; routes and decoding."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.parts import Layout
from zoo.position import rope
from zoo.position.rope import RoPE, rope_frequencies, rope_permute, rope_reference
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [
    {},
    {"style": "interleaved"},
    {"base": 50.0, "scaling": "yarn", "factor": 2.0, "original_len": 16},
]
ROUTES = ("dense", "engine", "sdpa_strips", "sdpa")
STYLES = ("half", "interleaved")


def part(width, **options):
    return RoPE(Layout(2, 2, 2, 2, width, width), **options)


def turn(module, x, positions):
    """Turn x (B, H, N, D) as queries."""
    return module.rotate(x, x, positions, positions)[0]


def gradients(attn, x, **inputs):
    """Output and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    attn.zero_grad()
    y = attn(x, **inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in attn.named_parameters()}}


@pytest.mark.parametrize("style", STYLES)
def test_first_pair_turns_by_one_radian_a_token(style):
    turned = turn(part(2, style=style), torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([1]))
    assert_close(turned[0, 0, 0], torch.tensor([0.5403023, 0.8414710]))


def test_pairs_of_each_style():
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    quarter = math.pi / 2
    angles = torch.tensor([[quarter, 0.0]])
    assert_close(rope_reference(x, angles, "half")[0, 0, 0], torch.tensor([-3.0, 2.0, 1.0, 4.0]))
    assert_close(
        rope_reference(x, angles, "interleaved")[0, 0, 0], torch.tensor([-2.0, 1.0, 3.0, 4.0])
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("width", "fraction"), [(2, 1.0), (6, 1), (8, 0.5), (10, 0.2), (12, 1.0)])
def test_equals_reference(style, width, fraction):
    module = part(width, style=style, fraction=fraction, base=37.0)
    q = torch.randn(2, 4, 5, width, dtype=torch.float64)
    k = torch.randn(2, 2, 7, width, dtype=torch.float64)
    q_pos, k_pos = torch.tensor([0, 3, 2, 100, 5]), torch.randint(0, 60, (2, 7))
    turned = module.rotate(q, k, q_pos, k_pos)
    pairs = round(width * fraction) // 2
    w = 37.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    assert_close(turned[0], rope_reference(q, q_pos[:, None] * w, style))
    for b in range(2):
        expected = rope_reference(k[b : b + 1], k_pos[b][:, None] * w, style)
        assert_close(turned[1][b : b + 1], expected)


@pytest.mark.parametrize("style", STYLES)
def test_keeps_norms_and_leaves_position_zero(style):
    x = torch.randn(2, 3, 50, 16)
    turned = turn(part(16, style=style), x, torch.arange(50) * 17)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scores_depend_on_distance_alone(style, fraction):
    module = part(16, style=style, fraction=fraction)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    q, k = q.expand(1, 1, 60, 16), k.expand(1, 1, 60, 16)
    q, k = module.rotate(q, k, torch.arange(60), torch.arange(60))
    scores = (q @ k.transpose(-1, -2))[0, 0]
    for gap in (-40, -1, 0, 1, 25):
        diagonal = scores.diagonal(gap)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4
    assert scores[0].std() > 0.1


def test_angles_are_not_rounded_to_the_type_of_q():
    module = part(8)
    x = torch.randn(1, 1, 2, 8).bfloat16()
    positions = torch.tensor([256, 257])  # one number in bfloat16
    turned = turn(module, x, positions)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, turn(module, x.float(), positions).bfloat16())


def test_tables_are_made_once_for_q_and_k(monkeypatch):
    made = []
    plain = rope.rope_tables
    monkeypatch.setattr(rope, "rope_tables", lambda *args: made.append(1) or plain(*args))
    attn = zoo.create("rope", 8, 2)
    attn(torch.randn(1, 5, 8))
    assert len(made) == 1
    attn(torch.randn(1, 5, 8), torch.randn(1, 3, 8))
    assert len(made) == 3


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_styles_agree_after_permuting_the_weights(fraction):
    size = {"dim": 24, "heads": 3, "head_dim": 8, "kv_heads": 1, "causal": True, "bias": True}
    made = {
        style: zoo.create("rope", style=style, fraction=fraction, dtype=torch.float64, **size)
        for style in STYLES
    }
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for to, source in (STYLES, STYLES[::-1]):
        state = made[source].state_dict()
        for name in ("project.qkv.weight", "project.qkv.bias"):
            q, k, v = state[name].split((24, 8, 8))
            q, k = (rope_permute(t, len(t) // 8, to, fraction) for t in (q, k))
            state[name] = torch.cat((q, k, v))
        made[to].load_state_dict(state)
        assert_close(made[to](x), made[source](x))


def test_permuting_there_and_back():
    weight = torch.arange(16.0)[:, None]
    there = rope_permute(weight, 2, "half", 0.75)
    assert there[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 7, 8, 10, 12, 9, 11, 13, 14, 15]
    assert torch.equal(rope_permute(there, 2, "interleaved", 0.75), weight)


def test_linear_scaling_divides_positions():
    long = part(8, scaling="linear", factor=4)
    assert_close(long.angles(torch.tensor([4, 40])), part(8).angles(torch.tensor([1, 10])))


def test_ntk_scaling_keeps_the_fastest_and_slows_the_slowest():
    plain, scaled = rope_frequencies(16), rope_frequencies(16, scaling="ntk", factor=4.0)
    ratio = plain / scaled
    assert ratio[0] == 1
    assert_close(ratio[-1], torch.tensor(4.0))
    assert bool((ratio.diff() > 0).all())


def test_yarn_slows_pairs_by_how_often_they_turn():
    base, length, factor, width = 500.0, 1024, 4.0, 32
    plain = rope_frequencies(width, base, dtype=torch.float64)
    scaled = rope_frequencies(width, base, "yarn", factor, length, torch.float64)
    # Where on the axis of pairs 32 turns and 1 turn fall, by bisection on the number of turns.
    bounds = []
    for turns in (32, 1):
        low, high = -100.0, 100.0
        for _ in range(80):
            middle = (low + high) / 2
            many = length * base ** (-2 * middle / width) / (2 * math.pi) > turns
            low, high = (middle, high) if many else (low, middle)
        bounds.append(low)
    first, last = math.floor(bounds[0]), math.ceil(bounds[1])
    assert 0 < first < last < width // 2 - 1
    for m in range(width // 2):
        share = min(1.0, max(0.0, (m - first) / (last - first)))
        expected = plain[m] * (1 - share) + plain[m] / factor * share
        assert_close(scaled[m], expected)
    module = part(width, base=base, scaling="yarn", factor=factor, original_len=length)
    x = torch.randn(1, 1, 9, width)
    temperature = 0.1 * math.log(factor) + 1
    assert_close(turn(module, x, torch.arange(9)).norm(dim=-1), x.norm(dim=-1) * temperature)


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 256, 4096])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_equals_transformers(kind, length):
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    options = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0}
    if kind == "yarn":
        options["original_max_position_embeddings"] = length
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=4 * length,
        rope_parameters=options,
    )
    expected, temperature = utilities.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    original = length if kind == "yarn" else None
    assert_close(rope_frequencies(32, 500.0, kind, 4.0, original), expected)
    module = part(32, base=500.0, scaling=kind, factor=4.0, original_len=original)
    x = torch.ones(1, 1, 1, 32)
    assert_close(turn(module, x, torch.tensor([0])), x * temperature)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("prefix", "fraction"), [(0, 1.0), (1, 1.0), (2, 0.5)])
def test_grid_turns_by_row_and_column(style, prefix, fraction):
    module = part(16, style=style, grid=(3, 5), prefix=prefix, fraction=fraction, base=20.0)
    tokens = prefix + 15
    x = torch.randn(2, 3, tokens, 16, dtype=torch.float64)
    turned = turn(module, x, torch.arange(tokens))
    half = round(16 * fraction) // 4  # pairs of an axis
    w = 20.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.zeros(tokens, 2 * half, dtype=torch.float64)
    for row in range(3):
        for column in range(5):
            angles[prefix + row * 5 + column] = torch.cat((row * w, column * w))
    assert_close(turned, rope_reference(x, angles, style))
    assert torch.equal(turned[:, :, : prefix + 1], x[:, :, : prefix + 1])


def test_grid_positions_of_a_batch():
    module = part(8, grid=[2, 3])
    x = torch.randn(2, 2, 6, 8)
    order = torch.stack([torch.randperm(6) for _ in range(2)])
    straight = turn(module, x, torch.arange(6))
    for b in range(2):
        mixed = turn(module, x[:, :, order[b]], order)
        assert_close(mixed[b], straight[b][:, order[b]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", ["rope", "gqa+rope(style=interleaved,fraction=0.5)"])
def test_host_equals_brute_force(causal, spec):
    attn = zoo.create(spec, 24, 3, head_dim=8, causal=causal, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = attn.project(x, None, None)
    k, v = (t.repeat_interleave(3 // t.shape[1], 1) for t in (k, v))
    pairs = attn.position.width // 2
    angles = torch.arange(9)[:, None] * 10000.0 ** (
        -torch.arange(pairs, dtype=torch.float64) / pairs
    )
    q, k = (rope_reference(t, angles, attn.position.style) for t in (q, k))
    scores = q @ k.transpose(-1, -2) / 8**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    assert_close(attn(x), attn.combine(scores.softmax(-1) @ v, x))


@pytest.mark.parametrize("causal", [False, True])
def test_routes_agree_with_all_gradients(causal, many_strips):
    attn = zoo.create(
        "gqa+rope(fraction=0.5)", 24, 3, head_dim=8, causal=causal, dtype=torch.float64
    )
    x = torch.randn(3, 13, 24, dtype=torch.float64)
    found = {}
    for attn.route in ROUTES:
        found[attn.route] = gradients(attn, x)
    for route in ROUTES[1:]:
        for name, value in found["dense"].items():
            assert_close(found[route][name], value, f"{route} {name}", gradient=True)


def test_positions_shared_and_of_each_sample():
    attn = zoo.create("rope", 8, 2, causal=True, dtype=torch.float64)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    positions = torch.randint(0, 90, (2, 7))
    each = [attn(x[b : b + 1], positions=positions[b]) for b in range(2)]
    assert_close(attn(x, positions=positions), torch.cat(each))
    assert_close(attn(x, positions=torch.arange(7) + 500), attn(x))
    assert (attn(x, positions=torch.arange(7) * 2) - attn(x)).abs().max() > 1e-3


@pytest.mark.parametrize("spec", ["rope", "sliding_window(window=4)+rope(style=interleaved)"])
def test_decoding_equals_parallel(spec):
    attn = zoo.create(spec, 12, 3, causal=True, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cache = zoo.LayerCache()
    steps = [attn(x[:, :4], cache=cache)]
    steps += [attn(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
    assert_close(torch.cat(steps, 1), attn(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "halved"}, "did you mean 'half'"),
        ({"scaling": "yarm"}, "did you mean 'yarn'"),
        ({"base": 1.0}, "base=1.0 of 'rope' must be a number above 1"),
        ({"fraction": 0.4}, r"fraction=0.4 .* nearest allowed: fraction=0.5"),
        ({"fraction": 0}, r"fraction=0 .* nearest allowed: fraction=0.25"),
        ({"fraction": "all"}, "fraction='all'"),
        ({"fraction": 1.5}, r"fraction=1.5 .* nearest allowed: fraction=1"),
        ({"factor": 2.0}, "no effect with scaling='none'; allowed with scaling: linear"),
        ({"scaling": "linear", "factor": 0.5}, "factor=0.5 of 'rope' must be"),
        ({"scaling": "yarn", "factor": 2.0}, "original_len=None of 'rope' does not go with"),
        ({"scaling": "linear", "original_len": 8}, "original_len=8 of 'rope' does not go with"),
        ({"scaling": "yarn", "original_len": 0}, "original_len=0 of 'rope'"),
        ({"scaling": "ntk", "fraction": 0.25}, "needs 4 rotated channels"),
        ({"prefix": 1}, "prefix=1 of 'rope' has no effect without grid"),
        ({"prefix": -1}, "prefix=-1"),
        ({"grid": 4}, "grid=4 of 'rope' must be 2 whole numbers"),
        ({"grid": (4, 0)}, r"grid=\(4, 0\)"),
        ({"grid": (2, 2), "fraction": 0.25}, "multiple of 4"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        zoo.create("rope", 16, 2, **options)


def test_odd_heads_and_other_lengths_are_refused():
    with pytest.raises(ZooError, match=r"width 5 .* nearest allowed: fraction=0.8"):
        zoo.create("rope", 15, 3)
    with pytest.raises(ZooError, match="width 1 is too narrow"):
        zoo.create("rope", 3, 3)
    attn = zoo.create("rope", 16, 2, grid=(2, 3), prefix=1)
    attn(torch.randn(1, 7, 16))
    with pytest.raises(ZooError, match=r"grid=\(2, 3\) with prefix=1 takes 7 tokens, got 6"):
        attn(torch.randn(1, 6, 16))


def test_permuting_refuses_what_does_not_fit():
    with pytest.raises(ZooError, match="did you mean 'interleaved'"):
        rope_permute(torch.randn(8, 4), 2, "interleave")
    with pytest.raises(ZooError, match="8 rows of weight are not divisible by heads=3"):
        rope_permute(torch.randn(8, 4), 3)
    with pytest.raises(ZooError, match=r"nearest allowed: fraction=0\.5"):
        rope_permute(torch.randn(8, 4), 2, fraction=0.6)
