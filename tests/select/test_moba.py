"""MoBA: golden values and choices, every route against the reference, masks, packing, decoding."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from golden_files import read
from torch.func import functional_call, grad, vmap

import zoo
from zoo.errors import ZooError
from zoo.host import engine
from zoo.parts import advance
from zoo.select import _moba_gate, moba
from zoo.select._moba_gate import gate, lay_blocks
from zoo.select.moba import MoBA, choose_blocks, moba_attention, moba_attention_reference
from zoo.testing.contract import CONTRACTS
from zoo.testing.subject import Build, draw, settle
from zoo.testing.tolerances import assert_close

# Decoding equals the parallel form in this mode, as promised; the other one has its own test.
CONTRACT_OPTIONS = [
    {"block": 4, "topk": 2, "decode_mode": "moba"},
    {"block": 3, "topk": 3, "decode_mode": "moba"},
    {"block": 2, "topk": 1, "decode_mode": "moba"},
]
ROUTES = ("engine", "dense", "sdpa_strips", "moba_gather", "reference")
BACKENDS = ("reference", "torch")
NAMES = ("output", "q", "k", "v")


def build(spec="moba", **options):
    options = {"dim": 16, "heads": 4, "dtype": torch.float64, "block": 4, "topk": 2, **options}
    return zoo.create(spec, causal=True, **options)


def tensors_of(length=23, heads=3, groups=None, width=8, samples=2, dtype=torch.float64, seed=0):
    """Queries, keys, values and a cotangent."""
    groups = heads if groups is None else groups
    shapes = [(heads, 8), (groups, 8), (groups, width), (heads, width)]
    return [
        draw(samples, h, length, d, seed=10 * seed + i, dtype=dtype)
        for i, (h, d) in enumerate(shapes)
    ]


def both(form, q, k, v, cotangent, *args, **options):
    """Output and gradients of a functional form."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = form(*inputs, *args, **options)
    return [y, *torch.autograd.grad((y * cotangent).sum(), inputs)]


def same(found, expected, what=""):
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert_close(a, e, f"{what} {name}", gradient=name != "output")


def golden_numbers(tensors, metadata):
    return range(len(metadata["config"]["cases"]))


def golden_case(tensors, metadata, number):
    config = metadata["config"]["cases"][number]
    case = {
        name: tensors[f"{where}.c{number}.{name}"].transpose(0, 1)[None]
        for where, names in (("in", "qkvw"), ("out", "o"))
        for name in names
    }
    grads = [tensors[f"grad.c{number}.{name}"].transpose(0, 1)[None] for name in "qkv"]
    cu_seqlens = tensors[f"in.c{number}.cu_seqlens"]
    chosen = [tensors[f"out.c{number}.selected_seq{i}"].bool() for i in range(len(cu_seqlens) - 1)]
    return case, grads, cu_seqlens, chosen, (config["moba_chunk_size"], config["moba_topk"])


def compare_forms(tensors, metadata, number, backend):
    case, grads, cu_seqlens, _, sizes = golden_case(tensors, metadata, number)
    inputs = [case[name] for name in "qkvw"]
    found = both(moba_attention, *inputs, *sizes, cu_seqlens=cu_seqlens, backend=backend)
    same(found, [case["o"], *grads])


def compare_choices(tensors, metadata, number):
    case, _, cu_seqlens, selected, (block, topk) = golden_case(tensors, metadata, number)
    chosen = choose_blocks(case["q"], case["k"], block, topk, cu_seqlens)
    assert chosen.dtype == torch.int32
    assert chosen.shape == (*case["q"].shape[:3], topk - 1)
    for (a, b), expected in zip(pairwise(cu_seqlens.tolist()), selected, strict=True):
        own = torch.arange(b - a) // block
        count = expected.shape[2]
        found = F.one_hot(chosen[0, :, a:b].long() + 1, count + 1).sum(-2)[..., 1:]
        assert int(found.max()) <= 1, "a block is chosen twice"
        found += F.one_hot(own, count)
        # Their raw selection is filled up with blocks of the future where there is too little past.
        expected = expected & (torch.arange(count) <= own[:, None])
        assert torch.equal(found.bool(), expected)


def host_of(case, route):
    """A host whose projections are out of the way: parts are run on given q, k and v."""
    _, heads, length, width = case["q"].shape
    attn = build(dim=heads * width, heads=heads, route=route, dtype=torch.float32)
    call = attn.begin(torch.zeros(1, length, heads * width))
    call.q, call.k, call.v = (case[name] for name in "qkv")
    return attn, call


