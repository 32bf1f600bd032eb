"""Neighborhood attention: the border rule bit by bit, every form against the dense one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from golden_files import read
from golden_forms.neighborhood import per_query
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo.select.neighborhood import na_mask, neighborhood_attention
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{"kernel": 3}, {"kernel": 2, "dilation": 2}]
FORMS = ("reference", "gather", "torch")
CASES = [
    # shape, kernel_size, dilation, stride, is_causal
    ((13,), 5, 1, 1, False),
    ((14,), 4, 3, 1, False),  # residue classes of 5, 5 and 4 tokens
    ((13,), 4, 2, 1, True),
    ((15,), 5, 1, 3, False),
    ((15,), 4, 1, 3, True),
    ((9, 11), (3, 4), 1, 1, False),
    ((9, 11), (3, 2), (2, 3), 1, (True, False)),
    ((8, 9), 3, 1, (2, 3), False),
    ((3, 5, 4), (2, 3, 3), 1, 1, (True, False, False)),
    ((4, 5, 6), 2, (2, 1, 3), 1, False),
]


@st.composite
def grids(draw):
    ndim = draw(st.integers(1, 3))
    most = {1: 17, 2: 6, 3: 4}[ndim]
    shape = tuple(draw(st.integers(2, most)) for _ in range(ndim))
    kernel = tuple(draw(st.integers(2, n)) for n in shape)
    dilation = tuple(draw(st.integers(1, n // w)) for n, w in zip(shape, kernel, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in kernel)
    causal = tuple(draw(st.booleans()) for _ in shape)
    return shape, kernel, dilation, stride, causal


@given(grids())
def test_mask_against_a_loop_over_queries(grid):
    _, kernel, _, _, causal = grid
    mask = na_mask(*grid)
    assert mask.tolist() == per_query(*grid)
    if not any(causal):
        assert bool((mask.sum(-1) == math.prod(kernel)).all())


def test_windows_by_hand():
    def seen(*args):
        rows = [row.nonzero().flatten().tolist() for row in na_mask(*args)]
        return [(row[0], row[-1]) for row in rows]

    assert seen(7, 3) == [(0, 2), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (4, 6)]
    assert seen(7, 4) == [(0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (3, 6), (3, 6)]
    assert seen(5, 3, 1, 1, True) == [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4)]


def golden_numbers(tensors, metadata):
    return range(len(metadata["config"]["cases"]))


def golden_case(tensors, metadata, number):
    config = metadata["config"]["cases"][number]
    keys = ("shape", "kernel_size", "dilation", "stride", "is_causal")
    args = tuple(tuple(config[key]) for key in keys)

    def flat(name):  # (B, .., H, D) to (B, H, S, D)
        return tensors[name].flatten(1, -3).transpose(1, 2)

    return args, flat, tensors[f"out.c{number}.mask"]


def compare_forms(tensors, metadata, number):
    args, flat, mask = golden_case(tensors, metadata, number)
    assert torch.equal(na_mask(*args), mask.bool())
    for form in FORMS:
        inputs = [flat(f"in.c{number}.{x}").clone().requires_grad_() for x in "qkv"]
        y = neighborhood_attention(*inputs, *args, backend=form)
        assert_close(y, flat(f"out.c{number}.o"), f"{form} output")
        found = torch.autograd.grad((y * flat(f"in.c{number}.w")).sum(), inputs)
        for name, x in zip("qkv", found, strict=True):
            due = flat(f"grad.c{number}.{name}")
            assert_close(x, due, f"{form} gradient of {name}", gradient=True)


def compare_host(tensors, metadata, number):
    """The heads of the host, whose projections are bypassed, on every route that takes them."""
    args, flat, _ = golden_case(tensors, metadata, number)
    shape, kernel, dilation, stride, causal = args
    q, k, v = (flat(f"in.c{number}.{x}") for x in "qkv")
    heads, width = q.shape[1], q.shape[3]
    facts = {"causal": causal[0]} if len(shape) == 1 else {"causal_axes": causal}
    attn = zoo.create(
        "neighborhood", heads * width, heads, kernel=kernel, grid=shape, dilation=dilation,
        stride=stride, **facts,
    )  # fmt: skip
    x = torch.zeros(len(q), q.shape[2], heads * width)
    call = attn.begin(x)
    call.q, call.k, call.v = q, k, v
    for route in ("engine", "sdpa_strips", "neighborhood_tiles", "gather", "reference", "dense"):
        attn.route = route
        assert_close(attn.mix(call), flat(f"out.c{number}.o"), route)


@pytest.mark.parametrize("number", golden_numbers(*read("neighborhood")))
def test_golden(golden, number):
    compare_forms(*golden("neighborhood"), number)


@pytest.mark.parametrize("number", golden_numbers(*read("neighborhood")))
def test_golden_in_a_host(golden, number):
    compare_host(*golden("neighborhood"), number)


def test_another_golden_file(other_golden):
    file = other_golden("neighborhood")
    for number in golden_numbers(*file):
        compare_forms(*file, number)
        compare_host(*file, number)


def inputs_of(shape, heads=4, groups=2, dtype=torch.float64):
    length = math.prod(shape)
    sizes = ((heads, 5), (groups, 5), (groups, 3))
    return [draw(2, h, length, n, seed=i, dtype=dtype) for i, (h, n) in enumerate(sizes)]


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forms_agree(case, extra):
    shape = case[0]
    tensors = inputs_of(shape)
    if extra:
        tensors += [draw(2, 2, 3, n, seed=8) for n in (5, 3)]
    heads = 4
    cotangents = draw(2, heads, math.prod(shape), 3, seed=5), draw(2, heads, math.prod(shape))
    results = {}
    for form in FORMS:
        given_ = [x.clone().requires_grad_() for x in tensors]
        q, k, v, *more = given_
        options = dict(zip(("additional_keys", "additional_values"), more, strict=False))
        y, lse = neighborhood_attention(
            q, k, v, *case, scale=0.6, return_lse=True, backend=form, **options
        )
        loss = (y * cotangents[0]).sum() + (lse * cotangents[1]).sum()
        results[form] = [y, lse, *torch.autograd.grad(loss, given_)]
    for form in FORMS[1:]:
        for i, (a, b) in enumerate(zip(results[form], results["reference"], strict=True)):
            assert_close(a, b, f"{form}, result {i}", gradient=i > 1)


@pytest.mark.parametrize("shape", [(9,), (6, 7), (3, 4, 5)])
def test_relative_position_bias(shape):
    kernel = (3,) * len(shape)
    dilation = (2,) + (1,) * (len(shape) - 1) if shape[0] >= 6 else 1
    table = draw(4, *(5 for _ in shape), seed=9).requires_grad_()
    q, k, v = inputs_of(shape)
    found = {}
    for form in FORMS:
        y = neighborhood_attention(q, k, v, shape, kernel, dilation, rpb=table, backend=form)
        found[form] = y, *torch.autograd.grad(y.square().sum(), table)
    for form in FORMS[1:]:
        assert_close(found[form][0], found["reference"][0], form)
        assert_close(found[form][1], found["reference"][1], f"{form}: table", gradient=True)
    # A pair at a time: offsets count within the residue class.
    places = list(itertools.product(*map(range, shape)))
    steps = dilation if isinstance(dilation, tuple) else (1,) * len(shape)
    bias = torch.zeros(4, len(places), len(places), dtype=torch.float64)
    mask = na_mask(shape, kernel, dilation)
    for a, b in mask.nonzero().tolist():
        gaps = zip(places[a], places[b], steps, strict=True)
        bias[:, a, b] = table.detach()[:, *((j // d - i // d + 2) for i, j, d in gaps)]
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.mT * 5**-0.5 + bias).masked_fill(~mask, -torch.inf)
    assert_close(found["reference"][0], scores.softmax(-1) @ v, "by pairs")
    for backend in ("triton", "flex"):
        with pytest.raises(zoo.ZooError, match=f"{backend}.*rpb"):
            neighborhood_attention(q, k, v, shape, kernel, dilation, rpb=table, backend=backend)


@pytest.mark.parametrize("table", [False, True])
def test_a_bias_on_keys(table):
    """With -inf among it, on a grid with residue classes of several shapes."""
    q, k, v = (x.requires_grad_() for x in inputs_of((9, 7)))
    bias = draw(2, 63, seed=7)
    bias[:, ::5] = -torch.inf
    rpb = draw(4, 5, 5, seed=9) if table else None
    found = {}
    for form in FORMS:
        y, lse = neighborhood_attention(
            q, k, v, (9, 7), 3, 2, rpb=rpb, key_bias=bias, return_lse=True, backend=form
        )
        found[form] = [y, lse, *torch.autograd.grad(y.square().sum() + lse.sum(), (q, k, v))]
    for form in FORMS[1:]:
        for i, (a, b) in enumerate(zip(found[form], found["reference"], strict=True)):
            assert_close(a, b, f"{form}, result {i}", gradient=i > 1)
    hidden = na_mask((9, 7), 3, 2) & bias.isfinite()[:, None, None]
    scores = q @ k.repeat_interleave(2, 1).mT * 5**-0.5 + bias.nan_to_num(neginf=0)[:, None, None]
    if rpb is None:
        lse = scores.masked_fill(~hidden, -torch.inf).logsumexp(-1)
        assert_close(found["reference"][1], lse, "by the mask")
    for backend in ("triton", "flex"):
        with pytest.raises(zoo.ZooError, match=f"{backend}.*key_bias"):
            neighborhood_attention(q, k, v, (9, 7), 3, key_bias=bias, backend=backend)
    with pytest.raises(zoo.ZooError, match="key_bias of shape"):
        neighborhood_attention(q, k, v, (9, 7), 3, key_bias=bias[:, 1:])


@pytest.mark.parametrize("form", FORMS)
def test_dropout_of_the_function(form):
    q, k, v = inputs_of((9, 7), groups=4)
    ones = torch.ones_like(v)
    y = neighborhood_attention(q, k, ones, (9, 7), 3, 2, dropout=0.4, backend=form)
    assert float(y.std()) > 0.1
    assert abs(float(y.mean()) - 1) < 0.1
    for backend in ("triton", "flex"):
        with pytest.raises(zoo.ZooError, match=f"{backend}.*dropout"):
            neighborhood_attention(q, k, v, (9, 7), 3, dropout=0.4, backend=backend)
    with pytest.raises(zoo.ZooError, match="dropout=1"):
        neighborhood_attention(q, k, v, (9, 7), 3, dropout=1.0, backend=form)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_grid_is_plain_attention(form):
    q, k, v = inputs_of((4, 5), groups=4)
    y = neighborhood_attention(q, k, v, (4, 5), (4, 5), backend=form)
    assert_close(y, F.scaled_dot_product_attention(q, k, v), "two axes")
    y = neighborhood_attention(q, k, v, 20, 20, is_causal=True, backend=form)
    assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal")


@pytest.mark.parametrize("form", FORMS)
def test_a_stride_of_the_window_is_window_attention(form):
    q, k, v = inputs_of((6, 8), groups=4)

    def windows(x):  # (B, H, 2, 3, 2, 4, D): blocks of 3 x 4
        return x.unflatten(2, (2, 3, 2, 4)).transpose(3, 4)

    parts = [windows(x).flatten(4, 5) for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*parts).unflatten(4, (3, 4)).transpose(3, 4).flatten(2, 5)
    found = neighborhood_attention(q, k, v, (6, 8), (3, 4), stride=(3, 4), backend=form)
    assert_close(found, y, "blocks")


@pytest.mark.parametrize("form", FORMS)
def test_dilation_is_attention_within_residue_classes(form):
    q, k, v = inputs_of((14,), groups=4)
    y = neighborhood_attention(q, k, v, 14, 4, 3, backend=form)
    for g in range(3):
        own = [x[:, :, g::3] for x in (q, k, v)]
        plain = neighborhood_attention(*own, own[0].shape[2], 4, backend="reference")
        assert_close(y[:, :, g::3], plain, f"class {g}")


def test_causal_sequences_are_the_sliding_window():
    x = draw(2, 23, 12)
    near = zoo.create("neighborhood", 12, 3, causal=True, kernel=5, dtype=torch.float64)
    window = zoo.create("sliding_window", 12, 3, causal=True, window=5, dtype=torch.float64)
    window.load_state_dict(near.state_dict())
    for name, value in settle(near, x).items():
        assert_close(value, settle(window, x)[name], name, gradient=name != "output")


def test_the_inside_moves_with_the_grid():
    q, k, v = inputs_of((9, 9), groups=4)

    def rolled(x):
        return x.unflatten(2, (9, 9)).roll((1, 1), (2, 3)).flatten(2, 3)

    y = neighborhood_attention(q, k, v, (9, 9), 3).unflatten(2, (9, 9))
    moved = neighborhood_attention(*map(rolled, (q, k, v)), (9, 9), 3).unflatten(2, (9, 9))
    assert_close(moved[:, :, 2:8, 2:8], y[:, :, 1:7, 1:7], "away from the border")


HOSTS = [
    {"kernel": 3, "ndim": 2},
    {"kernel": (3, 2), "grid": (4, 9), "dilation": (1, 2)},
    {"kernel": 3, "grid": (6, 6), "rel_pos_bias": True},
    {"kernel": 3, "grid": (5, 7), "prefix": 1},
    {"kernel": 3, "grid": (4, 8), "prefix": 4, "rel_pos_bias": True, "dilation": (1, 2)},
    {"kernel": (2, 3, 2), "grid": (3, 3, 4), "causal_axes": (True, False, False)},
    {"kernel": 5, "stride": 3},
    {"kernel": 3, "prefix": 2, "dilation": 3},
    {"kernel": 4, "stride": 2, "causal": True},
    {"kernel": 40},  # longer than the sequence
    {"kernel": 3, "dilation": 20},  # residue classes of one and two tokens
]


def host(options, heads=4, **more):
    facts = {"dtype": torch.float64, "kv_heads": 2, **options, **more}
    attn = zoo.create("neighborhood", 4 * heads, heads, **facts)
    if attn.select.rpb is not None:
        with torch.no_grad():
            attn.select.rpb.copy_(draw(*attn.select.rpb.shape, seed=3))
    return attn


@pytest.mark.parametrize("options", HOSTS, ids=str)
def test_routes_agree_in_the_host(many_strips, options):
    attn = host(options)
    x = draw(2, 36, 16)
    attn.route = "dense"
    expected = settle(attn, x)
    taken = []
    for route in ("engine", "sdpa_strips", "neighborhood_tiles", "gather", "reference"):
        attn.route = route
        taken.append(route)
        found = settle(attn, x)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert_close(value, expected[name], f"{route}: {name}", gradient=name != "output")
    assert len(taken) == 5
    pairs = torch.rand(2, 4, 36, 36) < 0.6
    attn.route = "dense"
    expected = settle(attn, x, mask=pairs)
    attn.route = "auto"
    assert attn.explain(x, mask=pairs).route in ("engine", "sdpa_strips")
    for name, value in settle(attn, x, mask=pairs).items():
        assert_close(value, expected[name], f"pairs: {name}", gradient=name != "output")


def test_everyone_sees_the_prefix_and_it_sees_everyone():
    attn = host({"kernel": 3, "grid": (5, 7), "prefix": 1})
    _, weights = attn(draw(1, 36, 16), need_weights=True)
    seen = weights[0, 0].detach() > 0
    assert bool(seen[0].all())
    assert bool(seen[:, 0].all())
    assert torch.equal(seen[1:, 1:], na_mask((5, 7), 3))


def test_in_a_vit_with_a_class_token():
    model = zoo.models.create(
        "vit", attention="neighborhood(kernel=3)", image_shape=(3, 20, 24), num_classes=5,
        patch=4, dim=16, heads=2, depth=2, class_token=True, registers=1, pool="token",
    )  # fmt: skip
    part = model.blocks[0].attn.mixer.select
    assert (part.grid, part.prefix) == ((5, 6), 2)
    y = model(draw(2, 3, 20, 24, dtype=torch.float32))
    y.sum().backward()
    assert y.shape == (2, 5)


def test_padding_ends_a_sequence():
    attn = host({"kernel": 5, "stride": 2})
    x = draw(2, 12, 16)
    mask = zoo.padding_mask(torch.tensor([12, 7]))
    y = attn(x, mask=mask)
    assert_close(y[1:, :7], attn(x[1:, :7]), "padded")
    assert_close(y[:1], attn(x[:1]), "not padded")


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal, dilation):
    attn = host({"kernel": 4, "dilation": dilation, "causal": causal})
    x = draw(1, 23, 16)
    bounds = torch.tensor([0, 9, 9, 12, 23])
    y = attn(x, cu_seqlens=bounds)
    for first, last in itertools.pairwise(bounds.tolist()):
        if first < last:
            assert_close(y[:, first:last], attn(x[:, first:last]), f"{first} to {last}")
    with pytest.raises(zoo.ZooError, match="packed"):
        host({"kernel": 3, "grid": (4, 5)})(x[:, :20], cu_seqlens=torch.tensor([0, 20]))


def test_decoding_keeps_the_window_and_refuses_what_needs_the_end():
    attn = host({"kernel": 3, "dilation": 2, "causal": True})
    x = draw(2, 11, 16)
    cache = zoo.LayerCache()
    with torch.no_grad():
        rows = [attn(piece, cache=cache) for piece in x.split(1, 1)]
    assert_close(torch.cat(rows, 1), attn(x), "decoded")
    assert cache.get("k").shape[2] == 5
    for options in ({"kernel": 3}, {"kernel": 3, "stride": 2, "causal": True}):
        with pytest.raises(zoo.ZooError, match="sequence ends"):
            host(options)(x[:, :1], cache=zoo.LayerCache())


def test_which_route_and_why_not():
    attn = host({"kernel": 3, "ndim": 2}, dtype=torch.float32)
    x = draw(2, 64, 16, dtype=torch.float32)
    taken = attn.explain(x)
    assert taken.route == "neighborhood_tiles"
    assert "CPU" in taken.refused["neighborhood_triton"]
    assert "CPU" in taken.refused["flex"]
    assert "four windows" in attn.explain(x[:, :36]).refused["neighborhood_tiles"]
    assert "bias" in attn.explain(x, bias=torch.zeros(64, 64)).refused["neighborhood_tiles"]
    biased = host({"kernel": 3, "ndim": 2, "rel_pos_bias": True}).explain(x.double())
    assert biased.route == "neighborhood_tiles"
    for route in ("neighborhood_triton", "flex"):
        assert "rpb" in biased.refused[route]
    dropped = host({"kernel": 3, "ndim": 2, "dropout": 0.5}).train().explain(x.double())
    assert "dropout" in dropped.refused["neighborhood_tiles"]
    attn.route = "flex"
    with pytest.raises(zoo.ZooError, match=r"flex.*no backward"):
        attn(x)


def test_parameters_of_the_bias():
    attn = host({"kernel": (3, 5), "grid": (5, 6), "rel_pos_bias": True})
    assert attn.select.rpb.shape == (4, 5, 9)
    attn.select.reset_parameters()
    assert 0 < float(attn.select.rpb.detach().abs().max()) < 0.1
    two = zoo.create("neighborhood(kernel=3,rel_pos_bias=True)+differential", 16, 2)
    assert len(two.select.rpb) == two.layout.score_heads


def test_torch_func_takes_another_form():
    q, k, v = inputs_of((9,), groups=4)

    def loss(q, k, v):
        return neighborhood_attention(q, k, v, 9, 3).square().sum()

    found = torch.func.grad(loss, (0, 1, 2))(q, k, v)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for a, b in zip(found, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        assert_close(a, b, "gradient", gradient=True)
    with pytest.raises(zoo.ZooError, match=r"torch\.func"):
        torch.func.grad(lambda q: neighborhood_attention(q, k, v, 9, 3, backend="torch").sum())(q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 1}, r"kernel_size=1 must be .* at least 2, on axis 0"),
        ({"kernel_size": (3, 1)}, r"kernel_size=1 must be .* at least 2, on axis 1"),
        ({"kernel_size": 6}, r"kernel_size=6.*4 tokens of axis 0"),
        ({"kernel_size": 2, "dilation": (1, 3)}, r"dilation=3.*5 tokens of axis 1"),
        ({"dilation": 0}, r"dilation=0 must be .* at least 1, on axis 0"),
        ({"stride": 4}, r"stride=4 must be .* from 1 to 3 .*, the kernel_size on axis 0"),
        ({"stride": (1, 0)}, r"stride=0 must be .* from 1 to 3 .* on axis 1"),
        ({"kernel_size": (3, 3, 3)}, r"3 entries for 2 axes"),
        ({"kernel_size": 3.0}, r"kernel_size=3.0"),
        ({"is_causal": 1}, r"is_causal=1 must be True or False"),
        ({"shape": (4, 4)}, r"\(2, 4, 20, 5\).*16"),
        ({"shape": (1, 2, 2, 5)}, r"shape=.*1 to 3"),
        ({"k": draw(2, 2, 19, 5)}, r"k of shape.*20"),
        ({"k": draw(2, 3, 20, 5)}, r"divisor"),
        ({"v": draw(2, 1, 20, 5)}, r"same heads"),
        ({"rpb": draw(4, 5, 4)}, r"rpb of shape.*\(4, 5, 5\)"),
        ({"rpb": draw(4, 3, 3), "kernel_size": 2}, r"odd"),
        ({"rpb": draw(4, 5, 5), "is_causal": (False, True)}, r"causal axis 1"),
        ({"additional_keys": draw(2, 2, 3, 5)}, r"belong together"),
        (
            {"additional_keys": draw(2, 2, 3, 5), "additional_values": draw(2, 2, 2, 3)},
            r"additional_values",
        ),
        ({"backend": "cuda"}, r"backend 'cuda'"),
        ({"shape": 4.5}, r"shape=4.5"),
        ({"k": draw(2, 2, 20, 5).half()}, r"k has dtype torch.float16"),
    ],
)
def test_bad_input(change, message):
    q, k, v = inputs_of((4, 5))
    given_ = {"q": q, "k": k, "v": v, "shape": (4, 5), "kernel_size": 3, **change}
    with pytest.raises(zoo.ZooError, match=message):
        neighborhood_attention(**given_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 1}, r"kernel_size=1 must be .* at least 2, on axis 0"),
        ({"kernel": 5, "grid": (4, 6)}, r"4 tokens of axis 0"),
        ({"kernel": 3, "grid": (6, 6), "ndim": 3}, r"ndim is 3"),
        ({"kernel": (3, 3), "grid": (6,)}, r"kernel=\(3, 3\)"),
        ({"ndim": 4}, r"ndim=4"),
        ({"grid": (0, 3)}, r"grid=\(0, 3\)"),
        ({"grid": 9}, r"grid=9"),
        ({"stride": 8}, r"stride=8"),
        ({"prefix": -1}, r"prefix=-1"),
        ({"ndim": 2, "causal": True}, r"causal_axes"),
        ({"prefix": 1, "causal": True}, r"prefix=1"),
        ({"causal_axes": (True,)}, r"host's causal"),
        ({"causal_axes": (True, False)}, r"causal_axes"),
        ({"kernel": 4, "rel_pos_bias": True}, r"odd"),
        ({"rel_pos_bias": True, "causal": True}, r"causal axis 0"),
        ({"rel_pos_bias": 1}, r"rel_pos_bias=1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        host(options)


def test_tokens_that_make_no_grid():
    with pytest.raises(zoo.ZooError, match=r"35 tokens make no square"):
        host({"ndim": 2, "kernel": 3})(draw(1, 35, 16))
    with pytest.raises(zoo.ZooError, match=r"35 tokens do not fill grid=\(6, 6\)"):
        host({"grid": (6, 6), "kernel": 3})(draw(1, 35, 16))
    with pytest.raises(zoo.ZooError, match=r"axis 0"):
        host({"ndim": 2, "kernel": 7})(draw(1, 36, 16))


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention without its compiler, which takes many seconds for each grid."""
    from torch.nn.attention.flex_attention import flex_attention

    from zoo.select import _flex

    monkeypatch.setattr(_flex, "_compiled", lambda grid: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "grid": (5, 7), "prefix": 1},
        {"kernel": (3, 2), "grid": (4, 9), "dilation": (1, 2), "stride": (2, 1)},
        {"kernel": 5, "causal": True},
    ],
    ids=str,
)
def test_flex_by_name_without_gradients(eager_flex, options):
    attn = zoo.create("neighborhood", 64, 4, kv_heads=2, **options)
    x = draw(2, 36, 64, dtype=torch.float32)
    with torch.no_grad():
        attn.route = "flex"
        y = attn(x)
        attn.route = "dense"
        assert_close(y, attn(x), "flex")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(11))  # more grids than the compiler takes for one function
