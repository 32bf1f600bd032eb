"""Lightning attention: the official code's numbers, its forms, decays, LRPE, decoding, refusals."""

from __future__ import annotations

import pytest
import torch
from golden_files import under
from torch.nn.functional import layer_norm, silu

import zoo
from zoo.attend import _norm_gate
from zoo.attend.lightning import (
    FORMS,
    decay_slopes,
    lightning_attention,
    lrpe,
    srms_norm,
)
from zoo.cache import LayerCache
from zoo.ops import _linear_work
from zoo.ops._linear_features import ACTIVATIONS, Features
from zoo.ops.linear import chunked_linear_attention
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [
    {},
    {"variant": "tnl3", "decay": 0.9},
    {"decay": None, "lrpe": True, "act": "elu", "norm": "rms", "gate": "none", "value_act": True},
]


def build(spec="lightning", **options):
    options = {"dim": 12, "heads": 3, "causal": True, "dtype": torch.float64, **options}
    return zoo.create(spec, **options)


def compare_operator(tensors, metadata):
    chunk = max(1, tensors["in.q"].shape[2] // 4)  # of any size: no result depends on it
    for mode in FORMS:
        q, k, v = (tensors[f"in.{n}"].clone().requires_grad_() for n in "qkv")
        o = lightning_attention(q, k, v, tensors["in.slope"], mode, chunk=chunk)
        assert_close(o, tensors["out.o"], f"{mode}: output")
        grads = torch.autograd.grad((o * tensors["in.w"]).sum(), (q, k, v))
        for name, grad in zip("qkv", grads, strict=True):
            what = f"{mode}: gradient of {name}"
            assert_close(grad, tensors[f"grad.{name}"], what, gradient=True)
        plain = lightning_attention(q, k, v, mode=mode)
        assert_close(plain, tensors["out.o_no_decay"], f"{mode}: without decay")


def compare_module(tensors, metadata):
    """Variant tnl3: SiLU on v, LayerNorm, low-rank gate; no first layer, so without LRPE."""
    config, theirs = metadata["config"]["tnl"], under(tensors, "param.tnl.")
    assert config["layer_idx"] > 0
    facts = {"depth": config["layer_idx"], "layers": config["num_layers"], "bias": config["bias"]}
    spec, sizes = "lightning(variant=tnl3)", (config["embed_dim"], config["num_heads"])
    attn = zoo.create(spec, *sizes, causal=True, **facts)
    slopes = torch.tensor(attn.attend.slopes)
    assert_close(slopes, tensors["out.tnl.slope_rate"].flatten(), "slopes")
    layers = {
        "project.qkv": ("q_proj", "k_proj", "v_proj"),
        "attend.norm": ("norm",),
        "attend.gate.0": ("output_gate.0",),
        "attend.gate.1": ("output_gate.1",),
        "combine.proj": ("o_proj",),
    }
    names = {
        f"{ours}.{kind}": [f"{layer}.{kind}" for layer in found]
        for ours, found in layers.items()
        for kind in ("weight", "bias")
        if f"{found[0]}.{kind}" in theirs
    }
    state = {ours: torch.cat([theirs[n] for n in found]) for ours, found in names.items()}
    attn.load_state_dict(state)
    x = tensors["in.tnl.x"].clone().requires_grad_()
    y = attn(x)
    assert_close(y, tensors["out.tnl.y"], "output")
    y.sum().backward()
    for ours, found in names.items():
        wanted = torch.cat([tensors[f"grad.tnl.{n}"] for n in found])
        assert_close(attn.get_parameter(ours).grad, wanted, f"gradient of {ours}", gradient=True)
    assert_close(x.grad, tensors["grad.tnl.x"], "gradient of x", gradient=True)


def compare_slopes(tensors, metadata):
    counts = under(tensors, "out.slopes_h")
    assert counts
    for heads, wanted in counts.items():
        found = torch.tensor(decay_slopes("alibi", int(heads), 0, None))
        assert_close(found, wanted.flatten(), f"{heads} heads")


def compare_lrpe(tensors, metadata):
    layer = metadata["config"]["tnl1"]["lrpe_layers"][0]
    theta = tensors[f"param.tnl1.transnormer.h.{layer}.token_mixer.lrpe.theta"].squeeze(1)
    x = tensors["in.tnl1.lrpe_x"]
    y = lrpe(x, theta, torch.arange(x.shape[2]))
    assert_close(y, tensors["out.tnl1.lrpe_y"], "lrpe")


def test_equals_the_official_code(golden):
    compare_operator(*golden("lightning_attention"))


def test_the_example_module_of_the_official_code(golden):
    compare_module(*golden("lightning_attention"))


def test_slopes_of_the_official_code(golden):
    compare_slopes(*golden("lightning_attention"))


def test_lrpe_of_the_official_code(golden):
    compare_lrpe(*golden("lightning_attention"))


def test_another_golden_file(other_golden):
    file = other_golden("lightning_attention")
    for compare in (compare_operator, compare_module, compare_slopes, compare_lrpe):
        compare(*file)


def test_by_hand():
    q, k, v = (torch.tensor(x).double().view(1, 1, 3, 1) for x in ([1, 2, 1], [1, 1, 2], [1, 2, 3]))
    slope = torch.tensor(2.0).double().log()
    for mode in FORMS:
        o, state = lightning_attention(q, k, v, slope, mode, chunk=2, return_state=True)
        assert o.flatten().tolist() == pytest.approx([1, 5, 7.25]), mode
        assert state.item() == pytest.approx(7.25)


def test_slopes_at_their_ends():
    q, k, v = (draw(1, 2, 70, 4, seed=i) for i in range(3))
    alone = (q * k).sum(-1, keepdim=True) * v
    assert_close(lightning_attention(q, k, v, torch.inf), alone, "infinite slope")
    none = lightning_attention(q, k, v)
    assert_close(lightning_attention(q, k, v, [0.0, 0.0]), none, "slope of zero")
    assert_close(none, (q @ k.mT).tril() @ v, "plain linear attention")


def test_linear_in_the_values_and_blind_to_absolute_time():
    q, k, v, w = (draw(1, 2, 40, 4, seed=i) for i in range(4))
    slope = [0.1, 0.5]
    parts = [lightning_attention(q, k, x, slope) for x in (v, w)]
    both = lightning_attention(q, k, 2 * v - w, slope)
    assert_close(both, 2 * parts[0] - parts[1], "linear in v")
    zeros = torch.zeros(1, 2, 9, 4, dtype=torch.float64)
    late = lightning_attention(*(torch.cat([zeros, x], 2) for x in (q, k, v)), slope)
    assert_close(late[:, :, 9:], parts[0], "the same nine steps later")


def test_state_goes_from_piece_to_piece_and_packed_sequences_keep_apart():
    q, k, v = (draw(1, 2, 30, 4, seed=i) for i in range(3))
    whole, last = lightning_attention(q, k, v, 0.3, return_state=True)
    first, state = lightning_attention(*(x[:, :, :11] for x in (q, k, v)), 0.3, return_state=True)
    rest = [x[:, :, 11:] for x in (q, k, v)]
    second, after = lightning_attention(*rest, 0.3, initial_state=state, return_state=True)
    assert_close(torch.cat([first, second], 2), whole, "in two pieces")
    assert_close(after, last, "state")
    packed = lightning_attention(q, k, v, 0.3, cu_seqlens=torch.tensor([0, 11, 30]))
    alone = lightning_attention(*rest, 0.3)
    assert_close(packed, torch.cat([first, alone], 2), "packed")


def test_backends_agree():
    tensors = [draw(2, h, 19, 4, seed=h) for h in (4, 2, 2)]
    expected = lightning_attention(*tensors, 0.2, backend="reference")
    for backend in ("auto", "torch"):
        assert_close(lightning_attention(*tensors, 0.2, backend=backend), expected, backend)


def test_lrpe_is_a_cosine_of_the_distance():
    q, k, theta = draw(1, 2, 6, 3), draw(1, 2, 6, 3, seed=1), draw(2, 3, seed=2)
    at = torch.tensor([4, 7, 8, 20, 21, 40])
    found = lrpe(q, theta, at) @ lrpe(k, theta, at).mT
    gap = (at[:, None] - at).double()
    cosines = (gap[None, :, :, None] * theta[:, None, None]).cos()
    wanted = (q[:, :, :, None] * k[:, :, None] * cosines).sum(-1)
    assert_close(found, wanted, "scores")
    batched = lrpe(q.expand(2, -1, -1, -1), theta, torch.stack([at, at + 5]))
    assert_close(batched[:1], lrpe(q, theta, at), "positions of a batch")
    with pytest.raises(zoo.ZooError, match="whole steps"):
        lrpe(q, theta, at + 0.5)


def test_layer_by_its_equations():
    """Gate, norm over all heads, LRPE, activations: line by line, for a grouped layer."""
    attn = build(heads=4, kv_heads=2, depth=0, layers=3)
    part, x = attn.attend, draw(2, 9, 12)
    q, k, v = attn.project(x, None, None)
    q, k = silu(q), silu(k)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    q, k = (lrpe(t, part.theta, torch.arange(9)) for t in (q, k))
    gap = torch.arange(9)[:, None] - torch.arange(9)
    alibi = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], dtype=torch.float64)
    decay = (-(alibi * (1 + 1e-5))[:, None, None] * gap).exp().tril()
    heads = ((q @ k.mT) * decay @ v).transpose(1, 2).flatten(2)
    normed = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(attn(x), attn.combine.proj(normed * part.gate(x)), "layer")


