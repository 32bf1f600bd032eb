"""Contextual positions: golden values, gates by hand, strips against the paper's form, decoding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_files import read, under
from torch._dynamo.exc import Unsupported

import zoo
from zoo.errors import CompatibilityError, ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.parts import repeat_heads
from zoo.position import _cope_strips as fast
from zoo.position._cope_strips import cope_attention
from zoo.position.cope import CoPE, cope_attention_reference, position_logits
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [
    {},
    {"npos": 3},
    {"npos": 4, "sep_key": True},
    {"npos": 4, "val_gates": True, "nodiv": True},
    {"npos": 3, "with_rel": True},
]
ROUTES = ("auto", "engine", "dense", "reference")


@pytest.fixture
def tiny(monkeypatch):
    """Many strips of few rows, few samples at once, and positions counted in small steps."""
    monkeypatch.setattr(fast, "ROWS", 5)
    monkeypatch.setattr(fast, "KEYS", 3)
    monkeypatch.setattr(fast, "LOT", 200)


def make(spec="cope", heads=4, **options):
    """Causal host in float64 with positions that are not zero."""
    options = {"dim": 6 * heads, "max_len": 20, "dtype": torch.float64, **options}
    attn = zoo.create(spec, heads=heads, causal=True, **options)
    torch.nn.init.normal_(attn.position.embedding)
    return attn


def nope(attn, **options):
    """The same layer without positions."""
    plain = zoo.create("mha", attn.dim, attn.heads, causal=True, dtype=torch.float64, **options)
    state = attn.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def variants(tensors, metadata):
    return list(metadata["config"]["variants"])


def options_of(config, variant):
    """Ours for those of the official code."""
    wanted = config["variants"][variant]
    if isinstance(wanted, str):
        assert wanted == "cope defaults"
        return {}
    ours = {"cope_sep_key": "sep_key", "cope_val_gates": "val_gates", "cope_nodiv": "nodiv"}
    options = {ours[name]: value for name, value in wanted.items() if name != "pos_emb"}
    return options | ({"with_rel": True} if wanted.get("pos_emb") == "cope+rel" else {})


def compare_variant(tensors, metadata, variant, route):
    config = metadata["config"]
    options = options_of(config, variant)
    facts = {"dim": tensors["in.x"].shape[-1], "head_dim": config["head_dim"], "bias": True}
    facts |= {"npos": config["npos"], "max_len": config["seq"], "route": route}
    attn = make("cope", config["nheads"], **facts, **options)

    def mapped(prefix):
        own = under(tensors, f"{prefix}.")
        found = {"position.embedding": own["attn.pos_emb"][0]}
        for kind in ("weight", "bias"):
            stacked = [own[f"proj_{name}.{kind}"] for name in ("query", "key", "val")]
            found[f"project.qkv.{kind}"] = torch.cat(stacked)
            found[f"combine.proj.{kind}"] = own[f"proj_out.{kind}"]
            if options.get("sep_key"):
                found[f"position.gate_key.{kind}"] = own[f"proj_key_cope.{kind}"]
        if options.get("with_rel"):  # there the last column is distance 0
            found["position.relative"] = own["attn.rel_pos_emb.emb"][0].flip(1).t()
        return found

    attn.load_state_dict(mapped(f"param.{variant}"))
    x = tensors["in.x"].clone().requires_grad_()
    y, weights = attn(x, need_weights=True)
    assert_close(weights, tensors[f"out.{variant}.attn"], "weights")
    assert_close(y, tensors[f"out.{variant}.y"], "output")
    (y * tensors[f"in.{variant}.cotangent"]).sum().backward()
    assert_close(x.grad, tensors[f"grad.{variant}.in.x"], "x", gradient=True)
    expected = mapped(f"grad.{variant}.param")
    for name, parameter in attn.named_parameters():
        assert_close(parameter.grad, expected[name], name, gradient=True)


def compare_core(tensors, metadata):
    config = metadata["config"]
    heads, length, width = (config[name] for name in ("nheads", "seq", "head_dim"))

    def split(name):  # (B H, N, ..), samples first
        return tensors[name].unflatten(0, (config["batch"], heads))

    q, k, v = (split(f"in.core.{name}") for name in "qkv")
    embedding, causal = tensors["param.core.pos_emb"][0], tensors["in.mask"].bool()
    expected = split("out.core.y")
    y = cope_attention_reference(q, k, v, embedding, mask=causal)
    assert_close(y, expected, "reference")
    assert_close(cope_attention(q, k, v, embedding), expected, "strips")
    # With z_in = n the interpolated logit is the position itself, of at most all tokens.
    gates = q @ k.transpose(-1, -2) / math.sqrt(width)
    count = torch.arange(length + 2, dtype=torch.float64)[None]
    places = position_logits(torch.ones_like(q[..., :1]), gates, count, causal)
    assert_close(places, split("out.core.positions_unclamped"), "positions")
    padded = tensors["in.core.pad"].bool()
    mask = causal & ~padded[:, None, None] | torch.eye(length, dtype=torch.bool)
    y = cope_attention_reference(q, k, v, embedding, mask=mask)
    expected = split("out.core.y_pad")
    assert_close(y, expected, "reference, padded")
    real = ~padded[:, None, :, None].expand(-1, heads, -1, width)
    y = cope_attention(q, k, v, embedding, keys=~padded)
    assert_close(y[real], expected[real], "strips, padded")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("variant", variants(*read("cope")))
def test_golden(golden, variant, route, many_strips):
    compare_variant(*golden("cope"), variant, route)


def test_golden_core(golden):
    compare_core(*golden("cope"))


def test_another_golden_file(other_golden, many_strips):
    file = other_golden("cope")
    for variant in variants(*file):
        for route in ROUTES:
            compare_variant(*file, variant, route)
    compare_core(*file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nodiv", [False, True])
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize(
    ("groups", "npos", "lot"),
    [(1, 2, 50), (2, 4, 200), (4, 9, 1000), (2, 40, 50)],  # 50 cuts groups between their heads
)
def test_strips_equal_reference(
    groups, npos, lot, own_keys, nodiv, padded, dtype, tiny, monkeypatch
):
    monkeypatch.setattr(fast, "LOT", lot)
    given = {
        "q": draw(3, 4, 23, 6, dtype=dtype),
        "k": draw(3, groups, 26, 6, seed=1, dtype=dtype),
        "v": draw(3, groups, 26, 5, seed=2, dtype=dtype),
        "e": draw(6, npos, seed=3, dtype=dtype),
    }
    if own_keys:
        given["g"] = draw(3, groups, 26, 6, seed=4, dtype=dtype)
    mask, keys = torch.ones(23, 26, dtype=torch.bool).tril(3), None
    if padded:
        keys = torch.ones(3, 26, dtype=torch.bool)
        keys[0, :9] = keys[1, 7] = keys[1, 20:] = False  # rows 0 to 5 of sample 0 see nothing
        mask = mask & keys[:, None, None]

    def run(attend):
        x = {name: value.clone().requires_grad_() for name, value in given.items()}
        y = attend(x)
        y.backward(draw(*y.shape, seed=5, dtype=dtype))
        return {"y": y, **{name: value.grad for name, value in x.items()}}

    def reference(x):
        k, v, g = (repeat_heads(x[n], 4) if n in x else None for n in "kvg")
        return cope_attention_reference(x["q"], k, v, x["e"], mask=mask, gate_k=g, nodiv=nodiv)

    def strips(x):
        shared = {"gate_k": x.get("g"), "keys": keys, "nodiv": nodiv}
        return cope_attention(x["q"], x["k"], x["v"], x["e"], **shared)

    found, expected = run(strips), run(reference)
    for name, value in expected.items():
        assert_close(found[name], value, name, gradient=name != "y")


SPECS = [
    "cope(npos=4)",
    "cope(npos=4, sep_key=True)",
    "cope(npos=4, val_gates=True)",
    "cope(npos=4, nodiv=True)",
    "cope(npos=4, with_rel=True)",
    "cope(npos=3, nodiv=True, sep_key=True, with_rel=True)",
    "mqa+cope",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("masked", ["", "keys", "pairs"])
def test_routes_agree_with_all_gradients(spec, masked, tiny, many_strips):
    attn = make(spec)
    x = draw(3, 19, 24)
    inputs = {}
    if masked == "keys":
        inputs["mask"] = torch.ones(3, 1, 1, 19, dtype=torch.bool)
        inputs["mask"][0, ..., :4] = inputs["mask"][2, ..., 11:] = False
    if masked == "pairs":
        inputs["mask"] = draw(3, 4, 19, 19) > -0.8
    attn.route = "reference"
    expected = settle(attn, x, **inputs)
    assert "position.embedding" in expected
    for attn.route in ("auto", "engine", "dense"):
        found = settle(attn, x, **inputs)
        for name, value in expected.items():
            assert_close(found[name], value, f"{attn.route}: {name}", gradient=name != "output")


def test_strips_are_taken_and_say_why_not():
    x, keys = draw(2, 9, 24), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    for spec in ("cope", "cope(npos=3)", "gqa(kv_heads=2)+cope(sep_key=True)"):
        assert make(spec).explain(x).route == "cope_strips"
        assert make(spec).explain(x, mask=keys).route == "cope_strips"
    reasons = {
        "cope(val_gates=True)": "val_gates",
        "cope(with_rel=True)": "with_rel",
        "differential+cope": "differential",
        "sliding_window(window=4)+cope": "sliding_window",
    }
    for spec, reason in reasons.items():
        assert reason in make(spec).explain(x).refused["cope_strips"]
    attn = make(dropout=0.5)
    assert "dropout" in attn.explain(x).refused["cope_strips"]
    assert attn.eval().explain(x).route == "cope_strips"
    pairs = make().explain(x, mask=keys.expand(2, 1, 9, 9))
    assert "keys only" in pairs.refused["cope_strips"]
    assert "bias" in make().explain(x, bias=draw(9, 9)).refused["cope_strips"]


@pytest.mark.parametrize("sizes", [(8, 1), (3, 2), (2, 4), (1, 8), (1, 32), (4, 8)])
@pytest.mark.parametrize("length", [1, 100, 512, 2048, 4096])
def test_lots_stay_small_however_many_heads_share_keys(sizes, length):
    groups, repeats = sizes
    q = torch.empty(groups, repeats, length, 0)
    pieces, (lot, rows) = fast._pieces(q, None, length)
    assert lot * rows * length <= fast.LOT * min(2, repeats)
    if repeats == 1:
        assert rows == min(fast.ROWS, length)
        assert lot == min(groups, fast.LOT // (rows * length))
    seen = torch.zeros(groups, repeats, length)
    for piece in pieces:
        seen[piece.cut] += 1
        assert len(piece.queries(q)) <= lot
        assert piece.queries(q).shape[1] <= rows
    assert (seen == 1).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("spec", ["cope", "mqa+cope(npos=4, sep_key=True)"])
def test_nothing_in_nothing_out(spec, shape):
    attn, x = make(spec, route="engine"), draw(*shape, 24)
    for inputs in ({}, {"mask": torch.ones(1, 1, 1, shape[1], dtype=torch.bool)}):
        attn.route = "engine"
        expected = settle(attn, x, **inputs)
        attn.route = "auto"
        found = settle(attn, x, **inputs)
        for name, value in expected.items():
            assert_close(found[name], value, name)
    y = cope_attention(x[:, None], draw(shape[0], 1, 7, 24), draw(shape[0], 1, 7, 3), draw(24, 4))
    assert y.shape == (shape[0], 1, shape[1], 3)


@pytest.mark.parametrize("spec", ["cope(npos=4)", "gqa(kv_heads=2)+cope(npos=4, sep_key=True)"])
def test_torch_func(spec):
    attn, x = make(spec), draw(3, 9, 24)
    assert attn.explain(x).route == "cope_strips"
    params = dict(attn.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(attn, params, (x,)).square().sum()

    whole = torch.func.grad(loss)(params, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x[:, None])
    attn.route = "engine"
    samples = [torch.autograd.grad(loss(params, y), list(params.values())) for y in x[:, None]]
    for name, *grads in zip(params, *samples, strict=True):
        assert_close(each[name], torch.stack(grads), f"each: {name}", gradient=True)
        assert_close(whole[name], sum(grads), f"all: {name}", gradient=True)


@pytest.mark.parametrize("broken", ["k", "gate_k"])
def test_nan_stays_in_the_rows_that_see_it(broken, tiny):
    given = {name: draw(2, 2, 23, 6, seed=s) for s, name in enumerate(("q", "k", "v", "gate_k"))}
    if broken == "k":
        del given["gate_k"]
    # With so many positions no gate is beyond the last.
    given["embedding"], mask = draw(6, 25, seed=4), torch.ones(23, 23, dtype=torch.bool).tril()
    clean = cope_attention(**given)
    given[broken][0, 1, 12, 3] = torch.nan
    for y in (cope_attention(**given), cope_attention_reference(**given, mask=mask)):
        assert y[0, 1, 12:].isnan().all()
        y[0, 1, 12:] = clean[0, 1, 12:]
        assert_close(y, clean)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", ["cope(npos=4)", "cope(npos=4, sep_key=True, nodiv=True)"])
def test_a_token_of_nan_breaks_no_other_sample(spec, route, many_strips):
    attn, x = make(spec, route=route), draw(2, 12, 24)
    expected = settle(attn, x)["output"]
    x[0, 7, 5] = torch.nan
    x.requires_grad_()
    y, weights = attn(x, need_weights=True)
    assert weights[0, :, :7].isfinite().all()
    assert y[0, 7:].isnan().all()
    assert_close(y[1], expected[1])
    y[1].sum().backward()
    assert x.grad[1].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("nodiv", [False, True])
@pytest.mark.parametrize("sep_key", [False, True])
def test_any_scale(sep_key, nodiv, scale):
    attn = make(f"cope(npos=4, nodiv={nodiv}, sep_key={sep_key})", scale=scale)
    x = draw(2, 9, 24)
    assert attn.explain(x).route == "cope_strips"
    found = settle(attn, x)
    attn.route = "reference"
    for name, value in settle(attn, x).items():
        assert_close(found[name], value, name, gradient=name != "output")


def test_older_keys_need_no_position_of_their_own(monkeypatch):
    """A row's keys count one half each, so npos - 1 = 3 is reached by the sixth."""
    widths = []
    place = fast._Piece.place

    def spy(piece, scores, table, near, work):
        widths.append((near, scores.shape[2]))
        place(piece, scores, table, near, work)

    monkeypatch.setattr(fast._Piece, "place", spy)
    monkeypatch.setattr(fast, "ROWS", 4)
    monkeypatch.setattr(fast, "KEYS", 1)
    q, k = torch.zeros(1, 1, 16, 2), draw(1, 1, 16, 2, dtype=torch.float32)
    cope_attention(q, k, k, torch.zeros(2, 4))
    # The oldest row of a strip begins three keys later than the newest.
    assert widths == [(4, 4), (8, 8), (9, 12), (9, 16)]


