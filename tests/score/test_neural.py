"""Neural scores: golden values, the paper's properties, strips by hand, the statistic, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import read, under
from torch.func import functional_call, grad, vmap

import zoo
from zoo.bench.memory import peak
from zoo.errors import CompatibilityError
from zoo.host import engine
from zoo.models.language.decoder_lm import DecoderLM
from zoo.score._neural_strips import neural_attention_strips, tiles
from zoo.score.neural import Neural, neural_scores_reference, uniform_rows
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close, rms

# At the sizes of the contracts the default's only unit of the second layer is on everywhere, so
# that its bias has no gradient but rounding.
CONTRACT_OPTIONS = [
    {"proj_dim": 8},
    {"hidden": (6,)},
    {"proj_dim": 3, "hidden": (4, 1), "activation": "gelu"},
]
ROUTES = ("neural_strips", "engine", "dense", "reference")
OPTIONS = [
    {"proj_dim": 4},
    {"proj_dim": 6, "hidden": (5, 1)},
    {"proj_dim": 5, "hidden": (4, 3)},
    {"proj_dim": 2, "hidden": (5,)},
    {"proj_dim": 2, "hidden": (1,)},
]


def build(heads=4, *, spec="neural", **options):
    return zoo.create(spec, **{"dim": 8 * heads, "heads": heads, "dtype": torch.float64, **options})


def test_declared_contracts_use_every_kind_of_network():
    assert {len(o.get("hidden", (1, 1))) for o in CONTRACT_OPTIONS} == {1, 2}


def golden_cases(tensors, metadata):
    return [name.removesuffix(".y") for name in under(tensors, "out.")]


def compare_case(tensors, metadata, case, route):
    config = metadata["config"]
    heads, width = config["heads"], config["dim_head"]
    param = under(tensors, f"param.{case}.")
    layers = [n for n in range(1, len(param)) if f"linear{n}.weight" in param]
    *hidden, last = layers
    options = {"dim": tensors[f"in.{case}.x"].shape[-1], "head_dim": width, "route": route}
    options["hidden"] = tuple(len(param[f"linear{n}.weight"]) for n in hidden)
    attn = build(heads, causal=case == "causal", proj_dim=config["projection_dim"], **options)
    own = {
        "combine.proj.weight": "W_out.weight",
        "score.out.weight": f"linear{last}.weight",
        "score.out_bias": f"linear{last}.bias",
    }
    for kind in ("weight", "bias"):
        own |= {f"score.hidden.{i}.{kind}": f"linear{n}.{kind}" for i, n in enumerate(hidden)}
        own |= {
            f"score.query_proj.{kind}": f"q_proj.{kind}",
            f"score.key_proj.{kind}": f"k_proj.{kind}",
        }

    def mapped(prefix):
        found = {key: tensors[f"{prefix}.{name}"] for key, name in own.items()}
        qkv = tensors[f"{prefix}.to_qkv.weight"]  # rows (D, 3, H); ours are (3, H, D)
        found["project.qkv.weight"] = (
            qkv.unflatten(0, (width, 3, heads)).permute(1, 2, 0, 3).flatten(0, 2)
        )
        return found

    attn.load_state_dict(mapped(f"param.{case}"))
    x = tensors[f"in.{case}.x"].clone().requires_grad_()
    y = attn(x)
    (y * tensors[f"in.{case}.cotangent"]).sum().backward()
    assert_close(y, tensors[f"out.{case}.y"], "output")
    assert_close(x.grad, tensors[f"grad.{case}.in.x"], "x", gradient=True)
    expected = mapped(f"grad.{case}.param")
    for name, parameter in attn.named_parameters():
        assert_close(parameter.grad, expected[name], name, gradient=True)
    # What the file has for b_3 is rounding, which is as large as what it comes from.
    size = max(1.0, rms(expected["score.query_proj.weight"]))
    assert float(expected["score.out_bias"].abs()) < 1e-14 * size, "b_3 has no gradient to compare"


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("case", golden_cases(*read("neural")))
def test_golden(golden, case, route):
    compare_case(*golden("neural"), case, route)


def test_another_golden_file(other_golden):
    file = other_golden("neural")
    for case in golden_cases(*file):
        for route in ("auto", *ROUTES):
            compare_case(*file, case, route)


def plainly(attn, x, mask=None, causal=False):
    """Attention in the words of the paper, from the part's own parameters."""
    part = attn.score
    q, k, v = attn.project(x, None, None)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    maps = [(m.weight, m.bias) for m in (part.query_proj, part.key_proj)]
    s = neural_scores_reference(q, k, *maps, part.layers(), part.activation)
    seen = torch.ones_like(s, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen = seen if mask is None else seen & mask
    w = s.masked_fill(~seen, -torch.inf).softmax(-1)
    return attn.combine(w.masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v, x)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_routes_equal_reference_at_odd_shapes(request, options, causal, cut):
    if cut:
        request.getfixturevalue("many_strips")
    attn = build(causal=causal, kv_heads=2, head_dim=6, **options)
    x = draw(3, 17, 32)
    some = torch.rand(3, 4, 17, 17, generator=torch.Generator().manual_seed(2)) < 0.4
    masks = [None, zoo.padding_mask(torch.tensor([17, 9, 0])), some[:, :1, :1], some, some[:1, :1]]
    masks.append(some[:1, :, :1])
    for mask in masks:
        forward = attn.forward
        attn.forward = lambda x, mask=None: plainly(attn, x, mask, causal)
        expected = settle(attn, x, mask=mask)
        attn.forward = forward
        for route in ROUTES:
            attn.route = route
            found = settle(attn, x, mask=mask)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                what = f"{route} {None if mask is None else tuple(mask.shape)} {name}"
                if name == "score.hidden.1.bias" and value.norm() < 1e-12:
                    assert found[name].norm() < 1e-12, what  # units that are on everywhere
                    continue
                assert_close(found[name], value, what, gradient=name != "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_in_other_types(dtype):
    """Values of any type are worked on in float32 at least, so only the ends are rounded."""
    shapes = [(2, 4, 33, 4), (2, 2, 33, 4), (2, 2, 33, 6), (2, 4), (2,), (1, 2)]
    narrow = [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    found = []
    for inputs in (narrow, [x.double() for x in narrow]):
        a, b, v, w2, b2, w3 = leaves = [x.requires_grad_() for x in inputs]
        y = neural_attention_strips(a, b, v, [(w2, b2), (w3, torch.zeros(1))], causal=True)
        assert y.dtype == v.dtype
        found.append([y, *torch.autograd.grad((y * draw(*y.shape).to(dtype)).sum(), leaves)])
    for i, (value, expected) in enumerate(zip(*found, strict=True)):
        assert_close(value, expected, f"result {i}", gradient=i > 0)


def functional_input():
    """Arguments of `neural_attention_strips`: 7 rows behind 2 keys, 4 heads, 2 of them for keys."""
    a, b, v = (draw(2, *size, seed=size[-1]) for size in ((4, 7, 6), (2, 9, 6), (2, 9, 3)))
    return a, b, v, [(draw(3, 6), draw(3)), (draw(1, 3), torch.zeros(1))]


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 1), (1, 4, 7, 1), (4, 1, 9), (7, 9), (9,), ()], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
def test_strips_take_every_mask_that_broadcasts(many_strips, shape, causal):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    whole = mask.expand(2, 4, 7, 9).contiguous()
    found, expected = (
        neural_attention_strips(*functional_input(), mask=m, causal=causal, shift=2)
        for m in (mask, whole)
    )
    assert torch.equal(found, expected)
    a, b, _, layers = functional_input()
    seen = whole.tril(2) if causal else whole
    pairs = (a[:, :, :, None] + b.repeat_interleave(2, 1)[:, :, None]).relu()
    s = (pairs @ layers[0][0].t() + layers[0][1]).relu() @ layers[1][0][0]
    w = s.masked_fill(~seen, -1e9).softmax(-1) * seen.any(-1, keepdim=True)
    assert_close(found, w @ functional_input()[2].repeat_interleave(2, 1), "output")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(7, 9)}, r"mask of dtype torch.float32 and shape \(7, 9\).*torch.bool"),
        ({"mask": torch.ones(9, 7) > 0}, r"shape \(9, 7\); allowed.*\(2, 4, 7, 9\)"),
        ({"mask": torch.ones(2, 2, 7, 9) > 0}, r"shape \(2, 2, 7, 9\); allowed"),
        ({"mask": torch.ones(1, 1, 1, 1, 1) > 0}, r"shape \(1, 1, 1, 1, 1\); allowed"),
        ({"v": draw(2, 2, 8, 3)}, "b has 9 keys, but v has 8 values"),
    ],
)
def test_strips_refuse_what_does_not_fit(change, message):
    inputs = dict(zip(("a", "b", "v", "layers"), functional_input(), strict=True))
    with pytest.raises(zoo.ZooError, match=message):
        neural_attention_strips(**{**inputs, **change}, causal=True, shift=2)