@pytest.mark.parametrize("options", CONTRACT_OPTIONS, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_routes_agree(options, kv_heads):
    attn = zoo.create(
        "lightning", 12, 4, kv_heads=kv_heads, causal=True, dtype=torch.float64, **options
    )
    assert attn.explain(draw(1, 3, 12)).route == "lightning"
    x, mask = draw(2, 67, 12), torch.ones(2, 1, 1, 67, dtype=torch.bool)
    mask[1, ..., :5] = False
    for inputs in ({}, {"mask": mask}):
        attn.route = "reference"
        expected = settle(attn, x, **inputs)
        for name in ("auto", "lightning", "recurrent"):
            attn.route = name
            for item, value in settle(attn, x, **inputs).items():
                assert_close(value, expected[item], f"{name}: {item}", gradient=item != "output")


def test_decoding_keeps_a_state_of_fixed_size():
    attn, cache = build(spec="lightning(lrpe=True)"), zoo.LayerCache()
    x = draw(2, 80, 12)
    with torch.no_grad():
        rows = [attn(piece, cache=cache) for piece in x.split([70, 1, 1, 8], 1)]
        assert_close(torch.cat(rows, 1), attn(x), "decoded")
    assert cache.nbytes == 2 * 3 * 8 * 4 * 8, "batch x heads x 2 D x D doubles"
    for name in ("reference", "recurrent"):
        attn.route, other = name, zoo.LayerCache()
        with torch.no_grad():
            found = [attn(piece, cache=other) for piece in x.split([70, 10], 1)]
        assert_close(torch.cat(found, 1), torch.cat(rows, 1), f"decoded by {name}")


def test_state_is_float32_for_half_precision():
    attn, cache = build(dtype=torch.bfloat16), zoo.LayerCache()
    attn(draw(2, 5, 12, dtype=torch.bfloat16), cache=cache)
    assert cache.get_state("lightning").dtype == torch.float32


def test_a_norm_with_a_bias_is_silent_where_nothing_is_seen():
    attn = build(spec="lightning(variant=tnl3)")
    with torch.no_grad():
        attn.attend.norm.bias.fill_(1.0)
    x, mask = draw(2, 9, 12), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :4] = False
    with torch.no_grad():
        y = attn(x, mask=mask)
        assert not bool(y[1, :4].any())
        assert bool(y[1, 4:].all())
        cache = zoo.LayerCache()
        pieces = [(0, 3), (3, 6), (6, 9)]
        rows = [attn(x[:, a:b], mask=mask[..., :b], cache=cache) for a, b in pieces]
        assert_close(torch.cat(rows, 1), y, "decoded")
        packed = attn(x[1:], mask=mask[1:], cu_seqlens=torch.tensor([0, 3, 9]))
        assert not bool(packed[0, :4].any())
        visible = torch.ones(1, 1, 1, 9, dtype=torch.bool)
        visible[..., 5:7] = False
        packed = attn(x[1:], mask=visible, cu_seqlens=torch.tensor([0, 5, 9]))
        assert not bool(packed[0, 5:7].any()), "what the sequence before saw does not count"
        assert bool(packed[0, :5].all())