def test_older_keys_may_have_the_largest_scores(tiny):
    q, k = torch.ones(1, 1, 24, 2), draw(1, 1, 24, 2, dtype=torch.float32)
    k[:, :, 3] = 300.0
    v, e = draw(1, 1, 24, 2, seed=1, dtype=torch.float32), torch.ones(2, 4)
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    assert_close(cope_attention(q, k, v, e), cope_attention_reference(q, k, v, e, mask=mask))


def test_position_by_hand():
    """Gates 1/4, 1/2, 3/4 for the keys of one query, oldest first; z = (10, 20, 40)."""
    odds = torch.tensor([[[[1 / 3, 1.0, 3.0]]]], dtype=torch.float64)
    z = torch.tensor([[10.0, 20.0, 40.0]], dtype=torch.float64)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    # Positions 3/2, 5/4, 3/4.
    expected = torch.tensor([[[[30.0, 25.0, 17.5]]]], dtype=torch.float64)
    assert_close(position_logits(one, odds.log(), z, None), expected)
    # Without the middle key the oldest stands at 1, a whole number, with nothing to interpolate.
    mask = torch.tensor([True, False, True])
    found = position_logits(one, odds.log(), z, mask)
    assert_close(found[..., [0, 2]], torch.tensor([[[[20.0, 17.5]]]], dtype=torch.float64))
    # With two embeddings everything beyond 1 shares the last.
    found = position_logits(one, odds.log(), z[:, :2], None)
    assert_close(found, torch.tensor([[[[20.0, 20.0, 17.5]]]], dtype=torch.float64))