@pytest.mark.parametrize(
    ("size", "others"),
    [
        ((0, 5, 32), None),
        ((2, 0, 32), None),
        ((2, 0, 32), (2, 3, 32)),
        ((2, 3, 32), (2, 0, 32)),
    ],
)
@pytest.mark.parametrize("options", [{"proj_dim": 4}, {"hidden": (5,)}], ids=str)
def test_empty_input(size, others, options):
    attn, x = build(causal=others is None, **options), draw(*size)
    context = None if others is None else draw(*others)
    assert attn.explain(x, context).route == "neural_strips"
    found = settle(attn, x, context=context)
    assert found["output"].shape == size
    assert not any(bool(value.any()) for value in found.values())


def test_torch_func_gives_the_engines_gradients():
    attn, x = build(causal=True, proj_dim=8), draw(3, 7, 32)
    parameters = dict(attn.named_parameters())

    def loss(parameters, x):
        return functional_call(attn, parameters, (x,)).square().sum()

    whole, each = grad(loss)(parameters, x), vmap(grad(loss), (None, 0))(parameters, x[:, None])
    attn.route = "neural_strips"
    with pytest.raises(zoo.ZooError, match=r"neural_strips.*torch\.func"):
        grad(loss)(parameters, x)
    attn.route = "engine"
    for i, sample in enumerate([x, *x[:, None]]):
        expected = torch.autograd.grad(loss(parameters, sample), [*parameters.values()])
        for name, value in zip(parameters, expected, strict=True):
            found = each[name][i - 1] if i else whole[name]
            assert_close(found, value, f"{i} {name}", gradient=True)