def test_dropout_hides_keys_for_good_and_keeps_the_mean():
    spec = "lightning(norm=none, gate=none, decay=None, lrpe=False)"
    attn = build(spec=spec, dim=4, heads=1, dropout=0.5)
    with torch.no_grad():
        attn.combine.proj.weight.copy_(torch.eye(4))
    x = draw(1, 6, 4)
    plain = attn.eval()(x)
    total = attn.train()(x.expand(20000, -1, -1))
    scale = float(plain.detach().abs().max())
    assert float((total.mean(0) - plain).detach().abs().max()) < 0.05 * scale
    q, k, v = attn.project(x, None, None)
    weights = (silu(q) @ silu(k).mT).tril()
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6).double()
    possible = torch.stack([weights[0, 0] @ (v[0, 0] * s[:, None]) for s in subsets])
    nearest = (possible - total[0]).abs().amax((1, 2)).min()
    assert float(nearest.detach()) < 1e-12


@pytest.mark.parametrize(
    ("spec", "extra"),
    [
        ("lightning", 16 * 16 + 4 * 4),
        ("lightning(lrpe=False)", 16 * 16),
        ("lightning(variant=tnl3, lrpe=False)", 2 * 16 * 4 + 2 * 16),
        ("lightning(gate=none, norm=rms, lrpe=False)", 16),
    ],
)
def test_parameters(spec, extra):
    attn = zoo.create(spec, 16, 4, causal=True)
    assert sum(p.numel() for p in attn.parameters()) == 4 * 16**2 + extra


