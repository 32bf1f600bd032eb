"""The host: its numbers against plain loops, its arguments, and everything it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from zoo.host.attention import Attention
from zoo.parts import Combine, Normalize, Position, Strip
from zoo.testing.subject import draw, settle, tiny_strips
from zoo.testing.tolerances import assert_close

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
    expected = host.eval()(x).detach()
    host.train().route = "engine" if strips else "auto"
    with torch.no_grad():
        mean = torch.stack([host(x) for _ in range(800)]).mean(0)
    assert float((mean - expected).square().mean().sqrt()) < 0.1 * float(expected.std())


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


class Biased(Position):
    """A bias of nothing."""

    biases = True

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return scores


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
        zoo.create(f"{__name__}:Picky+{__name__}:Biased", 8, 2)
    zoo.create(f"{__name__}:Picky", 8, 2)


def test_a_wide_head_and_an_odd_number_of_heads() -> None:
    host = zoo.create("mha", 16, 3, head_dim=7, dtype=torch.float64)
    x = draw(1, 5, 16)
    with torch.no_grad():
        assert_close(host(x), _loop(host, x))
    assert sum(p.numel() for p in host.parameters()) == 4 * 16 * 21


@pytest.mark.parametrize("name", zoo.list(kind="combine"))
def test_combinations_pass_on_the_meta_device(name: str) -> None:
    host = zoo.create(name, 16, 4, device="meta")
    assert host(torch.zeros(2, 5, 16, device="meta")).shape == (2, 5, 16)
