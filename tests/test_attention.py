"""The host: its numbers against plain loops, its arguments, and everything it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_subject import draw, settle, tiny_strips
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn

import zoo
from zoo.attention import Attention
from zoo.parts import Combine, Normalize, Position, Strip

NAN = math.nan


def _loop(
    host: Attention,
    x: Tensor,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention with the default parts, one query of one head at a time, in plain Python."""
    weight, out = host.project.qkv.weight, host.combine.proj.weight
    d, group = host.head_dim, host.heads // host.kv_heads
    z = x if context is None else context
    y = torch.zeros(*x.shape[:2], host.heads * d, dtype=x.dtype)
    for b in range(x.shape[0]):
        for h in range(host.heads):
            kv = host.heads + h // group
            for i in range(x.shape[1]):
                q = weight[h * d : (h + 1) * d] @ x[b, i]
                scores, values = [], []
                for j in range(z.shape[1]):
                    if host.causal and j > i:
                        continue
                    if (
                        mask is not None
                        and not mask.expand(x.shape[0], host.heads, -1, -1)[
                            b, h, min(i, mask.shape[2] - 1), min(j, mask.shape[3] - 1)
                        ]
                    ):
                        continue
                    k = weight[kv * d : (kv + 1) * d] @ z[b, j]
                    score = float(q @ k) / math.sqrt(d)
                    if bias is not None:
                        score += float(bias[0, h, i, j])
                    scores.append(score)
                    at = kv + host.kv_heads
                    values.append(weight[at * d : (at + 1) * d] @ z[b, j])
                total = sum(math.exp(s - max(scores)) for s in scores)
                for score, value in zip(scores, values, strict=True):
                    w = math.exp(score - max(scores)) / total
                    y[b, i, h * d : (h + 1) * d] += w * value
    return y @ out.T


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 8),
    keys=st.none() | st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (3, 3), (6, 2)]),
    width=st.integers(1, 4),
    causal=st.booleans(),
    masked=st.sampled_from([None, "keys", "pairs", "heads", "nothing"]),
    biased=st.booleans(),
    strips=st.booleans(),
    seed=st.integers(0, 9),
)
def test_default_combination_equals_a_loop_over_queries(
    batch: int,
    rows: int,
    keys: int | None,
    heads: tuple[int, int],
    width: int,
    causal: bool,
    masked: str | None,
    biased: bool,
    strips: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    causal = causal and keys is None
    host = Attention(
        5, heads[0], kv_heads=heads[1], head_dim=width, causal=causal, dtype=torch.float64
    )
    x = draw(batch, rows, 5, seed=seed)
    context = None if keys is None else draw(batch, keys, 5, seed=seed + 20)
    many = rows if keys is None else keys
    shapes = {
        "keys": (batch, 1, 1, many),
        "pairs": (1, 1, rows, many),
        "heads": (batch, heads[0], rows, many),
        "nothing": (1, 1, 1, 1),
    }
    mask = None
    if masked is not None:
        mask = draw(*shapes[masked], seed=seed + 40) > (9 if masked == "nothing" else -0.4)
    bias = draw(1, heads[0], rows, many, seed=seed + 60) if biased else None
    with torch.no_grad():
        expected = _loop(host, x, context, mask, bias)
        if strips:
            with tiny_strips():
                found = host(x, context, mask=mask, bias=bias)
        else:
            found = host(x, context, mask=mask, bias=bias)
    assert_close(found, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_default_combination_equals_torch_multihead_attention(causal: bool) -> None:
    ours = zoo.create("mha", 16, 4, causal=causal, bias=True, dtype=torch.float64)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.project.qkv.weight,
            "in_proj_bias": ours.project.qkv.bias,
            "out_proj.weight": ours.combine.proj.weight,
            "out_proj.bias": ours.combine.proj.bias,
        }
    )
    x = draw(2, 9, 16)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1) if causal else None
    expected, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    found, ours_weights = ours(x, need_weights=True)
    assert_close(found, expected)
    assert_close(ours_weights, weights)


def test_a_hand_computed_example() -> None:
    host = zoo.create("mha", 2, 1, dtype=torch.float64)
    with torch.no_grad():
        # q = k = x ln 2 (with the scale), v = x, no output projection
        eye = torch.eye(2, dtype=torch.float64)
        host.project.qkv.weight.copy_(torch.cat([eye * math.log(2) * math.sqrt(2), eye, eye]))
        host.combine.proj.weight.copy_(eye)
    y, w = host(torch.eye(2, dtype=torch.float64)[None], need_weights=True)
    third = torch.tensor([[2, 1], [1, 2]], dtype=torch.float64) / 3
    assert_close(w[0, 0], third)
    assert_close(y[0], third)