@pytest.mark.parametrize("route", ROUTES)
def test_two_tokens_by_hand(route):
    """Query 1 sees itself at position g_11 and key 0 at g_10 + g_11."""
    attn = zoo.create("cope(npos=3)", 1, 1, causal=True, dtype=torch.float64, route=route)
    with torch.no_grad():
        attn.project.qkv.weight[:] = torch.tensor([[1.0], [1.0], [1.0]])
        attn.combine.proj.weight.fill_(1.0)
        attn.position.embedding[:] = torch.tensor([[1.0, 3.0, -2.0]])
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)

    def gate(s):
        return 1 / (1 + math.exp(-s))

    near, far = gate(4), gate(4) + gate(2)
    b_near = 2 * (1 + 2 * near)
    b_far = 2 * (3 - 5 * (far - 1))
    w = 1 / (1 + math.exp(2 + b_far - 4 - b_near))
    assert attn(x)[0, 0].item() == pytest.approx(1.0)
    assert attn(x)[0, 1].item() == pytest.approx(2 * w + (1 - w))


@pytest.mark.parametrize("route", ROUTES)
def test_slopes_at_whole_positions(route):
    """Gate keys of zero make gates of 1/2: six keys stand at 3, 5/2, 2, 3/2, 1, 1/2, of 0 to 3."""
    attn = zoo.create(
        "cope(npos=4, sep_key=True)", 1, 1, causal=True, dtype=torch.float64, route=route
    )
    e = torch.tensor([1.0, 3.0, -2.0, 5.0], dtype=torch.float64)
    with torch.no_grad():
        attn.project.qkv.weight.fill_(1.0)
        attn.combine.proj.weight.fill_(1.0)
        attn.position.gate_key.weight.zero_()
        attn.position.embedding[:] = e
    x = draw(1, 6, 1)
    attn(x)[0, -1].backward()
    places, tokens, query = torch.arange(6, 0, -1) / 2, x[0, :, 0], x[0, -1, 0]
    below = places.long()
    step = F.pad(e.diff(), (0, 1))[below]  # to the right; there is nothing beyond the last
    weights = (query * (tokens + e[below] + (places - below) * step)).softmax(0)
    if route != "auto":
        step = step.masked_fill(places == below, 0.0)
    per_place = weights * (tokens - weights @ tokens) * query * step
    # A gate moves its own key and all older ones; its slope is 1/4, of a logit query * token * 0.
    expected = (per_place.cumsum(0) * query * tokens / 4).sum()
    assert_close(attn.position.gate_key.weight.grad, expected.view(1, 1), gradient=True)