def test_scores_of_half_precision_are_summed_in_float32():
    attn, scores = build(proj_dim=4, dtype=torch.bfloat16, route="engine"), []
    attn.normalize.register_forward_hook(lambda m, a, out: scores.append(a[0]))
    x, part = draw(2, 9, 32, dtype=torch.bfloat16), attn.score
    attn(x)
    q, k, _ = attn.project(x, None, None)
    weight, bias = part.hidden[0].weight, part.hidden[0].bias
    a = torch.nn.functional.linear(part.query_proj(q), weight[:, :4], bias).double()
    b = torch.nn.functional.linear(part.key_proj(k), weight[:, 4:]).double()
    pairs = (a[:, :, :, None] + b[:, :, None]).relu()
    (w2, b2), (w3, b3) = ([x.double() for x in layer] for layer in part.layers()[1:])
    expected = (pairs @ w2.t() + b2).relu() @ w3[0] + b3
    assert_close(scores[0], expected, "scores", dtype=torch.float32)


def test_strips_are_not_rounded_under_autocast():
    a, b, v = (draw(1, 2, 9, n, seed=n, dtype=torch.float32).requires_grad_() for n in (4, 4, 3))
    layers = [(draw(2, 4, dtype=torch.float32), draw(2, dtype=torch.float32))]
    layers.append((draw(1, 2, dtype=torch.float32), torch.zeros(1)))
    plain = neural_attention_strips(a, b.detach(), v, layers)
    expected = torch.autograd.grad(plain.sum(), a)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = neural_attention_strips(a, b.detach(), v, layers)
        assert torch.equal(y, plain)
        assert torch.equal(torch.autograd.grad(y.sum(), a)[0], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_cover_every_row_of_every_head_once(many_strips, causal):
    for samples, heads, size in ((3, 4, 17), (5, 2, 3), (1, 1, 1)):
        a, b = torch.zeros(2, samples, heads, size), torch.zeros(2, samples, heads, size + 2)
        for budget in (64, 1024, 10**6):
            engine.STRIP_BYTES["cpu"] = budget  # the fixture puts it back
            met = torch.zeros(samples, heads, size)
            for tile in tiles(a, b, causal, 2, 4):
                met[tile.samples, tile.heads, tile.rows] += 1
                whole = met.flatten(0, 1)[tile.flat]
                assert whole.shape[0] == met[tile.samples, tile.heads].flatten(0, 1).shape[0]
                assert tile.stop == (tile.rows.stop + 2 if causal else size + 2)
            assert (met == 1).all()


def by_hand(**options):
    """One head of width 2 whose network reads off first coordinates: |q_0 - k_0| at weight w_3."""
    attn = build(1, dim=2, proj_dim=2, hidden=(2,), **options)
    part = attn.score
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        part.query_proj.weight[0, 0] = part.key_proj.weight[0, 0] = 1.0
        part.hidden[0].weight[:, 0] = torch.tensor([1.0, -1.0])
        part.hidden[0].weight[:, 2] = torch.tensor([-1.0, 1.0])
        part.out.weight.fill_(-math.log(2))
        attn.project.qkv.weight.copy_(torch.eye(2, dtype=torch.float64).repeat(3, 1))
        attn.combine.proj.weight.copy_(torch.eye(2))
    return attn


@pytest.mark.parametrize("route", ROUTES)
def test_distance_as_a_network_by_hand(route):
    """Scores -log 2 |q_0 - k_0|: each step away halves the weight."""
    attn = by_hand(route=route)
    x = torch.tensor([[[0.0, 7.0], [1.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([[1, 1 / 2, 1 / 8], [1 / 2, 1, 1 / 4], [1 / 8, 1 / 4, 1]])
    weights = weights.double() / weights.sum(-1, keepdim=True)
    _, found = attn(x, need_weights=True)
    assert_close(found[0, 0], weights, "weights")
    assert_close(attn(x)[0], weights @ x[0], "output")


def test_two_hidden_layers_by_hand():
    q, k = torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0], [-4.0]]]])
    one = (torch.ones(1, 1), torch.zeros(1))
    first = (torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([0.5, 0.0]))
    second = (torch.tensor([[1.0, 2.0]]), torch.tensor([-1.0]))
    last = (torch.tensor([[3.0]]), torch.tensor([10.0]))
    # q + k + 0.5 and q - k: (5.5, -1) and (-1.5, 6); then 5.5 - 1 and 2 * 6 - 1.
    found = neural_scores_reference(q, k, one, one, [first, second, last])
    assert found.flatten().tolist() == [3 * 4.5 + 10, 3 * 11.0 + 10]