def test_grouped_heads_equal_tiled_heads() -> None:
    for groups in (1, 2, 4):
        grouped = zoo.create("mha", 16, 4, kv_heads=groups, causal=True, dtype=torch.float64)
        full = zoo.create("mha", 16, 4, causal=True, dtype=torch.float64)
        state = grouped.state_dict()
        q, k, v = state["project.qkv.weight"].split((16, 4 * groups, 4 * groups))
        k, v = (w.unflatten(0, (groups, 4)).repeat_interleave(4 // groups, 0) for w in (k, v))
        state["project.qkv.weight"] = torch.cat([q, k.flatten(0, 1), v.flatten(0, 1)])
        full.load_state_dict(state)
        x = draw(2, 9, 16)
        assert_close(grouped(x), full(x), f"{groups} groups")
        names = {1: "mqa", 2: "gqa(kv_heads=2)", 4: "mha"}
        named = zoo.create(names[groups], 16, 4, causal=True, dtype=torch.float64)
        named.load_state_dict(grouped.state_dict())
        assert_close(named(x), grouped(x), names[groups])


@pytest.mark.parametrize(
    ("spec", "heads", "expected"),
    [("mha", 8, 8), ("gqa", 8, 2), ("gqa", 4, 1), ("gqa", 12, 3), ("gqa", 6, 1), ("mqa", 8, 1)],
)
def test_default_number_of_key_heads(spec: str, heads: int, expected: int) -> None:
    host = zoo.create(spec, heads * 2, heads)
    assert host.kv_heads == expected
    assert host.project.qkv.weight.shape == ((heads + 2 * expected) * 2, heads * 2)


def test_cross_attention_is_self_attention_on_the_own_sequence() -> None:
    host = zoo.create("mha", 16, 4, bias=True, dtype=torch.float64)
    x = draw(2, 9, 16)
    assert_close(host(x, x), host(x))
    wide = zoo.create("mha", 16, 2, head_dim=5, dtype=torch.float64)
    assert wide(x, x[:, :3]).shape == x.shape


def test_cached_context_is_projected_once() -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64, qk_norm=True)
    x, context = draw(2, 5, 16), draw(2, 7, 16, seed=1)
    cache = zoo.LayerCache()
    with torch.no_grad():
        steps = [host(x[:, :2], context, cache=cache)]
        size = cache.nbytes
        # What is cached stays, so the context given later is not looked at again.
        steps.append(host(x[:, 2:], torch.full_like(context, NAN), cache=cache))
        assert_close(torch.cat(steps, 1), host(x, context))
    assert cache.nbytes == size == 2 * (2 * 4 * 7 * 4) * 8


def test_qk_norm_is_an_rms_norm_of_each_head() -> None:
    host = zoo.create("mha", 16, 4, qk_norm=True, dtype=torch.float64)
    with torch.no_grad():
        host.q_norm.weight.copy_(draw(4))
        host.k_norm.weight.copy_(draw(4, seed=1))
    x = draw(2, 7, 16)
    q, k, v = host.project(x, None, None)
    q, k = (
        t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for t, norm in ((q, host.q_norm), (k, host.k_norm))
    )
    y = F.scaled_dot_product_attention(q, k, v)
    assert_close(host(x), host.combine(y, x))
    found = settle(host, x)
    assert float(found["q_norm.weight"].abs().max()) > 0


def test_scale() -> None:
    x = draw(1, 5, 16)
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    assert host.scale == 0.5
    uniform = copy.deepcopy(host)
    uniform.scale = 0.0
    _, w = uniform(x, need_weights=True)
    assert_close(w, torch.full_like(w, 0.2))
    assert zoo.create("mha", 16, 4, scale=0.25).scale == 0.25
    assert zoo.create("mha", 16, 4, head_dim=16).scale == 0.25


@pytest.mark.parametrize("strips", [False, True])
def test_dropout_keeps_the_mean(strips: bool) -> None:
    host = zoo.create("mha", 8, 2, dropout=0.5, dtype=torch.float64)
    x = draw(1, 6, 8)
    expected = host.eval()(x)
    host.train().route = "engine" if strips else "auto"
    with torch.no_grad():
        mean = torch.stack([host(x) for _ in range(800)]).mean(0)
    assert float((mean - expected).square().mean().sqrt()) < 0.1 * float(expected.std())


# --- head gates ----------------------------------------------------------------------------------


def test_a_gate_of_zero_removes_a_head() -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    x = draw(2, 7, 16)
    removed = copy.deepcopy(host)
    with torch.no_grad():
        removed.combine.proj.weight[:, 4:8] = 0
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert_close(host(x, head_gate=gate), removed(x))
    kept = host(x)
    host.head_gate = gate
    assert_close(host(x), removed(x))
    assert_close(host(x, head_gate=torch.ones_like(gate)), kept)


def test_gates_for_samples_and_tokens() -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    x, gate = draw(2, 7, 16), draw(2, 4, 7, seed=1)
    with host.capture() as passes:
        y = host(x, head_gate=gate)
    assert_close(y, host.combine(passes[0].heads, x))
    with host.capture() as plain:
        host(x)
    assert_close(passes[0].heads, plain[0].heads * gate[..., None])
    constant = gate[:, :, :1].expand(2, 4, 7)
    assert_close(host(x, head_gate=constant), host(x, head_gate=gate[:, :, 0]))


def test_a_gate_gets_its_gradient() -> None:
    host = zoo.create("mha", 16, 4)
    gate = torch.ones(4, requires_grad=True)
    host(torch.randn(1, 3, 16), head_gate=gate).square().sum().backward()
    assert gate.grad is not None
    assert bool((gate.grad != 0).all())


@pytest.mark.parametrize("shape", [(3,), (1, 4), (4, 2), (2, 4, 6), (2, 4, 7, 1), (2, 1, 7), ()])
def test_gates_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    host = zoo.create("mha", 16, 4)
    with pytest.raises(zoo.ZooError, match=r"head_gate of shape .*\(4,\), \(2, 4\), \(2, 4, 7\)"):
        host(torch.randn(2, 7, 16), head_gate=torch.ones(shape))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10}, "dim=10 is not divisible by heads=4; nearest allowed heads=5"),
        ({"dim": 0}, "dim=0 must be a whole number"),
        ({"dim": 16.0}, "dim=16.0 must be a whole number"),
        ({"dim": True}, "dim=True must be a whole number"),
        ({"heads": 0}, "heads=0 must be a whole number"),
        ({"heads": -2}, "heads=-2 must be a whole number"),
        ({"heads": "4"}, "heads='4' must be a whole number"),
        ({"head_dim": 0}, "head_dim=0 must be a whole number"),
        ({"head_dim": 2.5}, "head_dim=2.5 must be a whole number"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"kv_heads": 0}, "kv_heads=0 must divide heads=4"),
        ({"kv_heads": 8}, "kv_heads=8 must divide heads=4"),
        ({"kv_heads": 2.0}, "kv_heads=2.0"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
        ({"dropout": -0.1}, "dropout=-0.1 must lie in"),
        ({"spec": "mha(kv_heads=3)"}, "kv_heads=3 must divide heads=4"),
        ({"spec": "mqa", "kv_heads": 2}, "mqa has kv_heads=1, not 2"),
        ({"spec": "mha+gqa"}, "both fill the socket 'project'"),
        ({"spec": "sofmax"}, "unknown mechanism 'sofmax'.*'softmax'"),
    ],
)
def test_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        Attention(**{"dim": 16, "heads": 4, **arguments})


