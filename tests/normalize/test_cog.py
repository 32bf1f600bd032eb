"""Cog attention: golden values, the fast route against the reference, signs, layout of layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_files import under
from torch.func import functional_call, grad, vmap

import zoo
from zoo.host.spec import layout
from zoo.models.language.decoder_lm import DecoderLM
from zoo.normalize.cog import cog_attention, cog_attention_reference
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

ROUTES = ("engine", "dense", "cog_strips", "reference")
FORMS = (cog_attention, cog_attention_reference)


def build(spec="cog", heads=4, **options):
    options = {"dim": 8 * heads, "heads": heads, "dtype": torch.float64, **options}
    return zoo.create(spec, **options)


def tensors_of(lengths=(13, 13), width=5, dtype=torch.float64, heads=3, samples=2):
    """Queries, keys, values and a cotangent of odd shapes."""
    n, m = lengths
    shapes = ((n, 8), (m, 8), (m, width), (n, width))
    return [draw(samples, heads, *s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


def both(form, q, k, v, cotangent, **options):
    """Output and gradients of a functional form."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = form(*inputs, **options)
    return [y, *torch.autograd.grad((y * cotangent).sum(), inputs)]


def golden_host(tensors, config, causal=True, **options):
    """The layer of the language model."""
    style = "interleaved" if "interleaved" in config["rope"] else "half"
    spec = f"cog+rope(style={style}, base={config['rope_theta']})"
    facts = {"head_dim": config["head_dim"], "causal": causal, **options}
    attn = zoo.create(spec, config["dim"], config["n_heads"], **facts)
    stacked = torch.cat([tensors[f"param.{n}"].t() for n in ("qw", "kw", "vw")])
    state = {"project.qkv.weight": stacked, "combine.proj.weight": tensors["param.ow"].t()}
    attn.load_state_dict(state)
    return attn


def compare_language(tensors, metadata, route):
    attn = golden_host(tensors, metadata["config"], route=route)
    x = tensors["in.x"].clone().requires_grad_()
    y, weights = attn(x, need_weights=True)
    (y * tensors["in.cotangent"]).sum().backward()
    assert_close(y, tensors["out.y"], "output")
    assert_close(weights, tensors["out.attn_weights"], "weights")
    assert_close(x.grad, tensors["grad.in.x"], "x", gradient=True)
    expected = torch.cat([tensors[f"grad.param.{n}"].t() for n in ("qw", "kw", "vw")])
    assert_close(attn.project.qkv.weight.grad, expected, "q, k, v", gradient=True)
    expected = tensors["grad.param.ow"].t()
    assert_close(attn.combine.proj.weight.grad, expected, "output projection", gradient=True)


def compare_masks_and_decoding(tensors, metadata, route):
    attn = golden_host(tensors, metadata["config"], route=route)
    x = tensors["in.x"]
    documents = tensors["in.doc_mask"].bool()[:, None]
    assert_close(attn(x, mask=documents), tensors["out.y_docmask"], "packed documents")
    # A mask instead of causality: the two have to say the same.
    free = golden_host(tensors, metadata["config"], causal=False, route=route)
    mask = tensors["in.causal_mask"].bool()
    assert_close(free(x, mask=mask), tensors["out.y"], "causality as a mask")
    cache = zoo.LayerCache()
    pieces = [piece for piece in x.tensor_split((1, 2, 5), 1) if piece.shape[1]]
    with torch.no_grad():
        steps = [attn(piece, cache=cache) for piece in pieces]
    assert_close(torch.cat(steps, 1), tensors["out.y_decode"], "decoded")