@pytest.mark.parametrize("route", ROUTES)
def test_last_bias_cancels(route):
    attn = build(causal=True, proj_dim=4, route=route)
    x = draw(2, 9, 32)
    before = attn(x)
    attn.score.out_bias.fill_(40.0)
    assert_close(attn(x), before, "output with another b_3")


def test_last_bias_counts_where_rows_are_not_shifted_for_free():
    _, before = (attn := build(proj_dim=4))(draw(2, 9, 32), need_weights=True)
    part, x = attn.score, draw(2, 9, 32)
    scores = []
    attn.normalize.register_forward_hook(lambda m, a, out: scores.append(a[0]))
    attn.route = "engine"
    attn(x)
    part.out_bias.add_(2.5)
    attn(x)
    assert_close(scores[1] - scores[0], torch.full_like(before, 2.5), "shift of the scores")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("causal", [False, True])
def test_zero_last_layer_averages_what_is_seen(causal, route):
    attn = build(causal=causal, proj_dim=4, route=route)
    torch.nn.init.zeros_(attn.score.out.weight)
    x, mask = draw(2, 9, 32), zoo.padding_mask(torch.tensor([9, 5]))
    v = attn.project(x, None, None)[2]
    seen = mask.expand(2, 4, 9, 9)
    seen = seen.tril() if causal else seen
    mean = seen.double() / seen.sum(-1, keepdim=True) @ v
    assert_close(attn(x, mask=mask), attn.combine(mean, x), "output")
    # The last layer still learns.
    assert settle(attn, x)["score.out.weight"].abs().min() > 1e-6