def compare_host(tensors, metadata, number, route):
    case, _, cu_seqlens, _, (block, topk) = golden_case(tensors, metadata, number)
    attn, call = host_of(case, route)
    attn.select.block, attn.select.topk = block, topk
    call.cu_seqlens = cu_seqlens
    places = torch.arange(case["q"].shape[2])
    call.documents = torch.bucketize(places, cu_seqlens[1:], right=True)
    call = attn.prepare(call)
    if topk * block >= len(places) and route in ("moba_gather", "reference"):
        with pytest.raises(ZooError, match="every block is visible"):
            attn.mix(call)
    else:
        assert_close(attn.mix(call), case["o"], route)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", golden_numbers(*read("moba")))
def test_golden(golden, number, backend):
    compare_forms(*golden("moba"), number, backend)


@pytest.mark.parametrize("number", golden_numbers(*read("moba")))
def test_golden_choices(golden, number):
    compare_choices(*golden("moba"), number)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("number", golden_numbers(*read("moba")))
def test_golden_through_the_host(golden, number, route):
    compare_host(*golden("moba"), number, route)


def test_another_golden_file(other_golden):
    file = other_golden("moba")
    for number in golden_numbers(*file):
        compare_choices(*file, number)
        for backend in BACKENDS:
            compare_forms(*file, number, backend)
        for route in ROUTES:
            compare_host(*file, number, route)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("length", "heads", "groups", "width", "block", "topk"),
    [
        (23, 3, 3, 8, 4, 3),  # ragged tail
        (24, 4, 2, 8, 4, 2),  # whole blocks, shared keys
        (29, 4, 1, 5, 3, 4),  # one key head, values of another width
        (17, 2, 2, 8, 1, 3),  # blocks of one token
        (19, 1, 1, 8, 7, 1),  # nothing of the past
        (25, 2, 2, 8, 2, 12),  # more picks than are looked for one by one
        (9, 2, 1, 8, 4, 40),
        (1, 2, 1, 8, 4, 2),
    ],
)
def test_gathered_queries_equal_the_reference(length, heads, groups, width, block, topk, dtype):
    q, k, v, cotangent = tensors_of(length, heads, groups, width, dtype=dtype)
    for scale in (None, 3.0, -0.4, 0.0):
        given = (q, k, v, cotangent, block, topk)
        found = both(moba_attention, *given, scale=scale, backend="torch")
        same(found, both(moba_attention_reference, *given, scale=scale), f"scale {scale}")