@pytest.mark.parametrize("route", ROUTES)
def test_zero_embeddings_are_no_positions(route):
    attn = zoo.create("cope", 24, 4, causal=True, max_len=20, dtype=torch.float64, route=route)
    assert not attn.position.embedding.any()
    x = draw(2, 13, 24)
    assert_close(attn(x), nope(attn)(x))


@pytest.mark.parametrize("route", ROUTES)
def test_one_embedding_is_no_position(route):
    attn = make("cope(npos=1)", route=route)
    x = draw(2, 13, 24)
    assert_close(attn(x), nope(attn)(x))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sign", [1, -1])
def test_shut_and_open_gates(sign, route):
    """Open gates count every token: a learned bias q_i . E[i - j + 1]; shut ones count none."""
    attn = make("cope(npos=9, sep_key=True)", route=route, bias=True)
    with torch.no_grad():  # queries share a direction that only the gates look at
        attn.project.qkv.weight.view(3, 4, 6, 24)[:2, :, 0] = 0
        attn.project.qkv.bias.view(3, 4, 6)[0, :, 0] = 1
        attn.project.qkv.bias.view(3, 4, 6)[1, :, 0] = 0
        attn.position.gate_key.weight.zero_()
        attn.position.gate_key.bias.view(4, 6)[:] = 0
        attn.position.gate_key.bias.view(4, 6)[:, 0] = sign * 1000
    x = draw(2, 13, 24)
    q, k, v = attn.project(x, None, None)
    scores = q @ k.transpose(-1, -2)
    if sign > 0:
        distance = torch.arange(13)[:, None] - torch.arange(13)
        place = (distance + 1).clamp(0, 8).expand(2, 4, -1, -1)
        scores = scores + (q @ attn.position.embedding).gather(-1, place)
    hidden = torch.ones(13, 13, dtype=torch.bool).triu(1)
    weights = (scores * attn.scale).masked_fill(hidden, -torch.inf).softmax(-1)
    assert_close(attn(x), attn.combine(weights @ v, x))