def test_scores_without_the_query_rank_keys_alike():
    attn = build(causal=True, proj_dim=4)
    with torch.no_grad():
        attn.score.hidden[0].weight[:, :4] = 0.0
    _, weights = attn(draw(2, 9, 32), need_weights=True)
    last = weights[:, :, -1:]
    expected = last.expand_as(weights).tril()
    assert_close(weights, expected / expected.sum(-1, keepdim=True), "weights")
    assert float((last.amax(-1) - last.amin(-1)).detach().min()) > 1e-6, "nothing was compared"


@pytest.mark.parametrize("scale", [0.01, 0.0, 1])
def test_a_scale_is_refused(scale):
    with pytest.raises(CompatibilityError, match=rf"'neural'.*leave out scale={scale}$"):
        build(proj_dim=4, head_dim=6, scale=scale)


def test_first_layer_is_split_not_changed():
    attn = build(proj_dim=4, kv_heads=2)
    call = attn.begin(draw(2, 9, 32))
    shared, part = call.prepared["score"], attn.score
    assert shared["query"].shape == (2, 4, 9, 4)
    assert shared["key"].shape == (2, 2, 9, 4), "one for each group of heads"
    pair = torch.cat((part.query_proj(call.q[1, 3, 5]), part.key_proj(call.k[1, 1, 2])))
    whole = part.hidden[0](pair)
    assert_close(shared["query"][1, 3, 5] + shared["key"][1, 1, 2], whole, "W_1 [q ; k] + b_1")


def test_default_widths_and_count():
    for dim, width in ((64, 2), (32, 2), (8, 2), (96, 2), (128, 4), (512, 16)):
        part = build(2, dim=2 * dim).score
        assert part.query_proj.out_features == width
        assert [m.out_features for m in part.hidden] == [width, width // 2]
    d, p = 128, 4
    official = 2 * (d * p + p) + (2 * p * p + p) + (p * p // 2 + p // 2) + (p // 2 + 1)
    part = build(2, dim=256).score
    assert sum(x.numel() for x in part.parameters()) + part.out_bias.numel() == official
    assert sum(x.numel() for x in build(2, dim=256).parameters()) == 4 * 256**2 + official - 1


def test_default_start_survives_a_model():
    model = DecoderLM(11, dim=64, depth=3, heads=2, attention="neural(proj_dim=16)")
    parts = [block.attn.score for block in model.blocks]
    assert [isinstance(part, Neural) for part in parts] == [True, False, False]
    linears = (parts[0].query_proj, parts[0].key_proj, *parts[0].hidden)
    for linear in linears:
        bound = linear.in_features**-0.5  # uniform within it, as PyTorch starts a linear layer
        for x in (linear.weight, linear.bias):
            assert 0.5 * bound < x.abs().max().item() <= bound
    assert 0 < parts[0].out_bias.abs().item() <= 8**-0.5


def test_uniform_rows_counts_dead_rows():
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5], [0, 0, 0]])
    assert uniform_rows(weights).item() == 0.5  # two rows see several keys, one is uniform
    # Were all three keys visible, one weight was too small for its type: not a uniform row.
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[3] = False
    assert uniform_rows(weights, mask).item() == 0
    assert uniform_rows(weights, mask.tril()).item() == 0.5
    assert uniform_rows(weights[[0, 3]]).item() == 0  # no row sees two keys
    assert uniform_rows(weights, mask[:, :1] & torch.eye(4, 3).bool()).item() == 0
    attn = build(causal=True, proj_dim=2)
    x = draw(2, 9, 32)
    torch.nn.init.constant_(attn.score.hidden[1].bias, -100.0)
    _, weights = attn(x, need_weights=True)
    assert uniform_rows(weights).item() == 1.0
    found = settle(attn, x)
    assert all(not found[n].any() for n in found if n.startswith("score."))