def test_lrpe_stands_in_the_first_layer_and_starts_as_in_the_code():
    first, second = (build(depth=d, layers=2).attend.theta for d in (0, 1))
    assert second is None
    wanted = 10000 ** (-2 * torch.arange(12).double() / 12)
    assert_close(first, wanted.view(3, 4), "theta")
    assert build(spec="lightning(lrpe=True)", depth=1).attend.theta is not None


def test_decays():
    by_layer = [decay_slopes("alibi", 8, depth, 4) for depth in range(4)]
    assert [s[0] for s in by_layer] == pytest.approx([0.500005, 0.3333383, 0.1666717, 0.000005])
    assert decay_slopes("alibi", 2, 0, 1) == decay_slopes("alibi", 2, 5, None) == (1 / 16, 1 / 256)
    assert decay_slopes("paper", 4, 1, 4) == pytest.approx((1.5, 3.0, 4.5, 6.0))
    assert decay_slopes("fla", 4, 1, 4) == pytest.approx((0.0, 1.5, 3.0, 4.5))
    assert decay_slopes([1.0, 0.5], 2, 3, 4) == pytest.approx((0.0, 0.6931472))
    assert decay_slopes(0.5, 2, 0, None) == pytest.approx((0.6931472, 0.6931472))
    assert decay_slopes(None, 2, 0, None) is None