@pytest.mark.parametrize(
    ("name", "value"), [("max_len", 0), ("max_len", -1), ("depth", -1), ("scale", "big")]
)
def test_facts_are_checked_at_construction(name: str, value: Any) -> None:
    with pytest.raises(zoo.ZooError, match=name):
        Attention(16, 4, **{name: value})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.zeros(2, 7, 12)}, r"x of shape \(2, 7, 12\) must be \(batch, tokens, dim=16"),
        ({"x": torch.zeros(7, 16)}, r"x of shape \(7, 16\)"),
        ({"context": torch.zeros(2, 5, 12)}, r"context of shape \(2, 5, 12\)"),
        ({"context": torch.zeros(3, 5, 16)}, "context has batch 3, but x has batch 2"),
        ({"mask": torch.zeros(7, 7)}, "mask has dtype torch.float32; allowed: torch.bool.*'bias'"),
        ({"mask": torch.zeros(7, 7, dtype=torch.int64)}, "mask has dtype torch.int64"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "mask has rank 1; allowed: 2"),
        ({"mask": torch.ones(2, 7, 7, dtype=torch.bool)}, "mask has rank 3"),
        (
            {"mask": torch.ones(2, 7, dtype=torch.bool)},
            r"mask of shape \(2, 7\) does not fit.*mask\[:, None, None, :\]",
        ),
        ({"mask": torch.ones(7, 5, dtype=torch.bool)}, r"mask of shape \(7, 5\)"),
        ({"mask": torch.ones(3, 1, 1, 7, dtype=torch.bool)}, r"mask of shape \(3, 1, 1, 7\)"),
        ({"mask": torch.ones(2, 2, 7, 7, dtype=torch.bool)}, r"mask of shape \(2, 2, 7, 7\)"),
        ({"mask": torch.ones(2, 4, 6, 7, dtype=torch.bool)}, r"mask of shape \(2, 4, 6, 7\)"),
        ({"bias": torch.zeros(7, 7, dtype=torch.bool)}, "bias of dtype torch.bool"),
        ({"bias": torch.zeros(7)}, "bias .*rank 1"),
        ({"bias": torch.zeros(2, 7, 7)}, "bias .*rank 3"),
        ({"bias": torch.zeros(5, 7)}, r"bias of shape \(5, 7\) does not fit"),
        ({"positions": torch.arange(6)}, "positions of shape"),
        ({"positions": torch.arange(7.0)}, "positions .*int64"),
        ({"positions": torch.zeros(3, 7, dtype=torch.int64)}, "positions of shape"),
        ({"context_positions": torch.arange(7)}, "context_positions"),
    ],
)
def test_refused_inputs(inputs: dict[str, Tensor], message: str) -> None:
    host = zoo.create("mha", 16, 4)
    with pytest.raises(zoo.ZooError, match=message):
        host(**{"x": torch.zeros(2, 7, 16), **inputs})