def test_cached_keys_go_through_the_strips_a_chunk_at_a_time(many_strips):
    attn = build(causal=True, proj_dim=4, kv_heads=2)
    x, cache = draw(2, 11, 32), zoo.LayerCache()
    pieces = []
    with torch.no_grad():
        for piece in x.split([4, 1, 6], 1):
            several = piece.shape[1] > 1
            route = attn.explain(piece, cache=cache).route
            assert route == ("neural_strips" if several else "engine")
            pieces.append(attn(piece, cache=cache))
        assert_close(torch.cat(pieces, 1), attn(x), "decoded")


def test_strips_keep_no_pairs():
    attn = zoo.create("neural", 512, 8, causal=True)
    x = draw(1, 512, 512, dtype=torch.float32).requires_grad_()
    sizes = {}
    for route in ("neural_strips", "reference"):
        attn.route = route
        attn(x).sum().backward()
        sizes[route] = peak(lambda: attn(x).sum().backward(), "cpu")
    assert sizes["neural_strips"] < 0.25 * sizes["reference"]  # projections and q, k, v included


def test_who_takes_what():
    x = draw(2, 5, 32)
    attn = build(proj_dim=4)
    assert attn.explain(x).route == "neural_strips"
    assert attn.explain(x, draw(2, 7, 32)).route == "neural_strips"
    assert "bias" in attn.explain(x, bias=draw(5, 5)).refused["neural_strips"]
    for spec, named in (
        ("neural+alibi", "alibi"),
        ("neural+sliding_window(window=2)", "sliding_window"),
        ("neural+entmax", "entmax"),
        ("neural(activation=gelu)", "gelu"),
    ):
        assert named in build(spec=spec).explain(x).refused["neural_strips"]
    assert "dropout" in build(dropout=0.5).train().explain(x).refused["neural_strips"]
    assert build(spec="neural+rope").explain(x).route == "neural_strips"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_dim": 0}, r"proj_dim=0 of 'neural' must be a whole number of at least 1"),
        ({"proj_dim": -3}, r"proj_dim=-3 of .* at least 1"),
        ({"proj_dim": 2.6}, r"proj_dim=2.6.*nearest: 2, 3"),
        ({"proj_dim": True}, r"proj_dim=True"),
        ({"proj_dim": 5}, r"proj_dim=5.*even.*nearest: 4, 6.*or give hidden"),
        ({"hidden": ()}, r"hidden=\(\).*one or two layers, e\.g\. \(2,\) or \(2, 1\)"),
        ({"hidden": (4, 2, 1)}, r"hidden=\(4, 2, 1\).*one or two layers"),
        ({"hidden": 4}, r"hidden=4.*one or two layers"),
        ({"hidden": (4, 0)}, r"hidden=\(4, 0\).*at least 1"),
        ({"activation": "relo"}, r"'relo'.*did you mean 'relu'"),
        ({"heads": 3}, r"dim=32 is not divisible by heads=3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**{"dim": 32, **options})


def test_causal_attention_takes_no_context():
    with pytest.raises(zoo.ZooError, match="context given to causal attention"):
        build(causal=True)(draw(1, 5, 32), draw(1, 7, 32))