@pytest.mark.parametrize("decay", [0.0, 1.5, -0.5, [0.5, 1.1, 0.5], [0.5, 0.0, 1.0]])
def test_a_decay_outside_of_its_range_is_refused(decay):
    place = r"\[1\]" if isinstance(decay, list) else ""
    with pytest.raises(zoo.ZooError, match=rf"decay{place}=\S+ must be a number in \(0, 1\]"):
        build(decay=decay)
    with pytest.raises(zoo.ZooError, match=r"decay=nan must be a number in \(0, 1\]"):
        decay_slopes(float("nan"), 2, 0, None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decay": [0.5, 0.5]}, "one for each of the 3 heads"),
        ({"decay": "alibbi"}, "did you mean 'alibi'"),
        ({"variant": "tnl4"}, "variant"),
        ({"act": "swish"}, "act"),
        ({"norm": "batch"}, "norm"),
        ({"gate": "full"}, "gate"),
        ({"lrpe": 1}, "lrpe=1"),
        ({"act": ["silu"]}, "act"),
        ({"variant": ["tnl"]}, "variant"),
        ({"value_act": "no"}, "value_act='no'"),
        ({"scale": 0.3}, r"scale=0\.3"),
        ({"causal": False}, "causal"),
        ({"depth": 2, "layers": 2}, "depth=2"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, named):
    with pytest.raises(zoo.ZooError, match=named):
        build(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"slope": [0.1, -0.1]}, "slope="),
        ({"slope": torch.tensor([0.1, torch.nan])}, "slope="),
        ({"slope": [0.1, 0.1, 0.1]}, "slope of shape"),
        ({"slope": "alibi"}, "slope='alibi'"),
        ({"slope": {}}, "slope="),
        ({"slope": [[0.1], [0.1, 0.2]]}, "slope="),
        ({"slope": True}, "slope has dtype torch.bool"),
        ({"slope": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"q": torch.zeros(7, 4)}, "q of shape"),
        ({"q": torch.zeros(2, 7, 4), "slope": [0.1, 0.1]}, "q of shape"),
        ({"k": torch.zeros(1, 2, 7, 4, device="meta")}, "k is on meta"),
        ({"initial_state": torch.zeros(1, 2, 4, 4, device="meta")}, "initial_state is on meta"),
        ({"cu_seqlens": [0, 7]}, "cu_seqlens is of type list"),
        ({"mode": ["chunk"]}, "mode"),
        ({"mode": "chunks"}, "did you mean 'chunk'"),
        ({"backend": "cuda"}, "backend"),
        ({"mode": "recurrent", "backend": "triton"}, "mode='chunk' only"),
        ({"backend": "triton"}, "float64"),
        ({"chunk": 0}, "chunk=0"),
        ({"initial_state": torch.zeros(1, 2, 4, 4).half()}, "float16"),
        ({"initial_state": torch.zeros(1, 2, 4, 5)}, "initial_state of shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
        ({"k": torch.zeros(1, 2, 7, 3)}, "k of shape"),
        ({"v": torch.zeros(1, 2, 6, 4)}, "v of shape"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(options, named):
    q, k, v = (draw(1, 2, 7, 4, seed=i) for i in range(3))
    with pytest.raises(zoo.ZooError, match=named):
        lightning_attention(**{"q": q, "k": k, "v": v, **options})


def test_the_kernel_is_refused_with_its_reason():
    attn = build(dtype=torch.float32)
    attn.route = "lightning_triton"
    with pytest.raises(zoo.ZooError, match="cannot take this pass"):
        build(route="lightning_triton")(draw(1, 5, 12))  # float64
    wide = build(spec="lightning(lrpe=True)", head_dim=80, dtype=torch.float32)
    wide.route = "lightning_triton"
    with pytest.raises(zoo.ZooError, match="160 wide"):
        wide(draw(1, 5, 12, dtype=torch.float32))


@pytest.mark.parametrize("spec", ["lightning", "lightning(decay=None, lrpe=False)", "linear"])
def test_the_kernel_equals_the_reference(spec):
    pytest.importorskip("triton", reason="the kernel needs Triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attn = build(spec=spec, dim=32, heads=2, kv_heads=1, dtype=torch.float32, device=device)
    x = draw(1, 37, 32, dtype=torch.float32).to(device)
    for inputs in ({}, {"cu_seqlens": torch.tensor([0, 9, 37], device=device)}):
        attn.route = "reference"
        expected = settle(attn, x, **inputs)
        attn.route = f"{spec.partition('(')[0]}_triton"
        for name, value in settle(attn, x, **inputs).items():
            gradient = name != "output"
            assert_close(value, expected[name], name, gradient=gradient, backend="triton")


def test_the_functional_form_runs_the_kernel_by_name():
    pytest.importorskip("triton", reason="the kernel needs Triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [draw(1, 2, 37, 16, seed=i, dtype=torch.float32).to(device) for i in range(3)]
    before = draw(1, 2, 16, 16, seed=4, dtype=torch.float32).to(device)
    options = {"initial_state": before, "return_state": True}
    found = lightning_attention(*tensors, [0.1, 0.9], backend="triton", **options)
    expected = lightning_attention(*tensors, [0.1, 0.9], backend="reference", **options)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "kernel", backend="triton")


def operands(length=67, *, turned=True, dtype=torch.float64):
    """Leaves for the fused features: grouped, odd in every size, q as a projection lays it out."""
    leaves = {
        "q": draw(2, length, 4, 5, dtype=dtype).transpose(1, 2),
        "k": draw(2, 2, length, 5, seed=1, dtype=dtype),
        "v": draw(2, 2, length, 3, seed=2, dtype=dtype),
    }
    wide = torch.promote_types(dtype, torch.float32)
    leaves["state"] = draw(2, 4, 10 if turned else 5, 3, seed=3, dtype=wide)
    if turned:
        leaves["theta"] = draw(4, 5, seed=4, dtype=wide)
    return {name: x.detach().requires_grad_() for name, x in leaves.items()}


def attend(leaves, act, positions, *, fused, **options):
    """Outputs and last states, with the features in the segments or ahead of them."""
    features = Features(act, leaves.get("theta"), positions)
    q, k, v = (leaves[name] for name in "qkv")
    if fused:
        options["features"] = features
    else:
        q, k, v = features.apply(q, k, v)
    slopes = torch.tensor([-0.5, -0.1, 0.0, -3.0])
    return chunked_linear_attention(
        q, k, v, slopes, initial_state=leaves.get("state"), chunk=6, **options
    )


def gradients(outs, leaves):
    """Of a sum that weighs every number of the outputs differently."""
    loss = sum((y.double() * draw(*y.shape, seed=9)).sum() for y in outs)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def assert_fused(leaves, act, positions, **options):
    found = attend(leaves, act, positions, fused=True, **options)
    expected = attend(leaves, act, positions, fused=False, **options)
    dtype = leaves["q"].dtype
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, "output", dtype=dtype)
    expected = gradients(expected, leaves)
    for name, grad in gradients(found, leaves).items():
        assert_close(grad, expected[name], f"gradient of {name}", gradient=True, dtype=dtype)


def every(length):
    return torch.arange(length)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("segment", [6, 30, 4096])
def test_fused_features_equal_their_plain_form(monkeypatch, act, turned, segment):
    monkeypatch.setattr(_linear_work, "SEGMENT", segment)
    leaves = operands(turned=turned)
    assert_fused(leaves, act, every(67))
    batched = torch.stack([every(67), 3 + 2 * every(67)])
    assert_fused(leaves, act, batched)


def test_fused_features_of_packed_sequences():
    leaves = {name: x[:1].detach().requires_grad_() for name, x in operands().items()}
    leaves["theta"] = operands()["theta"]
    leaves["state"] = draw(3, 4, 10, 3, seed=5).requires_grad_()
    bounds = torch.tensor([0, 20, 20, 67])
    positions = torch.cat([every(20), every(47)])
    assert_fused(leaves, "silu", positions, cu_seqlens=bounds)


@pytest.mark.parametrize("missing", ["q", "k", "v", "state", "theta"])
def test_fused_features_where_only_some_want_gradients(missing):
    leaves = operands(13)
    leaves[missing] = leaves[missing].detach()
    assert_fused(leaves, "silu", every(13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_fused_features_of_other_types(dtype, act):
    assert_fused(operands(13, dtype=dtype), act, every(13))


@pytest.mark.parametrize("length", [0, 1])
def test_fused_features_of_next_to_nothing(length):
    assert_fused(operands(length), "silu", every(length))


def test_fused_features_by_differences_and_twice():
    leaves = {name: x.detach()[:1].requires_grad_() for name, x in operands(7).items()}
    leaves["theta"] = operands(7)["theta"]
    names = tuple(leaves)

    def form(*tensors):
        leaves = dict(zip(names, tensors, strict=True))
        return attend(leaves, "silu", every(7), fused=True)

    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(form, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(form, tensors, fast_mode=True)


def test_fused_features_give_way_to_compilers_and_transforms():
    leaves = operands(13)

    def loss(theta):
        held = {name: x.detach() for name, x in leaves.items()} | {"theta": theta}
        return attend(held, "silu", every(13), fused=True)[0].square().sum()

    theta = leaves["theta"]
    expected = torch.autograd.grad(loss(theta), theta)[0]
    assert_close(torch.func.grad(loss)(theta.detach()), expected, "torch.func", gradient=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(
        torch.autograd.grad(compiled(theta), theta)[0], expected, "compiled", gradient=True
    )


def norm_inputs(norm, gated, dtype=torch.float64):
    leaves = {"y": draw(2, 7, 3, 5, dtype=dtype).transpose(1, 2).flatten(2)}  # 3 rows of 35
    if gated:
        leaves["gate"] = draw(2, 3, 35, seed=1, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if norm in ("rms", "layer"):
        leaves["weight"] = draw(35, seed=2, dtype=wide)
    if norm == "layer":
        leaves["bias"] = draw(35, seed=3, dtype=wide)
    return {name: x.requires_grad_() for name, x in leaves.items()}


def run_norm(form, norm, leaves, sigmoid=False):
    others = (leaves.get("weight"), leaves.get("bias"))
    return form(leaves["y"], leaves.get("gate"), norm, *others, 1e-3, sigmoid)


@pytest.mark.parametrize("norm", _norm_gate.NORMS)
@pytest.mark.parametrize("gate", ["plain", "sigmoid", None])
@pytest.mark.parametrize("piece", [1, 70, 1 << 17])
def test_norm_and_gate_equal_their_plain_form(monkeypatch, norm, gate, piece):
    monkeypatch.setattr(_norm_gate, "PIECE", piece)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        leaves = norm_inputs(norm, gate is not None, dtype)
        forms = (_norm_gate.norm_gate, _norm_gate.plain_norm_gate)
        found, expected = (run_norm(f, norm, leaves, gate == "sigmoid") for f in forms)
        assert found.dtype == expected.dtype == dtype
        assert_close(found, expected, "output")
        expected = gradients([expected], leaves)
        for name, grad in gradients([found], leaves).items():
            what = f"gradient of {name}"
            assert_close(grad, expected[name], what, gradient=True, dtype=dtype)


@pytest.mark.parametrize("norm", _norm_gate.NORMS)
@pytest.mark.parametrize("sigmoid", [True, False])
def test_norm_and_gate_by_differences_and_twice(norm, sigmoid):
    leaves = norm_inputs(norm, True)
    leaves = {name: x.detach()[..., :5].requires_grad_() for name, x in leaves.items()}

    def form(*tensors):
        return run_norm(
            _norm_gate.norm_gate, norm, dict(zip(leaves, tensors, strict=True)), sigmoid
        )

    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(form, tensors)
    assert torch.autograd.gradgradcheck(form, tensors)


@pytest.mark.parametrize("missing", ["y", "gate", "weight", "bias"])
def test_norm_and_gate_where_only_some_want_gradients(missing):
    leaves = norm_inputs("layer", True)
    leaves[missing] = leaves[missing].detach()
    forms = (_norm_gate.norm_gate, _norm_gate.plain_norm_gate)
    found, expected = (gradients([run_norm(f, "layer", leaves)], leaves) for f in forms)
    for name, grad in found.items():
        assert_close(grad, expected[name], f"gradient of {name}", gradient=True)


def test_norm_and_gate_give_way_to_compilers_and_transforms():
    leaves = norm_inputs("layer", True)

    def loss(y):
        return run_norm(_norm_gate.norm_gate, "layer", {**leaves, "y": y}).square().sum()

    y = leaves["y"]
    expected = torch.autograd.grad(loss(y), y)[0]
    assert_close(torch.func.grad(loss)(y.detach()), expected, "torch.func", gradient=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(y), y)[0], expected, "compiled", gradient=True)


def test_a_norm_without_weight_and_of_nothing():
    y = draw(2, 3, 8)
    wanted = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(_norm_gate.norm_gate(y, None, "srms"), wanted, "srms")
    assert_close(srms_norm(y), wanted, "srms on its own")
    assert _norm_gate.norm_gate(y[:, :0], y[:, :0], "srms").shape == (2, 0, 8)


@pytest.mark.parametrize("options", [{}, {"variant": "tnl3", "lrpe": True}], ids=str)
def test_a_layer_under_autocast(options):
    attn = zoo.create("lightning", 12, 3, causal=True, **options)
    x = draw(2, 19, 12, dtype=torch.float32)
    expected = settle(attn, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = settle(attn, x)
    for name, value in found.items():
        gradient = name != "output"
        assert_close(
            value, expected[name], name, gradient=gradient, backend="autocast", dtype=torch.bfloat16
        )


@pytest.mark.parametrize("norm", _norm_gate.NORMS)
def test_a_gate_in_half_precision_is_squashed_in_full(norm):
    y, gate = draw(3, 8).float(), draw(3, 8, seed=1).bfloat16()
    found, wanted = (
        form(y, gate, norm, sigmoid=True)
        for form in (_norm_gate.norm_gate, _norm_gate.plain_norm_gate)
    )
    assert_close(found, wanted, norm)


@pytest.mark.parametrize("pieces", [[0, 6], [2, 0, 4]])
def test_empty_pieces_between_tokens_that_see_nothing(pieces):
    """The bias of the norm stays out of hidden tokens, however the sequence is cut."""
    attn = build("lightning(variant=tnl3)")
    with torch.no_grad():
        attn.attend.norm.bias.fill_(1.0)
    x, mask = draw(2, 6, 12), torch.tensor([False] * 4 + [True] * 2).expand(2, 1, 1, 6)
    cache, at, outs = LayerCache(), 0, []
    with torch.no_grad():
        for size in pieces:
            seen = mask[..., : at + size] if size else None
            outs.append(attn(x[:, at : at + size], mask=seen, cache=cache))
            at += size
        assert_close(torch.cat(outs, 1), attn(x, mask=mask), "outputs")


@pytest.mark.parametrize("spec", ["lightning", "lightning(act=none, lrpe=False)"])
def test_sums_of_float16_over_many_tokens_stay_finite(spec):
    """The sums pass 65504 here; only the norm behind them brings them back."""
    x = layer_norm(torch.randn(1, 16384, 256), (256,))
    attn = zoo.create(spec, 256, 4, causal=True)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.mul_(4)
        expected = attn(x)
        y = attn.half()(x.half())
    assert y.dtype == torch.float16
    assert_close(y, expected, "in float16", backend="torch")