def compare_functions(tensors, metadata, form):
    config, x = metadata["config"], tensors["in.x"]
    attn, places = golden_host(tensors, config), torch.arange(x.shape[1])
    q, k, v = attn.project(x, None, None)
    q, k = attn.position.rotate(q, k, places, places)
    y = form(q, k, v, causal=True)
    assert_close(attn.combine(y, x, {}), tensors["out.y"], "language")
    x = tensors["in.vision.x"]
    param = under(tensors, "param.vision.")
    rows = F.linear(x, param["qkv.weight"], param.get("qkv.bias"))
    q, k, v = rows.unflatten(-1, (3, config["vision_num_heads"], -1)).permute(2, 0, 3, 1, 4)
    y = form(q, k, v).transpose(1, 2).flatten(2)
    y = F.linear(y, param["proj.weight"], param["proj.bias"])
    assert_close(y, tensors["out.vision.y"], "vision")


def compare_vision(tensors, metadata, route):
    config, x = metadata["config"], tensors["in.vision.x"]
    attn = zoo.create("cog", x.shape[-1], config["vision_num_heads"], bias=True, route=route)
    param = under(tensors, "param.vision.")
    assert ("qkv.bias" in param) == config["vision_qkv_bias"]
    state = {
        "project.qkv.weight": param["qkv.weight"],
        "project.qkv.bias": param.get("qkv.bias", torch.zeros(len(param["qkv.weight"]))),
        "combine.proj.weight": param["proj.weight"],
        "combine.proj.bias": param["proj.bias"],
    }
    attn.load_state_dict(state)
    assert_close(attn(x), tensors["out.vision.y"], "vision")


@pytest.mark.parametrize("route", ROUTES)
def test_golden_language(golden, route):
    compare_language(*golden("cog"), route)


@pytest.mark.parametrize("route", ROUTES)
def test_golden_masks_and_decoding(golden, route):
    compare_masks_and_decoding(*golden("cog"), route)


@pytest.mark.parametrize("form", FORMS)
def test_golden_functions(golden, form):
    compare_functions(*golden("cog"), form)


@pytest.mark.parametrize("route", ROUTES)
def test_golden_vision(golden, route):
    compare_vision(*golden("cog"), route)


def test_another_golden_file(other_golden):
    file = other_golden("cog")
    for route in ROUTES:
        compare_language(*file, route)
        compare_masks_and_decoding(*file, route)
        compare_vision(*file, route)
    for form in FORMS:
        compare_functions(*file, form)