def test_causal_attention_refuses_a_context() -> None:
    host = zoo.create("mha", 16, 4, causal=True)
    with pytest.raises(zoo.ZooError, match="context given to causal attention"):
        host(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16))


@pytest.mark.parametrize(
    "shape", [(7, 7), (1, 1, 7, 7), (2, 1, 1, 7), (1, 4, 7, 7), (2, 4, 7, 7), (1, 1, 1, 1)]
)
def test_masks_and_biases_of_every_allowed_shape(shape: tuple[int, ...]) -> None:
    host = zoo.create("mha", 16, 4, dtype=torch.float64)
    x, mask, bias = draw(2, 7, 16), draw(*shape, seed=1) > -0.5, draw(*shape, seed=2)
    full = (2, 4, 7, 7)
    expected = host(x, mask=mask.expand(full), bias=bias.expand(full))
    assert_close(host(x, mask=mask, bias=bias), expected)


# --- positions -----------------------------------------------------------------------------------


class Seen(Position):
    """Remembers the positions that it was given."""

    rotates = True
    biases = True
    embeds = True

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        self.embedded = positions
        return x

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        self.rotated = (q_pos, k_pos)
        return q, k

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        assert scores is not None
        self.distance = strip.distance()
        return scores


SEEN = f"{__name__}:Seen"


def test_positions_count_on_from_the_cache() -> None:
    host, cache = zoo.create(SEEN, 8, 2, causal=True), zoo.LayerCache()
    with torch.no_grad():
        host(torch.randn(1, 4, 8), cache=cache)
        host(torch.randn(1, 2, 8), cache=cache)
    part = host.position
    assert part.embedded.tolist() == [4, 5]
    assert [p.tolist() for p in part.rotated] == [[4, 5], [4, 5]]
    assert part.distance.tolist() == [[4, 3, 2, 1, 0, -1], [5, 4, 3, 2, 1, 0]]


def test_positions_given_reach_the_parts() -> None:
    host = zoo.create(SEEN, 8, 2)
    given, others = torch.tensor([[3, 1], [7, 7]]), torch.tensor([5, 6, 9])
    x, context = torch.randn(2, 2, 8), torch.randn(2, 3, 8)
    host(x, context, positions=given, context_positions=others)
    assert torch.equal(host.position.rotated[0], given)
    assert torch.equal(host.position.rotated[1], others)
    assert host.position.distance.shape == (2, 1, 2, 3)
    assert host.position.distance[0, 0].tolist() == [[-2, -3, -6], [-4, -5, -8]]
    host(x, context)
    assert host.position.rotated[1].tolist() == [0, 1, 2]


def test_positions_of_samples_are_cached() -> None:
    host, cache = zoo.create(SEEN, 8, 2, causal=True), zoo.LayerCache()
    steps = torch.tensor([[0, 1, 2], [5, 6, 7]])
    with torch.no_grad():
        host(torch.randn(2, 2, 8), positions=steps[:, :2], cache=cache)
        host(torch.randn(2, 1, 8), positions=steps[:, 2:], cache=cache)
        assert host.position.distance.tolist() == [[[[2, 1, 0]]], [[[2, 1, 0]]]]
        cache.select(torch.tensor([1]))
        host(torch.randn(1, 1, 8), positions=torch.tensor([[8]]), cache=cache)
    assert host.position.distance.tolist() == [[[[3, 2, 1, 0]]]]