@pytest.mark.parametrize("route", ["auto", "engine"])
def test_bfloat16_counts_beyond_256(route):
    """With open gates the last query of 300 tells keys at even places from those at odd ones."""
    attn = zoo.create("cope", 2, 1, causal=True, max_len=300, route=route)
    with torch.no_grad():
        attn.project.qkv.weight.copy_(torch.tensor([8.0, 8, 8, 8, 0, 0])[:, None] * torch.eye(2)[0])
        attn.position.embedding[0] = torch.arange(301) % 2
    attn = attn.to(torch.bfloat16)
    _, weights = attn(torch.ones(1, 300, 2, dtype=torch.bfloat16), need_weights=True)
    even, odd = weights[0, 0, -1, ::2], weights[0, 0, -1, 1::2]  # places 300, 298, ...; 299, ...
    assert (even < 0.01 * odd).all()  # exp(-8 / sqrt(2)) = 0.0035 but for rounding
    assert (odd > 0.9 / 150).all()


def test_half_precision_strips_compute_in_float32(tiny):
    q, k, v = (draw(2, 4, 19, 8, seed=s, dtype=torch.bfloat16) for s in range(3))
    e = draw(8, 5, seed=3, dtype=torch.bfloat16)
    exact = cope_attention(q.float(), k.float(), v.float(), e.float())
    y = cope_attention(q, k, v, e)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())

    def gradients(autocast):
        given = [x.float().requires_grad_() for x in (q, k, v, e)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = cope_attention(*given)
            assert torch.equal(y, exact)
            y.square().sum().backward()  # inside, where autocast holds for the backward pass too
        return [x.grad for x in given]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["cope(npos=8)", "cope(npos=8, with_rel=True)"])