@pytest.mark.parametrize("spec", ["moba", "moba+rope"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_routes_agree(many_strips, kv_heads, spec):
    attn = build(spec, kv_heads=kv_heads)
    x = draw(2, 19, 16)
    attn.route = "dense"
    expected = settle(attn, x)
    for route in ROUTES:
        attn.route = route
        for name, value in settle(attn, x).items():
            assert_close(value, expected[name], f"{route} {name}", gradient=name != "output")


def test_the_host_takes_gathered_queries_unless_told_otherwise(monkeypatch):
    x = draw(2, 9, 16)
    attn = build()
    assert "below 1024 tokens" in attn.explain(x).refused["moba_gather"]
    monkeypatch.setattr(moba, "SHORT", 9)
    assert attn.explain(x).route == "moba_gather"
    assert "CPU" in attn.explain(x).refused["moba_triton"]
    assert "not every block" in attn.explain(x).refused["moba_full"]
    assert "reference" not in attn.explain(x).skipped
    assert attn.explain(x[:, :8]).route == "moba_full"  # two blocks of four
    assert "every block" in attn.explain(x[:, :8]).refused["moba_gather"]
    assert "bias" in attn.explain(x, bias=draw(9, 9)).refused["moba_gather"]
    mask = zoo.padding_mask(torch.tensor([9, 4]))
    assert "mask" in attn.explain(x, mask=mask).refused["moba_gather"]
    assert "alibi" in build("moba+alibi").explain(x).refused["moba_gather"]
    assert "entmax" in build("moba+entmax").explain(x).refused["moba_gather"]
    assert "dropout" in build(dropout=0.5).train().explain(x).refused["moba_gather"]
    full = build(mode="full")
    assert full.explain(x).route == "moba_full"
    assert "dropout" in build(mode="full", dropout=0.5).train().explain(x).refused["moba_full"]
    assert "mask" in full.explain(x, mask=mask).refused["moba_full"]
    cache = zoo.LayerCache()
    steps = build(decode_mode="moba")
    with torch.no_grad():
        steps(x, cache=cache)
    assert "cached" in steps.explain(x[:, :1], cache=cache).refused["moba_gather"]
    with pytest.raises(zoo.ZooError, match=r"reference.*mask"):
        build(route="reference")(x, mask=mask)


def test_triton_equals_the_reference():
    pytest.importorskip("triton", reason="the kernel is written in Triton")
    pytest.importorskip("zoo.kernels.moba", reason="this version has no MoBA kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = tensors_of(40, 4, 2, dtype=torch.float32, samples=1)
    q, k, v, cotangent = (x.to(device) for x in tensors)
    cu_seqlens = torch.tensor([0, 13, 40], device=device)
    for bounds in (None, cu_seqlens):
        given = (q, k, v, cotangent, 8, 2)
        found = both(moba_attention, *given, cu_seqlens=bounds, backend="triton")
        expected = both(moba_attention_reference, *given, cu_seqlens=bounds)
        for name, a, e in zip(NAMES, found, expected, strict=True):
            assert_close(a, e, name, gradient=name != "output", backend="triton")


def test_by_hand():
    """Mean keys 1, 3, -2 of blocks of two: the last query likes block 1, the one before block 2."""
    k = torch.tensor([2.0, 0, 4, 2, -4, 0, 1, 1], dtype=torch.float64)[None, None, :, None]
    q = torch.zeros_like(k)
    q[..., 7, :], q[..., 6, :] = 1.0, -1.0
    chosen = choose_blocks(q, k, 2, 2)[0, 0, :, 0]
    assert chosen.tolist() == [-1, -1, 0, 0, 0, 0, 2, 1]
    v = torch.eye(8, dtype=torch.float64)[None, None]
    for backend in ("reference", "torch"):
        y = moba_attention(q, k, v, 2, 2, backend=backend)[0, 0]
        # Token 7 sees tokens 2 and 3 of block 1 (scores 4, 2) and tokens 6 and 7 (scores 1, 1).
        weights = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64).softmax(0)
        expected = torch.zeros(8, dtype=torch.float64)
        expected[[2, 3, 6, 7]] = weights
        assert_close(y[7], expected, f"{backend}: token 7")
        # A query of zeros weighs all it sees alike: block 0, and its own one so far.
        third = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.float64) / 3
        assert_close(y[2], third, f"{backend}: token 2")


@pytest.mark.parametrize("picks", [1, 3, 12])
def test_equal_gates_give_the_first_blocks_and_never_too_many(picks):
    k = draw(1, 2, 40, 4)
    chosen = choose_blocks(torch.zeros_like(k), k, 2, picks + 1)
    for t in (0, 1, 2, 11, 39):
        past = min(picks, t // 2)
        expected = [*range(past), *[-1] * (picks - past)]
        assert chosen[0, 0, t].tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_gates_give_the_same_blocks_everywhere(backend):
    _, k, v, _ = tensors_of(length=129)
    q = torch.zeros_like(k)
    seen = torch.zeros(129, 129, dtype=torch.bool)
    for i in range(129):
        seen[i, [j for j in range(i + 1) if j < 4 or j // 2 == i // 2]] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert_close(moba_attention(q, k, v, 2, 3, backend=backend), expected, backend)


def test_sorting_finds_what_looking_one_by_one_finds():
    q, k, _, _ = tensors_of(60)
    expected = choose_blocks(q, k, 3, 6)
    with patch.object(_moba_gate, "FEW", 0):
        assert torch.equal(choose_blocks(q, k, 3, 6), expected)


@pytest.mark.parametrize("bounds", [None, [0, 7, 7, 30, 41]])
def test_the_gate_goes_by_strips(bounds):
    q, k, _, _ = tensors_of(41, samples=1 if bounds else 2)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    expected = choose_blocks(q, k, 4, 3, cu_seqlens)
    sizes = []
    pick = _moba_gate._pick

    def spy(scores, picks):
        sizes.append(scores.shape[2])
        return pick(scores, picks)

    with (
        patch.dict(engine.STRIP_BYTES, cpu=8),
        patch.object(engine, "MIN_ROWS", 3),
        patch.object(_moba_gate, "_pick", spy),
    ):
        found = choose_blocks(q, k, 4, 3, cu_seqlens)
    assert max(sizes) == 3
    assert sum(sizes) == 41
    assert torch.equal(found, expected)


def test_the_gate_is_computed_in_float32():
    """Means that bfloat16 cannot tell apart are told apart."""
    q, k = torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4)
    k[:, :, 2:4, 0] = torch.tensor([1.0, 1.0078125])  # the mean needs one more bit
    assert choose_blocks(q.bfloat16(), k.bfloat16(), 2, 2)[0, 0, 4].tolist() == [1]
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_blocks(q, k, 2, 2)[0, 0, 4].tolist() == [1]


def test_heads_that_share_keys_choose_for_themselves():
    q, k, _, _ = tensors_of(60, 4, 1)
    chosen = choose_blocks(q, k, 4, 2)
    assert torch.equal(chosen, choose_blocks(q, k.expand(-1, 4, -1, -1), 4, 2))
    assert all(bool((chosen[:, 0] != chosen[:, h]).any()) for h in (1, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "topk"), [(4, 6), (4, 50), (23, 1), (40, 2)])
def test_all_blocks_are_plain_attention(block, topk, backend):
    q, k, v, cotangent = tensors_of()
    found = both(moba_attention, q, k, v, cotangent, block, topk, backend=backend)

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    same(found, both(plain, q, k, v, cotangent))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_is_attention_within_blocks(backend):
    q, k, v, cotangent = tensors_of()
    found = both(moba_attention, q, k, v, cotangent, 5, 1, backend=backend)

    def diagonal(q, k, v):
        pieces = zip(*(x.split(5, 2) for x in (q, k, v)), strict=True)
        each = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces]
        return torch.cat(each, 2)

    same(found, both(diagonal, q, k, v, cotangent))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_separate_ones(backend):
    q, k, v, cotangent = tensors_of(41, 4, 2, samples=1)
    bounds = [0, 7, 7, 30, 41]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    given = (q, k, v, cotangent, 4, 2)
    found = both(moba_attention, *given, cu_seqlens=cu_seqlens, backend=backend)
    each = [
        both(moba_attention_reference, *(x[:, :, a:b] for x in (q, k, v, cotangent)), 4, 2)
        for a, b in pairwise(bounds)
        if b > a
    ]
    same(found, [torch.cat(pieces, 2) for pieces in zip(*each, strict=True)])


@pytest.mark.parametrize("route", ROUTES)
def test_packed_sequences_through_the_host(many_strips, route):
    attn = build("moba+rope", route=route, key_conv=3, kv_heads=2)
    x = draw(1, 41, 16)
    bounds = [0, 7, 7, 30, 41]
    found = settle(attn, x, cu_seqlens=torch.tensor(bounds))
    attn.route = "dense"
    inputs = x.clone().requires_grad_()
    pieces = [attn(inputs[:, a:b]) for a, b in pairwise(bounds)]
    y = torch.cat(pieces, 1)
    assert_close(found["output"], y, "output")
    attn.zero_grad()
    (y * draw(*y.shape, seed=7)).sum().backward()
    for name, parameter in attn.named_parameters():
        assert_close(found[name], parameter.grad, name, gradient=True)
    assert_close(found["x"], inputs.grad, "x", gradient=True)


def test_the_mode_changes_on_the_same_module():
    attn, x = build(), draw(2, 19, 16)
    plain = zoo.create("mha", 16, 4, causal=True, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    names = [name for name, _ in attn.named_parameters()]
    before = attn(x)
    assert float((before - plain(x)).detach().abs().max()) > 1e-3
    attn.select.set_mode("full")
    expected = settle(plain, x)
    for route in ("auto", "engine", "sdpa_strips"):
        attn.route = route
        for name, value in settle(attn, x).items():
            assert_close(value, expected[name], f"{route} {name}", gradient=name != "output")
    assert [name for name, _ in attn.named_parameters()] == names
    attn.route = "auto"
    attn.select.set_mode("moba")
    assert torch.equal(attn(x), before)
    with pytest.raises(zoo.ZooError, match=r"mode 'sparse'.*full, moba"):
        attn.select.set_mode("sparse")


def test_decoding_sees_the_whole_cache_by_default():
    """As the official code does: the first pass selects, later ones see everything."""
    attn, x = build("moba+rope"), draw(2, 23, 16)
    plain = zoo.create("rope", 16, 4, causal=True, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    cache = zoo.LayerCache()
    pieces = [13, 1, 1, 5, 3]
    with torch.no_grad():
        found = [attn(piece, cache=cache) for piece in x.split(pieces, 1)]
        assert_close(found[0], attn(x)[:, :13], "first pass")
        assert_close(torch.cat(found[1:], 1), plain(x)[:, 13:], "steps")
        assert float((plain(x)[:, :13] - found[0]).abs().max()) > 1e-3
        held = build("moba+rope", mode="full")
        held.load_state_dict(attn.state_dict())
        cache.crop(20)
        assert_close(attn(x[:, 20:], cache=cache), plain(x)[:, 20:], "after a crop")


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("pieces", [[1] * 23, [13, 1, 1, 5, 3], [23], [2, 21]])
def test_decoding_by_blocks_equals_the_parallel_form(pieces, kv_heads):
    attn = build("moba+rope", decode_mode="moba", kv_heads=kv_heads, key_conv=5)
    x, cache = draw(2, 23, 16), zoo.LayerCache()
    with torch.no_grad():
        rows = [attn(piece, cache=cache) for piece in x.split(pieces, 1)]
        assert_close(torch.cat(rows, 1), attn(x), f"pieces {pieces}")
    means, keys = cache.get("moba_means"), cache.get("k")
    assert means.shape == (2, kv_heads, 5, 4)  # of finished blocks
    expected = keys[:, :, :20].unflatten(2, (5, 4)).mean(3)
    assert_close(means, expected, "means held")
    assert cache.get("moba_keys").shape[2] == 4


def test_decoding_takes_means_from_the_cache_and_not_from_the_keys():
    attn, x, cache = build(decode_mode="moba", topk=1 + 1), draw(1, 14, 16), zoo.LayerCache()
    with torch.no_grad():
        attn(x[:, :13], cache=cache)
        expected = attn.explain(x[:, 13:], cache=cache)
        assert expected.route == "sdpa_strips"
        cache.get("moba_means").copy_(torch.zeros(1, 4, 3, 4))
        cache.get("moba_means")[:, :, 2] = 1e6 * torch.ones(4)
        call = attn.begin(x[:, 13:], cache=cache)
    assert set(call.prepared["select"]["chosen"].flatten().tolist()) <= {0, 2}


def test_the_convolution_over_keys_by_hand():
    part = build(key_conv=3, kv_heads=2).select
    assert part.key_weight.shape == (3, 2, 1, 4)
    k = draw(2, 2, 7, 4)
    found = part.change_keys(k, None, None)
    w = part.key_weight[:, :, 0].detach()
    for t in range(7):
        total = sum(w[lag] * k[:, :, t - lag] for lag in range(3) if lag <= t)
        assert_close(found[:, :, t], k[:, :, t] + F.silu(total), f"token {t}")
    depthwise = F.conv1d(
        F.pad(k.transpose(2, 3).flatten(1, 2), (2, 0)),
        w.flip(0).permute(1, 2, 0).reshape(8, 1, 3),
        groups=8,
    )
    expected = k + F.silu(depthwise.unflatten(1, (2, 4)).transpose(2, 3))
    assert_close(found, expected, "torch's convolution")
    assert build(key_conv=0).select.change_keys(k, None, None) is k


def test_the_convolution_goes_before_rotation_and_the_gate():
    attn, x = build("moba+rope", key_conv=3), draw(1, 19, 16)
    call = attn.begin(x)
    q, k, _ = attn.project(x, None, None)
    k = attn.select.change_keys(k, None, None)
    q, k = attn.position.rotate(q, k, torch.arange(19), torch.arange(19))
    assert_close(call.k, k, "keys")
    assert torch.equal(call.prepared["select"]["chosen"], choose_blocks(q, k, 4, 2))


@pytest.mark.parametrize(
    "contract",
    [
        *("shape", "gradients", "batch", "gradcheck", "half", "large", "compile", "state_dict"),
        *("copy", "device", "seed", "causal", "positions", "decode", "cache", "bias", "weights"),
        "memory",
    ],
)
def test_contracts_with_the_convolution(contract):
    """All but those on masks that hide earlier keys, which it refuses."""
    spec = "moba(block=3, topk=3, decode_mode=moba, key_conv=3)"
    CONTRACTS[contract].check(Build(spec))


def test_the_convolution_takes_right_padding_only():
    attn, x = build(key_conv=3), draw(2, 23, 16)
    y = attn(x, mask=zoo.padding_mask(torch.tensor([23, 14])))
    assert_close(y[1:, :14], attn(x[1:, :14]), "shorter sample")
    front = torch.ones(2, 1, 1, 23, dtype=torch.bool)
    front[1, ..., 0] = False
    for mask in (front, torch.ones(23, 23, dtype=torch.bool).tril(5)):
        with pytest.raises(zoo.ZooError, match=r"mask.*(key_conv=3|counts tokens)"):
            attn(x, mask=mask)
    assert sum(p.numel() for p in attn.select.parameters()) == 3 * 4 * 4


def test_a_convolution_of_width_one_mixes_nothing_and_takes_any_mask():
    attn, x = build(key_conv=1), draw(1, 23, 16)
    mask = torch.arange(23) != 5
    y = attn(x, mask=mask[None, None, None])
    assert_close(y[:, :5], attn(x)[:, :5], "before the hidden key")


def test_the_convolution_starts_as_torch_starts_its_own():
    torch.manual_seed(0)
    weight = build(dim=256, heads=4, key_conv=5).select.key_weight.detach()
    bound = 5**-0.5
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    assert abs(float(weight.std()) - bound / 3**0.5) < 0.02 * bound


def test_order_within_a_past_block_does_not_matter():
    attn, x = build(topk=3), draw(2, 23, 16)
    order = torch.arange(23)
    order[4:8] = torch.tensor([7, 4, 6, 5])
    y, permuted = attn(x), attn(x[:, order])
    assert_close(permuted[:, 8:], y[:, 8:], "later blocks")
    assert float((permuted - y)[:, 4:8].detach().abs().max()) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_early_rows_do_not_fill_up_with_the_future(backend):
    q, k, v, _ = tensors_of(23, samples=1)
    v = v.requires_grad_()
    assert choose_blocks(q, k, 4, 4)[0, :, :4].eq(-1).all()
    y = moba_attention(q, k, v, 4, 4, backend=backend)
    for i in (0, 3, 5, 9):
        (gradient,) = torch.autograd.grad(y[:, :, i].sum(), v, retain_graph=True)
        assert float(gradient[:, :, i + 1 :].abs().max()) == 0


def test_what_is_no_number_in_a_past_block_stays_out_of_rows_that_choose_nothing():
    """They have entries in the table of lists all the same."""
    q, k, v, _ = tensors_of(23)
    v[:, :, 3] = torch.nan
    k[:, :, :4] = 100.0
    q = q.abs()  # all later rows choose block 0
    y = moba_attention(q, k, v, 4, 2, backend="torch")
    assert bool(y[:, :, 4:].isnan().all())
    v[:, :, 3], v[:, :, 6] = 1.0, torch.nan
    y = moba_attention(q, -k, v, 4, 3, backend="torch")
    assert bool(y[:, :, :4].isfinite().all())


def test_hidden_keys_do_not_enter_the_means():
    q, k, _, _ = tensors_of(23)
    blocks = lay_blocks(23, 23, 4, None, q.device)
    mask = torch.rand(2, 1, 1, 23, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 4:8] = False  # a block of which nothing is visible
    found = gate(q, k, blocks, 3, mask=mask)
    assert not bool((found == 1).any())
    other = torch.where(mask.mT, k, 50 * draw(*k.shape, seed=5))
    assert torch.equal(gate(q, other, blocks, 3, mask=mask), found)
    assert not torch.equal(gate(q, other, blocks, 3), gate(q, k, blocks, 3))
    # A mask of pairs that hides the same keys from every row says the same.
    assert torch.equal(gate(q, k, blocks, 3, mask=mask.expand(2, 3, 23, 23)), found)
    # Means over what is visible, one by one.
    for b, t in ((0, 22), (1, 13)):
        means = [
            k[b, 0, i : i + 4][mask[b, 0, 0, i : i + 4]].mean(0) for i in range(0, t // 4 * 4, 4)
        ]
        scores = torch.stack(means) @ q[b, 0, t]
        expected = [i for i in scores.nan_to_num(-torch.inf).argsort(descending=True) if i != 1]
        wanted = [int(i) for i in expected][:3]
        assert found[b, 0, t].tolist() == wanted + [-1] * (3 - len(wanted))


def test_pairs_hidden_from_a_row_do_not_choose_for_it():
    q, k, _, _ = tensors_of(23, 4, 2)
    blocks = lay_blocks(23, 23, 4, None, q.device)
    mask = torch.rand(2, 4, 23, 23, generator=torch.Generator().manual_seed(3)) < 0.6
    found = gate(q, k, blocks, 2, mask=mask)
    for b, h, t in ((0, 0, 22), (1, 3, 17), (0, 2, 9)):
        row = gate(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], blocks, 2,
                   mask=mask[b : b + 1, h : h + 1, t : t + 1])  # fmt: skip
        assert torch.equal(row[0, 0, t], found[b, h, t])
        other = torch.where(mask[b, h, t][:, None], k, 50 * draw(*k.shape, seed=5))
        assert torch.equal(gate(q, other, blocks, 2, mask=mask)[b, h, t], found[b, h, t])


def test_masks_with_packed_sequences_and_cached_keys():
    q, k, _, _ = tensors_of(23, samples=1)
    mask = torch.rand(1, 1, 23, 23, generator=torch.Generator().manual_seed(3)) < 0.6
    packed = lay_blocks(23, 23, 4, torch.tensor([0, 10, 23]), q.device)
    for hidden in (mask, mask[:, :, :1]):
        found = gate(q, k, packed, 2, mask=hidden)
        for a, b in ((0, 10), (10, 23)):
            alone = lay_blocks(b - a, b - a, 4, None, q.device)
            rows = hidden[:, :, a:b, a:b] if hidden is mask else hidden[..., a:b]
            cut = gate(q[:, :, a:b], k[:, :, a:b], alone, 2, mask=rows)
            assert torch.equal(found[:, :, a:b], cut)
        last = lay_blocks(3, 23, 4, None, q.device)
        rows = hidden[:, :, 20:] if hidden is mask else hidden
        whole = gate(q, k, lay_blocks(23, 23, 4, None, q.device), 2, mask=hidden)
        assert torch.equal(gate(q[:, :, 20:], k, last, 2, mask=rows), whole[:, :, 20:])


@pytest.mark.parametrize("route", ["engine", "sdpa_strips"])
def test_right_padding_is_what_running_without_it_gives(many_strips, route):
    attn, x = build("moba+rope", route=route), draw(2, 23, 16)
    mask = zoo.padding_mask(torch.tensor([23, 14]))
    y = attn(x, mask=mask)
    assert_close(y[1:, :14], attn(x[1:, :14]), "shorter sample")
    assert_close(y[:1], attn(x[:1]), "longer sample")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v, cotangent = tensors_of(dtype=dtype)
    found = both(moba_attention, q, k, v, cotangent, 4, 2, backend="torch")
    wide = both(moba_attention_reference, *(x.float() for x in (q, k, v, cotangent)), 4, 2)
    for name, a, e in zip(NAMES, found, wide, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, name, gradient=name != "output", dtype=dtype)


def test_autocast_rounds_no_choice_of_the_reference():
    q, k, v, _ = tensors_of(length=400, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = moba_attention_reference(q, k, v, 4, 3)
    # Another block makes a difference of about one.
    assert (found - moba_attention_reference(q, k, v, 4, 3)).abs().max() < 0.1


def test_autocast_leaves_convolved_keys_the_type_of_the_others():
    attn = build(key_conv=3, dtype=torch.float32)
    x = draw(1, 23, 16, dtype=torch.float32)
    prepare = patch.object(MoBA, "prepare", autospec=True, return_value={})
    with prepare as seen, torch.autocast("cpu", torch.bfloat16):
        attn(x)
    call = seen.call_args.args[1]
    assert call.q.dtype == call.k.dtype == call.v.dtype == torch.bfloat16


def test_autocast_does_not_round_the_way_back():
    q, k, v, cotangent = tensors_of(dtype=torch.float32)
    expected = both(moba_attention, q, k, v, cotangent, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = both(moba_attention, q, k, v, cotangent, 4, 2)
    same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_need_their_maximum(backend):
    q, k, v, cotangent = tensors_of(dtype=torch.float32)
    given = (300 * q, k, v, cotangent, 4, 3)
    found = both(moba_attention, *given, backend=backend)
    exact = both(moba_attention_reference, *(x.double() for x in given[:4]), 4, 3)
    assert all(bool(x.isfinite().all()) for x in found)
    assert_close(found[0], exact[0], "output", dtype=torch.float16)


def test_strided_inputs_and_some_without_gradient():
    packed = draw(2, 23, 3, 3, 8)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    *_, cotangent = tensors_of()
    same(
        both(moba_attention, q, k, v, cotangent, 4, 2, backend="torch"),
        both(moba_attention_reference, q, k, v, cotangent, 4, 2),
    )
    y = moba_attention(q, k.requires_grad_(), v, 4, 2, backend="torch")
    (found,) = torch.autograd.grad(y, k, cotangent.mT.contiguous().mT)
    (expected,) = torch.autograd.grad(moba_attention_reference(q, k, v, 4, 2), k, cotangent)
    assert_close(found, expected, "k alone", gradient=True)


@pytest.mark.parametrize("shape", [(0, 3, 9, 8), (2, 3, 0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend, shape):
    q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    y = moba_attention(q, k, v, 4, 2, backend=backend)
    assert y.shape == shape
    assert all(g.shape == shape for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_gradients_that_have_gradients_are_not_rounded_by_autocast():
    q, k, v, cotangent = tensors_of(dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def gradients(create_graph):
        y = moba_attention(*inputs, 4, 2, backend="torch")
        return torch.autograd.grad((y * cotangent).sum(), inputs, create_graph=create_graph)

    with torch.autocast("cpu", torch.bfloat16):
        same([q, *gradients(True)], [q, *gradients(False)])


def test_tensors_without_values_take_the_reference():
    q, k, v = (torch.empty(1, 2, 9, 4, device="meta") for _ in range(3))
    assert moba_attention(q, k, v, 2, 2).shape == q.shape
    with pytest.raises(ZooError, match=r"backend='torch'.*meta"):
        moba_attention(q, k, v, 2, 2, backend="torch")


def test_second_derivatives_are_those_of_the_reference():
    q, k, v, cotangent = tensors_of(11, 2, 1, samples=1)
    found = []
    for form, options in ((moba_attention, {"backend": "torch"}), (moba_attention_reference, {})):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*inputs, 3, 2, cu_seqlens=torch.tensor([0, 8, 11]), **options)
        first = torch.autograd.grad((y * cotangent).sum(), inputs, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([total, *torch.autograd.grad(total, inputs)])
    same(*found)


def test_torch_func_takes_the_strips():
    attn, x = build(route="engine"), draw(3, 13, 16)
    parameters = dict(attn.named_parameters())

    def loss(parameters, x):
        return functional_call(attn, parameters, (x,)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x[:, None])
    for i in range(3):
        attn.zero_grad()
        attn(x[i : i + 1]).square().sum().backward()
        for name, parameter in parameters.items():
            assert_close(each[name][i], parameter.grad, f"{i} {name}", gradient=True)
    attn.route = "moba_gather"
    with pytest.raises(zoo.ZooError, match=r"moba_gather.*torch\.func"):
        vmap(grad(loss), (None, 0))(parameters, x[:, None])
    q, k, v, _ = tensors_of()
    found = vmap(lambda q, k, v: moba_attention(q[None], k[None], v[None], 4, 2)[0])(q, k, v)
    assert_close(found, moba_attention(q, k, v, 4, 2), "the functional form")


def test_compilers_take_the_reference_of_the_functional_form():
    q, k, v, _ = tensors_of()
    torch._dynamo.reset()
    compiled = torch.compile(moba_attention, fullgraph=True, backend="eager")
    assert_close(compiled(q, k, v, 4, 2), moba_attention(q, k, v, 4, 2), "compiled")
    torch._dynamo.reset()


def test_what_is_kept_for_the_backward_pass():
    q, k, v, _ = (x.requires_grad_() for x in tensors_of())
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = moba_attention(q, k, v, 4, 3)
    assert sorted(kept) == sorted(x.numel() for x in (q, k, v, y, y[..., 0], y[..., :2]))


CALLS = {"block": 4, "topk": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block=0"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 1.5}, "topk=1.5"),
        ({"k": torch.ones(2, 3, 9, 8).double()}, r"k has shape \(2, 3, 9, 8\)"),
        ({"k": torch.ones(2, 2, 23, 8).double()}, r"2 heads.*3"),
        ({"v": torch.ones(2, 3, 22, 8).double()}, r"v has shape \(2, 3, 22, 8\)"),
        ({"v": torch.ones(2, 3, 23, 8).long()}, "v is of torch.int64"),
        ({"q": torch.ones(3, 23, 8).double()}, r"q has shape \(3, 23, 8\)"),
        ({"cu_seqlens": torch.tensor([0, 23])}, "batch of 1"),
        ({"backend": "tritn"}, "triton"),
        ({"backend": "triton"}, "float64"),
    ],
)
def test_bad_input(change, message):
    q, k, v, _ = tensors_of()
    with pytest.raises(zoo.ZooError, match=message):
        moba_attention(**{"q": q, "k": k, "v": v, **CALLS, **change})


@pytest.mark.parametrize("bounds", [[0, 22], [1, 23], [0, 9, 5, 23], [0.0, 23.0]])
def test_bad_bounds(bounds):
    q, k, v, _ = tensors_of(samples=1)
    for form in (lambda c: moba_attention(q, k, v, 4, 2, cu_seqlens=c),
                 lambda c: choose_blocks(q, k, 4, 2, c)):  # fmt: skip
        with pytest.raises(zoo.ZooError, match="cu_seqlens"):
            form(torch.tensor(bounds))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block=0"),
        ({"block": 2.5}, "block=2.5"),
        ({"topk": 0}, "topk=0"),
        ({"topk": True}, "topk=True"),
        ({"key_conv": 2}, "key_conv=2"),
        ({"key_conv": -3}, "key_conv=-3"),
        ({"mode": "none"}, r"mode.*'none'"),
        ({"decode_mode": "step"}, r"decode_mode.*'step'"),
        ({"kv_heads": 3}, "kv_heads=3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**options)


def test_only_causal_attention():
    with pytest.raises(zoo.CompatibilityError, match=r"moba.*causal=True"):
        zoo.create("moba", 16, 4, causal=False)


def test_defaults_are_those_of_the_papers():
    part = zoo.create("moba", 16, 4, causal=True).select
    assert isinstance(part, MoBA)
    assert (part.block, part.topk, part.mode, part.decode_mode) == (64, 3, "moba", "full")
    assert part.key_weight is None


def test_the_last_part_of_training_may_be_full() -> None:
    host = zoo.create("moba(block=4, full_after=0.75, topk=2)", 16, 2, causal=True)
    assert isinstance(host, zoo.Attention)
    part = host.select
    assert isinstance(part, MoBA)
    seen = []
    for done in (0.0, 0.7, 0.75, 1.0, 0.5):
        advance(host, done)
        seen.append(part.mode)
    assert seen == ["moba", "moba", "full", "full", "moba"]
    for options in ("full_after=0", "full_after=1", "full_after=2", "full_after=0.5, mode=full"):
        with pytest.raises(ZooError, match="full_after"):
            zoo.create(f"moba({options})", 16, 2, causal=True)