# --- capture, weights, explain -------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_capture_holds_what_was_computed(causal: bool) -> None:
    host = zoo.create("gqa(kv_heads=2)", 16, 4, causal=causal, dtype=torch.float64)
    x = draw(2, 7, 16)
    with host.capture() as passes:
        y = host(x)
        host(x[:, :3])
    assert [p.x.shape[1] for p in passes] == [7, 3]
    first = passes[0]
    assert first.x is x
    assert first.norm_input is None
    _, weights = host(x, need_weights=True)
    assert first.pattern is not None
    assert_close(first.pattern, weights)
    _, _, v = host.project(x, None, None)
    assert_close(first.heads, first.pattern @ v.repeat_interleave(2, 1))
    assert_close(host.combine(first.heads, x), y)


@pytest.mark.usefixtures("many_strips")
def test_weights_through_strips_equal_weights_at_once() -> None:
    host = zoo.create("mha", 16, 4, causal=True, dtype=torch.float64)
    x, mask = draw(3, 11, 16), draw(3, 4, 11, 11, seed=1) > 0
    _, weights = host(x, mask=mask, need_weights=True)
    q, k, _ = host.project(x, None, None)
    allowed = mask & torch.ones(11, 11, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~allowed, -math.inf)
    assert_close(weights, scores.softmax(-1).nan_to_num(0.0))


def test_weights_while_decoding_name_all_keys() -> None:
    host, cache = zoo.create("mha", 16, 4, causal=True, dtype=torch.float64), zoo.LayerCache()
    x = draw(2, 6, 16)
    with torch.no_grad():
        _, full = host(x, need_weights=True)
        host(x[:, :4], cache=cache)
        _, last = host(x[:, 4:], cache=cache, need_weights=True)
    assert_close(last, full[:, :, 4:])


def test_a_mask_while_decoding_may_name_all_keys() -> None:
    host, cache = zoo.create("mha", 16, 4, causal=True, dtype=torch.float64), zoo.LayerCache()
    x, mask = draw(2, 6, 16), draw(2, 1, 6, 6, seed=1) > -0.5
    with torch.no_grad():
        expected = host(x, mask=mask)
        first = host(x[:, :4], mask=mask[:, :, :4, :4], cache=cache)
        rest = host(x[:, 4:], mask=mask[:, :, 4:], cache=cache)
    assert_close(torch.cat([first, rest], 1), expected)


def test_repr_and_names() -> None:
    host = zoo.create("gqa+none", 16, 4, causal=True)
    assert "'gqa', dim=16, heads=4, causal=True" in repr(host)
    assert host.part_names == {
        **{"project": "gqa", "position": "none", "score": "dot", "select": "all"},
        **{"normalize": "softmax", "combine": "concat"},
    }
    assert [part.kind for part in host.socket_parts()] == list(host.part_names)
    assert host.traits == zoo.Traits()


# --- what parts ask of the host ------------------------------------------------------------------


class Special(Combine):
    """Starts where its paper says, and not where a model's generic start puts it."""

    special_init = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(heads))
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, 3.0)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out((y * self.gate[:, None, None]).transpose(1, 2).flatten(2))


class Picky(Normalize):
    """Works with sums of positions that rotate only."""

    def incompatible(self, host: Attention) -> str | None:
        if host.position.biases:
            return f"picky cannot work with {host.part_names['position']!r}"
        return None

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.softmax(-1)


def test_init_weights_restores_special_starts() -> None:
    host = zoo.create(f"{__name__}:Special", 8, 2)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.zero_()
    host.init_weights()
    assert host.combine.gate.tolist() == [3.0, 3.0]
    assert not host.project.qkv.weight.any(), "parts without a special start are left alone"


def test_parts_refuse_each_other_by_name() -> None:
    with pytest.raises(zoo.CompatibilityError, match="picky cannot work with"):
        zoo.create(f"{__name__}:Picky+{SEEN}", 8, 2)
    zoo.create(f"{__name__}:Picky", 8, 2)


def test_a_wide_head_and_an_odd_number_of_heads() -> None:
    host = zoo.create("mha", 16, 3, head_dim=7, dtype=torch.float64)
    x = draw(1, 5, 16)
    assert_close(host(x), _loop(host, x).detach())
    assert sum(p.numel() for p in host.parameters()) == 4 * 16 * 21