def test_a_whole_step_under_autocast(attention):
    model = DecoderLM(11, dim=32, depth=2, heads=2, attention=attention, max_len=16)
    tokens = torch.arange(18).view(2, 9) % 11
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["cope", "cope(npos=4, with_rel=True)"])
def test_meta_device(attention):
    options = {"dim": 32, "depth": 3, "heads": 2, "max_len": 16, "device": "meta"}
    model = DecoderLM(11, attention=attention, **options)
    logits = model(torch.zeros(1, 5, dtype=torch.long, device="meta"))
    assert logits.is_meta
    assert logits.shape == (1, 5, 11)


@pytest.mark.parametrize("spec", ["cope(npos=4, sep_key=True)", "cope(npos=4, val_gates=True)"])
def test_windows_drop_the_gates_keys_too(spec):
    attn = make(f"sliding_window(window=4)+{spec}").eval()
    x = draw(2, 13, 24)
    with torch.no_grad():
        expected = attn(x)
        for pieces in ([1] * 13, [5, 1, 4, 3]):
            cache, rows = zoo.LayerCache(), []
            for size in pieces:
                rows.append(attn(x[:, cache.length : cache.length + size], cache=cache))
            assert_close(torch.cat(rows, 1), expected, f"decoded in pieces of {pieces}")
    keys = cache.get("cope_gate_k")
    assert keys is None if "val" in spec else keys.shape[2] == 4