def test_flex_on_cuda(number):
    sizes = {"grid": (9 + number, 12), "dilation": (1, 2), "prefix": number % 3}
    attn = zoo.create("neighborhood", 64, 4, kv_heads=2, kernel=5, device="cuda", **sizes)
    x = draw(2, (9 + number) * 12 + number % 3, 64, dtype=torch.float32).cuda()
    attn.route = "dense"
    expected = settle_on_cuda(attn, x)
    attn.route = "flex"
    for name, value in settle_on_cuda(attn, x).items():
        gradient = name != "output"
        assert_close(value, expected[name], name, gradient=gradient, backend="triton")


def settle_on_cuda(attn, x):
    x = x.clone().requires_grad_()
    y = attn(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *attn.parameters()])
    names = ["x", *(name for name, _ in attn.named_parameters())]
    return {"output": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[7]], ids=str)
def test_the_kernel_by_name(case):
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("zoo.kernels.neighborhood", reason="needs its kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = case[0]
    inputs = [x.to(device).requires_grad_() for x in inputs_of(shape, 2, 1, dtype=torch.float32)]
    results = []
    for backend in ("triton", "reference"):
        y = neighborhood_attention(*inputs, *case, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(a, b, f"result {i}", gradient=i > 0, backend="triton")
    with pytest.raises(zoo.ZooError, match=r"triton.*log-sum-exp"):
        neighborhood_attention(*inputs, *case, return_lse=True, backend="triton")


def test_the_kernels_route_in_the_host():
    pytest.importorskip("triton", reason="needs Triton")
    pytest.importorskip("zoo.kernels.neighborhood", reason="needs its kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"kernel": 3, "grid": (5, 7), "kv_heads": 1, "device": device}
    attn = zoo.create("neighborhood", 32, 2, **options)
    x = draw(1, 35, 32, dtype=torch.float32).to(device)
    attn.route = "dense"
    expected = settle_on_cuda(attn, x)
    attn.route = "neighborhood_triton"
    for name, value in settle_on_cuda(attn, x).items():
        gradient = name != "output"
        assert_close(value, expected[name], name, gradient=gradient, backend="triton")
    front = zoo.create("neighborhood", 32, 2, prefix=1, **options)
    front.route = "neighborhood_triton"
    with pytest.raises(zoo.ZooError, match="additional keys"):
        front(draw(1, 36, 32, dtype=torch.float32).to(device))


def test_shapes_alone_pass_through():
    q = torch.empty(2, 2, 20, 5, device="meta")
    assert neighborhood_attention(q, q, q, (4, 5), 3).shape == q.shape
    attn = zoo.create("neighborhood(kernel=3)", 12, 3, device="meta")
    assert attn(torch.empty(2, 40, 12, device="meta")).shape == (2, 40, 12)


def test_tiles_of_an_empty_sequence_with_a_dilation():
    attn = zoo.create("neighborhood(kernel=3, dilation=2)", 12, 3, route="neighborhood_tiles")
    assert attn(draw(2, 0, 12).float()).shape == (2, 0, 12)