def masks_of(n, m):
    """No mask, padding, a mask of pairs for all, and one for each head with empty rows."""
    chance = torch.rand(2, 3, n, m, generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(m) < torch.tensor([m, m // 2])[:, None]
    heads = chance < 0.5
    heads[0, 1, 2:5] = False
    return [None, lengths[:, None, None], (chance < 0.5)[:1, :1], heads, heads[:1, :, :1]]


@pytest.mark.parametrize("size", [1, 60], ids=["small scores", "scores that need their maximum"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(13, 13), (4, 13)])
def test_strips_equal_the_reference(many_strips, lengths, causal, size):
    q, k, v, cotangent = tensors_of(lengths)
    q = size * q
    for mask in masks_of(*lengths):
        found = both(cog_attention, q, k, v, cotangent, causal=causal, mask=mask)
        expected = both(cog_attention_reference, q, k, v, cotangent, causal=causal, mask=mask)
        names = ("output", "q", "k", "v")
        for name, a, e in zip(names, found, expected, strict=True):
            what = f"{name}, mask {None if mask is None else tuple(mask.shape)}"
            assert_close(a, e, what, gradient=name != "output")


def test_strips_equal_the_reference_with_default_tiles():
    q, k, v, cotangent = tensors_of((700, 700), dtype=torch.float32)
    found = both(cog_attention, q, k, v, cotangent, causal=True)
    expected = both(cog_attention_reference, q, k, v, cotangent, causal=True)
    for name, a, e in zip(("output", "q", "k", "v"), found, expected, strict=True):
        assert_close(a, e, name, gradient=name != "output")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_routes_agree_in_the_host(many_strips, causal, kv_heads):
    attn = build("cog+rope", causal=causal, kv_heads=kv_heads)
    x = draw(3, 17, 32)
    heads = torch.rand(3, 4, 17, 17) < 0.6
    cases = [{}, {"mask": zoo.padding_mask(torch.tensor([17, 9, 0]))}, {"mask": heads}]
    if not causal:
        cases += [{"context": draw(3, 5, 32, seed=4)}]
    for inputs in cases:
        attn.route = "dense"
        expected = settle(attn, x, **inputs)
        for route in ("engine", "cog_strips", "reference"):
            attn.route = route
            for name, value in settle(attn, x, **inputs).items():
                what = f"{route} {list(inputs)} {name}"
                assert_close(value, expected[name], what, gradient=name != "output")


def test_own_backward_and_its_derivative_against_finite_differences(many_strips):
    q, k, v, _ = tensors_of((5, 7), heads=2)
    mask = torch.rand(2, 2, 5, 7) < 0.7
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def form(q, k, v):
        return cog_attention(q, k, v, causal=True, mask=mask)

    assert torch.autograd.gradcheck(form, inputs)
    assert torch.autograd.gradgradcheck(form, inputs, fast_mode=True)
    inputs[1].requires_grad_(False)
    assert torch.autograd.gradgradcheck(form, inputs, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_two_softmaxes_give_cog(form):
    """o = (e^lse+ o+ - e^lse- o-) / (e^lse+ + e^lse-), one softmax over the keys of each sign."""
    q, k, v, _ = tensors_of((9, 9))
    k[..., 0] = -k[..., 0].abs() - 20  # some rows have keys of one sign only
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    scores = q @ k.mT / math.sqrt(8)
    halves = []
    for sign in (1, -1):
        s = (sign * scores).masked_fill(~visible | (sign * scores <= 0), -torch.inf)
        lse = s.logsumexp(-1, keepdim=True)
        weights = (s - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
        halves.append((lse, weights @ v))
    (up, positive), (down, negative) = halves
    assert bool((up == -torch.inf).any())
    assert bool((down == -torch.inf).any())
    share = torch.sigmoid(up - down)
    expected = share * positive - (1 - share) * negative
    assert_close(form(q, k, v, causal=True), expected, "two softmaxes")


@pytest.mark.parametrize("form", FORMS)
def test_signs_and_sizes(form):
    q, k, v, _ = tensors_of()
    y = form(q, k, v, causal=True)
    assert torch.equal(form(-q, k, v, causal=True), -y)
    assert_close(form(q, -k, -v, causal=True), y, "k and v flipped")
    positive = [x.abs() for x in (q, k)]
    plain = F.scaled_dot_product_attention(*positive, v, is_causal=True)
    assert_close(form(*positive, v, causal=True), plain, "scores that are not negative")
    order = torch.randperm(13)
    assert_close(form(q, k[:, :, order], v[:, :, order]), form(q, k, v), "keys in another order")
    # A constant channel adds the same to every score of a row: softmax would not notice.
    more = [torch.cat((x, torch.ones_like(x[..., :1])), -1) for x in (q, k)]
    scale = 8**-0.5
    assert float((form(*more, v, scale=scale) - form(q, k, v, scale=scale)).abs().max()) > 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("route", ["cog_strips", "engine", "dense"])
def test_signs_and_sizes_in_the_host(many_strips, route, causal):
    attn, plain = build(route=route, causal=causal), build("mha", causal=causal)
    x, shared = draw(2, 13, 32), attn.project.qkv.weight.detach()
    y = attn(x)
    shared[:32].neg_()  # the rows of q, then those of k
    assert torch.equal(attn(x), -y)
    shared[:64].abs_()
    plain.load_state_dict(attn.state_dict())
    assert_close(attn(x.abs()), plain(x.abs()), "scores that are not negative")
    assert float((attn(x) - plain(x)).detach().abs().max()) > 0.01


@pytest.mark.parametrize("route", ["cog_strips", "engine", "dense"])
def test_cache_of_another_head_count(route):
    cache, x = zoo.LayerCache(), draw(2, 5, 32)
    build(causal=True, kv_heads=2)(x, cache=cache)
    with pytest.raises(zoo.ZooError, match=r"'k' holds \(2, 2, 5, 8\).*\(2, 4, 5, 8\)"):
        build(causal=True, route=route)(x, cache=cache)


@pytest.mark.parametrize(
    ("size", "others", "route"),
    [
        ((0, 5, 32), None, "cog_strips"),
        ((2, 0, 32), None, "engine"),
        ((2, 0, 32), (2, 3, 32), "cog_strips"),
        ((2, 3, 32), (2, 0, 32), "engine"),
    ],
)
def test_empty_input(size, others, route):
    attn, x = build(causal=others is None), draw(*size)
    context = None if others is None else draw(*others)
    assert attn.explain(x, context).route == route
    found = settle(attn, x, context=context)
    assert found["output"].shape == size
    assert not any(bool(value.any()) for value in found.values())


def test_torch_func_gives_the_engines_gradients():
    attn, x = build(causal=True), draw(3, 7, 32)
    parameters = dict(attn.named_parameters())

    def loss(parameters, x):
        return functional_call(attn, parameters, (x,)).square().sum()

    whole, each = grad(loss)(parameters, x), vmap(grad(loss), (None, 0))(parameters, x[:, None])
    attn.route = "cog_strips"
    with pytest.raises(zoo.ZooError, match=r"cog_strips.*torch\.func"):
        vmap(grad(loss), (None, 0))(parameters, x[:, None])
    attn.route = "engine"
    for i, sample in enumerate([x, *x[:, None]]):
        expected = torch.autograd.grad(loss(parameters, sample), [*parameters.values()])
        for name, value in zip(parameters, expected, strict=True):
            found = each[name][i - 1] if i else whole[name]
            assert_close(found, value, f"{i} {name}", gradient=True)


def test_weights_of_a_row():
    _, weights = build(causal=True)(draw(2, 9, 32), need_weights=True)
    total = weights.abs().sum(-1)
    assert_close(total, torch.ones_like(total), "sizes of a row")
    assert float(weights.detach().min()) < 0
    assert float(weights.detach().sum(-1).mean()) < 0.5


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form):
    """Scores log 3, -log 2, 0 weigh 3 / 6, -2 / 6 and nothing; the zero counts below the line."""
    q = torch.tensor([[[[3.0, 1.0]]]], dtype=torch.float64)
    third = math.log(3) / 3, -math.log(2) / 3
    k = torch.tensor([[[[third[0], 0], [third[1], 0], [1, -3]]]], dtype=torch.float64)
    y = form(q, k, torch.eye(3, dtype=torch.float64)[None, None], scale=1.0)
    expected = torch.tensor([3 / 6, -2 / 6, 0.0], dtype=torch.float64)
    assert_close(y.flatten(), expected, "3 : -2 : 0 of 6")


@pytest.mark.parametrize("scale", [0.3, 0.35355339])
def test_scores_of_exactly_zero_stay_zero_in_float32(scale):
    """A factor on q would round 3 c - 3 c to something, and its sign would weigh a full e^0."""
    q = torch.tensor([[[[3.0, 1.0], [0.0, 0.0], [7.0, 3.0]]]])
    k = torch.tensor([[[[1.0, -3.0], [3.0, -7.0], [-2.0, 6.0]]]])
    v = torch.ones(1, 1, 3, 1)
    scores = q @ k.mT
    counted = scores.sign() * torch.exp((scores * scale).abs())
    expected = counted.sum(-1, keepdim=True) / torch.exp((scores * scale).abs()).sum(
        -1, keepdim=True
    )
    assert_close(cog_attention(q, k, v, scale=scale), expected, "zeros")
    assert float(cog_attention(q, k, v, scale=scale)[0, 0, 1]) == 0


@pytest.mark.parametrize("route", ["cog_strips", "engine", "reference"])
def test_hidden_keys_of_huge_score_do_not_matter(route):
    """The size of a hidden score must not enter the maximum, nor its power overflow."""
    attn = build(route=route, dtype=torch.float32)
    x = draw(2, 9, 32, dtype=torch.float32)
    mask = zoo.padding_mask(torch.tensor([9, 5]))
    expected = settle(attn, x, mask=mask)["output"]
    x[1, 5:] *= 1e4
    found = settle(attn, x, mask=mask)
    assert_close(found["output"][1, :5], expected[1, :5], "visible rows")
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v, _ = tensors_of(dtype=dtype)
    y = cog_attention(60 * q, k, v)
    assert y.dtype == dtype
    exact = cog_attention_reference(60 * q.double(), k.double(), v.double())
    assert_close(y, exact, "60 times as large scores", dtype=dtype)


def test_what_is_kept_for_the_backward_pass():
    q, k, v, _ = (x.requires_grad_() for x in tensors_of())
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = cog_attention(q, k, v, causal=True)
        assert sorted(kept) == sorted(x.numel() for x in (q, k, v, y, y[..., :1]))
        kept.clear()
        with torch.no_grad():
            assert torch.equal(cog_attention(q, k, v, causal=True), y)
        assert kept == []


def test_fast_route_and_why_not():
    x = draw(2, 5, 32)
    attn = build(causal=True)
    assert attn.explain(x).route == "cog_strips"
    assert "reference" not in attn.explain(x).skipped
    assert "bias" in attn.explain(x, bias=draw(5, 5)).refused["cog_strips"]
    cache = zoo.LayerCache()
    with torch.no_grad():
        attn(x, cache=cache)
    assert attn.explain(x, cache=cache).route == "cog_strips"
    assert "one row" in attn.explain(x[:, :1], cache=cache).refused["cog_strips"]
    assert "dropout" in build(dropout=0.5).train().explain(x).refused["cog_strips"]
    windowed = build("cog+sliding_window(window=2)", causal=True)
    assert "sliding_window" in windowed.explain(x).refused["cog_strips"]
    assert "alibi" in build("cog+alibi").explain(x).refused["cog_strips"]
    assert "no keys" in build().explain(x, context=x[:, :0]).refused["cog_strips"]
    with pytest.raises(zoo.ZooError, match=r"reference.*bias"):
        build(route="reference")(x, bias=draw(5, 5))


def test_first_and_last_layer_are_plain():
    assert layout("cog", 4) == ["mha", "cog", "cog", "mha"]
    assert layout("cog+rope", 3) == ["rope", "cog+rope", "rope"]
    assert layout("cog", 2) == ["cog", "cog"]
    model = DecoderLM(11, dim=16, depth=4, heads=2, attention="cog")
    found = [block.attn.part_names["normalize"] for block in model.blocks]
    assert found == ["softmax", "cog", "cog", "softmax"]
    everywhere = DecoderLM(
        11, dim=16, depth=3, heads=2, attention="cog", layers={"first": "same", "last": "same"}
    )
    assert {block.attn.part_names["normalize"] for block in everywhere.blocks} == {"cog"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(13, 13)}, r"float32.*torch.bool"),
        ({"mask": torch.ones(13, 13, dtype=torch.bool)}, r"\(13, 13\).*\(2, 3, 13, 13\)"),
        ({"mask": torch.ones(2, 1, 1, 12, dtype=torch.bool)}, r"\(2, 1, 1, 12\)"),
        ({"v": torch.ones(2, 3, 12, 5, dtype=torch.float64)}, r"13 keys.*12 values"),
    ],
)
def test_bad_input(change, message):
    q, k, v, _ = tensors_of()
    with pytest.raises(zoo.ZooError, match=message):
        cog_attention(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30}, r"dim=30.*heads=4"),
        ({"spec": "cog+rope", "head_dim": 7}, r"7"),
        ({"spec": "cog(sign=True)"}, r"sign"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**options)