@pytest.mark.parametrize("spec", ["cope(npos=4)", "cope(npos=4, sep_key=True)"])
def test_strips_take_a_prefill_on_cached_keys(spec, tiny):
    attn = make(spec)
    x = draw(2, 17, 24)
    with torch.no_grad():
        expected = attn(x)
        cache = zoo.LayerCache()
        first = attn(x[:, :6], cache=cache)
        assert attn.explain(x[:, 6:], cache=cache).route == "cope_strips"
        assert_close(torch.cat((first, attn(x[:, 6:], cache=cache)), 1), expected)


def test_gate_keys_are_laid_out_as_the_normalizer_lays_out_keys():
    """With the projection of the keys for its own, gates of keys' own are the usual ones."""
    for spec in ("differential", "talking_heads"):
        attn = make(f"{spec}+cope(npos=4, sep_key=True)", kv_heads=2)
        other = make(f"{spec}+cope(npos=4)", kv_heads=2)
        state = attn.state_dict()
        layout = attn.layout
        sizes = [n * layout.qk_dim for n in (layout.score_heads, layout.k_heads)]
        state["position.gate_key.weight"] = state["project.qkv.weight"][sizes[0] : sum(sizes)]
        attn.load_state_dict(state)
        other.load_state_dict({n: value for n, value in state.items() if "gate_key" not in n})
        x = draw(2, 9, 24)
        assert_close(attn(x), other(x), spec)


def test_gates_do_not_come_from_other_scores():
    """A score that is no dot product leaves the gates alone."""
    attn = make("neural+cope(npos=4)")
    x = draw(2, 7, 24)
    q, k, _ = attn.project(x, None, None)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    gates = q @ k.transpose(-1, -2) * attn.scale
    term = position_logits(q * attn.scale, gates, attn.position.embedding, mask)
    _, weights = attn(x, need_weights=True)
    plain = zoo.create("neural", 24, 4, causal=True, dtype=torch.float64)
    state = attn.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    _, expected = plain(x, bias=term, need_weights=True)
    assert_close(weights, expected)


def test_shared_embeddings_are_one_parameter():
    def embeddings(spec, **layers):
        model = DecoderLM(11, dim=8, heads=2, depth=3, max_len=6, attention=spec, layers=layers)
        return [m.embedding for m in model.modules() if isinstance(m, CoPE)]

    first, *others = embeddings("cope(npos=3, shared=True)")
    assert len(others) == 2
    assert all(other is first for other in others)
    assert len(set(embeddings("cope(npos=3)"))) == 3
    first, other, alone = embeddings("cope(npos=3, shared=True)", last="cope(npos=8)")
    assert other is first
    assert alone.shape == (4, 8)


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ("cope(npos=4, shared=True)", "cope(npos=8, shared=True)", "npos=8.*npos=4"),
        ("cope(npos=4)", "cope(npos=4, shared=True)", "shared=True.*shared=False"),
        (
            "cope(npos=4, shared=True)",
            "differential+cope(npos=4, shared=True)",
            "width 2.*width 4",
        ),
    ],
)
def test_only_layers_of_the_same_settings_share(first, other, message):
    with pytest.raises(CompatibilityError, match=message):
        DecoderLM(11, dim=8, heads=2, depth=3, attention=other, layers={"first": first})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": draw(2, 4, 8, 6)}, "8 queries.*7 keys.*at most"),
        ({"q": draw(2, 3, 5, 6)}, "k has 2 heads.*divisor of the 3"),
        ({"q": draw(4, 5, 6)}, r"q of shape \(4, 5, 6\)"),
        ({"k": draw(2, 2, 7, 5)}, r"k of shape \(2, 2, 7, 5\); allowed: \(2, 2, 7, 6\)"),
        ({"v": draw(2, 2, 6, 3)}, r"v of shape \(2, 2, 6, 3\); allowed: \(2, 2, 7, 3\)"),
        ({"v": draw(2, 1, 7, 3)}, r"v of shape .*allowed: \(2, 2, 7, 3\)"),
        ({"gate_k": draw(2, 4, 7, 6)}, r"gate_k of shape .*allowed: \(2, 2, 7, 6\)"),
        ({"embedding": draw(5, 4)}, r"embedding of shape \(5, 4\); allowed: \(6, 4\)"),
        ({"embedding": draw(6, 0)}, r"embedding of shape \(6, 0\); allowed: \(6, 1\)"),
        ({"keys": torch.ones(2, 7)}, r"keys of dtype torch.float32.*torch.bool"),
        ({"keys": torch.ones(2, 5, dtype=torch.bool)}, r"keys .*\(2, 5\); allowed.*\(2, 7\)"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    given = {"q": draw(2, 4, 5, 6), "k": draw(2, 2, 7, 6), "v": draw(2, 2, 7, 3)}
    given["embedding"] = draw(6, 4)
    with pytest.raises(ZooError, match=message):
        cope_attention(**given | change)


def test_one_row_of_keys_is_for_all_samples():
    q, k, v = (draw(2, 4, 7, 6, seed=s) for s in range(3))
    keys = torch.tensor([[True, False, True, True, False, True, True]])
    expected = cope_attention(q, k, v, draw(6, 4), keys=keys.expand(2, -1))
    assert_close(cope_attention(q, k, v, draw(6, 4), keys=keys), expected)


def test_bad_input():
    with pytest.raises(ZooError, match=r"npos=None.*max_len.*give npos"):
        zoo.create("cope", 8, 2, causal=True)
    assert zoo.create("cope", 8, 2, causal=True, max_len=6).position.npos == 7
    for npos in (0, -1, 2.0, True):
        with pytest.raises(ZooError, match=f"npos={npos!r}.*at least 1"):
            zoo.create("cope", 8, 2, causal=True, npos=npos)
    with pytest.raises(ZooError, match="sep_key=True and val_gates=True"):
        zoo.create("cope(npos=4, sep_key=True, val_gates=True)", 8, 2, causal=True)
    with pytest.raises(ZooError, match=r"with_rel=True.*give max_len"):
        zoo.create("cope(npos=4, with_rel=True)", 8, 2, causal=True)
    with pytest.raises(CompatibilityError, match="causal=True"):
        zoo.create("cope(npos=4)", 8, 2)
    with pytest.raises(CompatibilityError, match=r"width 2 with values of width 4.*differential"):
        zoo.create("differential+cope(npos=4, val_gates=True)", 8, 2, causal=True)


@pytest.mark.parametrize("route", ["engine", "reference"])
def test_distances_beyond_the_table_are_refused(route):
    attn = make("cope(npos=4, with_rel=True)", max_len=6, route=route)
    attn(draw(1, 6, 24))
    with pytest.raises(ZooError, match="max_len=6"):
        attn(draw(1, 7, 24))
    near = make("sliding_window(window=6)+cope(npos=4, with_rel=True)", max_len=6)
    near(draw(1, 9, 24))


@pytest.mark.parametrize("known", ["compiled", "meta"])
def test_distances_are_refused_where_masks_have_no_values(known):
    """There lengths decide, and the window that a selection keeps."""
    device, error = ("meta", ZooError) if known == "meta" else ("cpu", Unsupported)

    def attend(spec):
        attn = make(spec, max_len=6, device=device)
        if known == "compiled":
            attn = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
        return lambda length: attn(draw(1, length, 24).to(device))

    attn = attend("cope(npos=4, with_rel=True)")
    attn(6)
    with pytest.raises(error, match=r"max_len=6 .* distance of 6"):
        attn(7)
    attend("sliding_window(window=6)+cope(npos=4, with_rel=True)")(9)


def test_masks_may_hide_far_keys():
    attn, x = make("cope(npos=4, with_rel=True)", max_len=6), draw(1, 9, 24)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(-5)
    near = make("sliding_window(window=6)+cope(npos=4, with_rel=True)", max_len=6)
    near.load_state_dict(attn.state_dict())
    assert_close(attn(x, mask=mask), near(x))
