"""Fourier position embedding: official numbers, coefficients, kept tables, heads of groups."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from golden_files import read
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

import zoo
from zoo.errors import ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.parts import Layout
from zoo.position import fope
from zoo.position.fope import FoPE, fope_reference
from zoo.position.rope import RoPE, rope_frequencies
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [
    {},
    {"sigma": 0.6, "zero_sin": 0.0, "separate_basis": False, "train_len": 20},
    {
        "base": 20.0,
        "fourier_dim": 8,
        "ignore_zero": False,
        "separate_head": False,
        "scaling": "yarn",
        "factor": 2.0,
    },
]
ROUTES = ("dense", "engine", "sdpa_strips", "sdpa")
WHOLE = {"floor_ratio": 0, "ignore_zero": False}


def part(width=16, heads=2, k_heads=None, train_len=64, **options):
    k_heads = k_heads or heads
    layout = Layout(heads, heads, k_heads, k_heads, width, width)
    return FoPE(layout, train_len=train_len, **options)


def turn(module, x, positions):
    """Turn x (B, H, N, D) as keys."""
    return module.rotate(x, x, positions, positions)[1]


def expected(module, x, positions, coef=None):
    """Turn x (B, H, N, D) one pair after another; a head has the coefficients of its group."""
    coef = module.coef if coef is None else coef
    sin, cos = coef[0], coef[-1]
    sin, cos = (c.repeat_interleave(x.shape[1] // len(c), 0).to(x.dtype) for c in (sin, cos))
    w = module.frequencies(x.dtype)
    return fope_reference(x, positions.to(x.dtype), w, sin, cos, module.zero_sin)


def gradients(attn, x):
    """Output and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    attn.zero_grad()
    y = backward(attn, x)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in attn.named_parameters()}}


def backward(attn, x):
    """Output of a pass whose gradients are left where they belong."""
    y = attn(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return y


def variants(tensors, metadata):
    return list(metadata["config"]["variants"])


def golden_part(config, **options):
    """The part with what all variants of a file share."""
    width, heads = config["head_dim"], config["n_heads"]
    base, length = config["rope_theta"], config["max_sequence_length"]
    return part(width, heads, train_len=length, **{"base": base, **options})


def options_of(config, variant):
    """Ours for those of the official code."""
    given = dict(config["variants"][variant])
    sizes = given.pop("input_dim"), given.pop("output_dim")
    options = {"sigma": config["fourier_init_norm_gain"]}
    if given.pop("fourier_init", "norm") == "eye":
        options["sigma"] = 0
    if not given.pop("rope_clamp_floor_freq", True):
        options["floor_ratio"] = 0
    ours = {
        "fourier_dim": "fourier_dim",
        "fourier_ignore_zero": "ignore_zero",
        "rope_theta": "base",
    }
    return options | {ours[name]: value for name, value in given.items()}, sizes


def compare_variant(tensors, metadata, variant):
    config = metadata["config"]
    options, sizes = options_of(config, variant)
    module = golden_part(config, **options)
    assert (module.inputs, module.pairs) == sizes
    assert_close(module.frequencies(), tensors[f"param.{variant}.inv_freq"][0])
    coef = torch.stack([tensors[f"param.{variant}.{basis}_coef"] for basis in ("sin", "cos")])
    if options["sigma"] == 0:
        assert torch.equal(module.coef, coef)
    module.coef.copy_(coef)
    x, far = (tensors[f"in.{variant}.{name}"] for name in ("q", "q_far"))
    few = tensors[f"out.{variant}.q_rot_last2"].shape[2]
    # The far rows are the last ones of a pass that is longer than training by the usual length.
    steps = torch.arange(config["seq"])
    last = torch.arange(config["seq"] + config["max_sequence_length"])[-far.shape[2] :]
    cases = (
        ("q_rot", x, steps),
        ("q_rot_last2", x[:, :, -few:], steps[-few:]),
        ("q_rot_far", far, last),
    )
    for name, q, positions in cases:
        out = tensors[f"out.{variant}.{name}"]
        for turned in module.rotate(q, q, positions, positions):
            assert_close(turned, out, name)
        assert_close(expected(module, q, positions), out, f"reference {name}")


def compare_rope(tensors, metadata):
    config = metadata["config"]
    heads, width, base = config["n_heads"], config["head_dim"], config["rope_theta"]
    module = golden_part(config, sigma=0, **WHOLE)
    x, steps = tensors["in.default.q"], torch.arange(config["seq"])
    assert_close(turn(module, x, steps), tensors["out.rope.q_rot"])
    rope = RoPE(Layout(heads, heads, heads, heads, width, width), base=base)
    assert_close(turn(module, x, steps * 7), turn(rope, x, steps * 7))
    apart = golden_part(config, sigma=0, floor_ratio=0, out_pairs=width // 2)
    assert_close(turn(apart, x, steps), tensors["out.rope.q_rot"])


@pytest.mark.parametrize("variant", variants(*read("fope")))
def test_equals_official(golden, variant):
    compare_variant(*golden("fope"), variant)


def test_identity_and_all_frequencies_are_rope(golden):
    compare_rope(*golden("fope"))


def test_another_golden_file(other_golden):
    file = other_golden("fope")
    for variant in variants(*file):
        compare_variant(*file, variant)
    compare_rope(*file)


def test_by_hand():
    # Frequencies 1 and 0.01; 7 tokens are one turn of the first only.
    module = part(4, 1, train_len=7, zero_sin=0.5)
    assert module.coef.shape == (2, 1, 1, 1)
    module.coef.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    sin, cos = 2 * math.sin(1), 3 * math.cos(1)
    turned = torch.tensor([cos - 3 * sin, 2 - 0.5 * 4, 3 * cos + sin, 4 + 0.5 * 2])
    assert_close(turn(module, x, torch.tensor([1]))[0, 0, 0], turned)
    assert_close(turn(module, x, torch.tensor([0]))[0, 0, 0], torch.tensor([3.0, 0.0, 9.0, 5.0]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_sin": 0.0, "separate_basis": False},
        {"separate_head": False, "fourier_dim": 20, "out_pairs": 5},
        {"ignore_zero": False, "scaling": "linear", "factor": 3.0},
    ],
)
@pytest.mark.parametrize(("width", "k_heads"), [(12, 4), (12, 2), (12, 1), (2, 2)])
def test_equals_reference(options, width, k_heads):
    if width == 2:
        options = {k: v for k, v in options.items() if k not in ("fourier_dim", "out_pairs")}
    module = part(width, 4, k_heads, 600, dtype=torch.float64, **options)
    q = torch.randn(2, 4, 5, width, dtype=torch.float64)
    k = torch.randn(2, k_heads, 7, width, dtype=torch.float64)
    q_pos, k_pos = torch.tensor([0, 3, 2, 9000, 5]), torch.randint(0, 900, (2, 7))
    q_turned, k_turned = module.rotate(q, k, q_pos, k_pos)
    assert_close(q_turned, expected(module, q, q_pos))
    for b in range(2):
        assert_close(k_turned[b : b + 1], expected(module, k[b : b + 1], k_pos[b]))


def test_noise_follows_xavier_on_three_dimensions():
    torch.manual_seed(3)
    module = part(64, 8, train_len=2048, sigma=0.6)
    assert module.coef.shape == (2, 8, 21, 16)
    torch.manual_seed(3)
    eye = torch.zeros(21, 16)
    for i in range(11):  # ceil(21 / 16) = 2, and the columns from 11 on get none
        eye[2 * i, i] = 1
    for basis in module.coef:
        assert torch.equal(basis, nn.init.xavier_normal_(torch.empty(8, 21, 16), 0.6) + eye)
    noise = (module.coef - eye).std()
    assert float(noise) == pytest.approx(0.6 * math.sqrt(2 / (21 * 16 + 8 * 16)), rel=0.05)
    one = part(64, 8, train_len=2048, separate_head=False)
    assert one.coef.shape == (2, 1, 21, 16)
    noise = (one.coef - eye).std()
    assert float(noise) == pytest.approx(0.3 * math.sqrt(2 / (21 + 16)), rel=0.12)
    assert not torch.equal(one.coef[0], one.coef[1])


def test_a_seed_means_the_same_in_every_type():
    made = []
    for dtype in (None, torch.float64, torch.bfloat16):
        torch.manual_seed(5)
        made.append(part(dtype=dtype).coef)
    assert [coef.dtype for coef in made] == [torch.float32, torch.float64, torch.float32]
    assert torch.equal(made[0], made[1].float())
    assert torch.equal(made[0], made[2])


def test_frequencies_kept_grow_with_the_length_of_training():
    counts = []
    for length in (7, 16, 64, 500, 2000, 10**5):
        module = part(32, train_len=length)
        w = module.frequencies(torch.float64)
        assert_close(w, rope_frequencies(32, dtype=torch.float64)[: module.kept])
        assert float(w[-1]) * length >= 2 * math.pi
        if module.kept < 16:
            assert float(w[-1]) * 10000 ** (-2 / 32) * length < 2 * math.pi
        counts.append(module.kept)
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 16
    assert part(32, train_len=500, floor_ratio=4.0).kept == part(32, train_len=125).kept


def test_length_of_training_is_the_hosts_unless_told():
    kept = {}
    for length, options in ((64, {}), (5000, {}), (5000, {"train_len": 64})):
        attn = zoo.create("fope", 32, 1, max_len=length, **options)
        kept[length, len(options)] = attn.position.kept
    assert kept[64, 0] == kept[5000, 1] < kept[5000, 0]


@pytest.mark.parametrize("zero_sin", [0.0, 1.0])
def test_pairs_at_rest_do_not_see_positions(zero_sin):
    module = part(32, train_len=2000, zero_sin=zero_sin)
    pairs = module.pairs
    assert pairs == 8
    x = torch.randn(1, 2, 1, 32).expand(1, 2, 50, 32)
    turned = turn(module, x, torch.arange(50)).unflatten(-1, (2, 16))
    rest = turned[..., pairs:]
    assert torch.equal(rest, rest[:, :, :1].expand_as(rest))
    assert (turned[:, :, 1:, :, :pairs] - turned[:, :, :1, :, :pairs]).abs().amax() > 0.1
    # A turn by 45 degrees and a stretch by sqrt 2 on both sides: the part of q . k doubles.
    still = x.unflatten(-1, (2, 16))[..., pairs:]
    assert_close(rest.square().sum(), (1 + zero_sin) * still.square().sum())


def test_distance_alone_matters_only_without_noise():
    q, k = torch.randn(2, 1, 2, 1, 32, dtype=torch.float64).expand(2, 1, 2, 40, 32)
    spread = {}
    for sigma in (0.0, 0.3):
        module = part(32, sigma=sigma, dtype=torch.float64)
        a, b = module.rotate(q, k, torch.arange(40), torch.arange(40))
        diagonal = (a @ b.transpose(-1, -2)).diagonal(7, -2, -1)
        spread[sigma] = float((diagonal - diagonal[..., :1]).abs().max())
    assert spread[0.0] < 1e-12
    assert spread[0.3] > 0.01


def test_last_rows_alone_and_beyond_training():
    module = part(16, train_len=24)
    x, steps = torch.randn(1, 2, 200, 16), torch.arange(200)
    turned = turn(module, x, steps)
    assert_close(turn(module, x[:, :, 197:], steps[197:]), turned[:, :, 197:])
    assert_close(turned, expected(module, x, steps))


def test_coefficients_are_saved_and_not_trained():
    attn = zoo.create("fope", 32, 2, max_len=64)
    assert "position.coef" in attn.state_dict()
    assert not any("position" in name for name, _ in attn.named_parameters())
    other = zoo.create("fope", 32, 2, max_len=64)
    x = torch.randn(2, 9, 32)
    assert not torch.equal(other.position.coef, attn.position.coef)
    before = other(x)  # tables of the old coefficients are in use when the new ones come
    file = io.BytesIO()
    torch.save(attn.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), attn(x))
    assert (other(x) - before).abs().max() > 1e-3


def test_a_models_own_init_leaves_the_coefficients():
    model = DecoderLM(11, dim=16, depth=2, heads=2, attention="fope", max_len=24)
    found = [m for m in model.modules() if isinstance(m, FoPE)]
    before = [module.coef.clone() for module in found]
    assert len(found) == 2
    assert not torch.equal(before[0], before[1])
    model.init_weights()
    assert all(torch.equal(m.coef, c) for m, c in zip(found, before, strict=True))
    found[0].reset_parameters()
    assert not torch.equal(found[0].coef, before[0])


def test_learnable_coefficients_get_the_references_gradient():
    module = part(8, 4, 2, train_len=2000, learnable=True, dtype=torch.float64)
    assert [name for name, _ in module.named_parameters()] == ["coef"]
    q = torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    steps = torch.arange(7) * 3
    for _ in range(2):  # the second pass must not meet tables of the first
        turned = module.rotate(q, q[:, :2], steps, steps)[0]
        due = expected(module, q, steps)
        assert_close(turned, due)
        weight = torch.randn_like(turned)
        found = torch.autograd.grad((turned * weight).sum(), (q, module.coef))
        wanted = torch.autograd.grad((due * weight).sum(), (q, module.coef))
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, gradient=True)
        with torch.no_grad():
            module.coef.add_(wanted[1])


def test_coefficients_that_are_no_parameters_get_their_gradient():
    """Plain tensors in their place, by functional_call or as a function of other parameters."""
    attn = zoo.create("fope", 24, 3, max_len=64, learnable=True, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    due = gradients(attn, x)["position.coef"]
    coef = attn.position.coef.detach().clone()
    functional_call(attn, {"position.coef": coef}, (x,))  # nobody trains them: tables may be kept
    for _ in range(2):
        coef.requires_grad_().grad = None
        backward(lambda x: functional_call(attn, {"position.coef": coef}, (x,)), x)
        assert_close(coef.grad, due, gradient=True)
    parametrize.register_parametrization(attn.position, "coef", nn.Identity())
    with torch.no_grad():
        attn(x)
    assert_close(gradients(attn, x)["position.parametrizations.coef.original"], due, gradient=True)


def test_transforms_of_torch_func_meet_no_kept_tables():
    module, steps = part(8, dtype=torch.float64), torch.arange(9)
    x, first = torch.randn(1, 2, 9, 8, dtype=torch.float64), module.coef
    other = part(8, dtype=torch.float64).coef

    def turned(coef):
        module.coef = coef
        return turn(module, x, steps)

    plain = torch.stack([turned(other), turned(first)])
    assert module._memo is not None
    assert_close(vmap(turned)(torch.stack([other, first])), plain)
    slopes = grad(lambda coef: turned(coef).square().sum())(first)
    known = first.clone().requires_grad_()
    (due,) = torch.autograd.grad(expected(module, x, steps, known).square().sum(), known)
    assert_close(slopes, due, gradient=True)
    assert torch.equal(turned(first), plain[1])


def test_tensors_without_values_meet_no_kept_tables():
    attn, x = zoo.create("fope", 32, 2, max_len=64), torch.randn(2, 5, 32)
    y = attn(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            assert attn(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    assert torch.equal(attn(x), y)


def test_tables_are_kept_only_while_nothing_changes(monkeypatch):
    made = []
    plain = fope.fope_tables
    monkeypatch.setattr(fope, "fope_tables", lambda *args: made.append(1) or plain(*args))
    module = part(16)
    x, steps = torch.randn(2, 2, 9, 16), torch.arange(9)

    def count(action=None, x=x, positions=steps):
        if action is not None:
            action()
        made.clear()
        assert_close(turn(module, x, positions), expected(module, x, positions))
        return len(made)

    assert count() == 1
    assert count() == 0
    assert count(positions=steps.clone()) == 0
    assert count(positions=steps + 1) == 1
    assert count(positions=steps) == 1
    assert count(lambda: module.coef.data.mul_(2)) == 1
    assert count(lambda: module.load_state_dict(part(16).state_dict())) == 1
    assert count(x=x.double()) == 1
    assert count(x=x.double()) == 0
    assert count(lambda: module.double()) == 1
    assert count(module.float) == 1
    assert count(module.reset_parameters) == 1
    assert count() == 0
    monkeypatch.setattr(fope, "MEMO_BYTES", 2 * 2 * 9 * 16 * 4 - 1)
    assert count() == 1
    assert count() == 1


def test_kept_tables_are_neither_copied_nor_harmful():
    module = part(16)
    x, steps = torch.randn(2, 2, 9, 16), torch.arange(9)
    with torch.inference_mode():
        expected_now = turn(module, x, torch.arange(9)).clone()
    x.requires_grad_()
    turn(module, x, steps).sum().backward()
    assert x.grad is not None
    assert_close(turn(module, x, steps), expected_now)
    assert len(pickle.dumps(module)) < len(pickle.dumps(part(16))) + 100
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._memo is None
        assert torch.equal(turn(other, x, steps), turn(module, x, steps))


def test_results_do_not_depend_on_what_came_before():
    x, steps = torch.randn(1, 2, 100, 16), torch.arange(100)
    fresh, used = part(16), part(16)
    used.load_state_dict(fresh.state_dict())
    turn(used, x, steps)
    for length in (3, 50, 99):
        short = turn(fresh, x[:, :, :length], steps[:length])
        assert torch.equal(turn(used, x[:, :, :length], steps[:length]), short)


def test_half_precision_is_turned_in_float32():
    module = part(16)
    x, positions = torch.randn(1, 2, 2, 16).bfloat16(), torch.tensor([256, 257])
    due = expected(module, x.float(), positions).bfloat16()
    assert_close(turn(module, x, positions), due)
    assert torch.equal(turn(module, x, positions), turn(module, x.float(), positions).bfloat16())
    module.reset_parameters()
    with torch.autocast("cpu", torch.bfloat16):
        turned = turn(module, x.float(), positions)
    assert_close(turned, expected(module, x.float(), positions), dtype=torch.float32)


def test_linear_scaling_divides_positions_and_keeps_the_frequencies():
    plain, scaled = part(16), part(16, scaling="linear", factor=4)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 2, 5, 16)
    assert_close(turn(scaled, x, torch.arange(5) * 4), turn(plain, x, torch.arange(5)))


def test_yarn_slows_the_frequencies_kept_as_in_rope_without_its_temperature():
    module = part(32, base=500.0, train_len=256, scaling="yarn", factor=4.0, sigma=0)
    due = rope_frequencies(32, 500.0, "yarn", 4.0, 256)[: module.kept]
    assert_close(module.frequencies(), due)
    plain = part(32, base=500.0, train_len=256, sigma=0)
    assert plain.kept == module.kept
    ratio = plain.frequencies() / due
    assert float(ratio[0]) == 1
    assert float(ratio[-1]) > 2
    x, zero = torch.randn(1, 2, 1, 32), torch.tensor([0])
    assert torch.equal(turn(module, x, zero), turn(plain, x, zero))


@pytest.mark.parametrize(
    "spec", ["gqa(kv_heads=2)+fope", "mqa+fope", "mha+fope(separate_head=False)"]
)
@pytest.mark.parametrize("causal", [False, True])
def test_host_equals_brute_force(spec, causal):
    attn = zoo.create(spec, 32, 4, causal=causal, max_len=64, dtype=torch.float64)
    x, steps = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9)
    q, k, v = attn.project(x, None, None)
    k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
    q, k = (expected(attn.position, t, steps) for t in (q, k))
    scores = q @ k.transpose(-1, -2) / 8**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    assert_close(attn(x), attn.combine(scores.softmax(-1) @ v, x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("learnable", [False, True])
def test_routes_agree_with_all_gradients(causal, learnable, many_strips):
    facts = {"head_dim": 8, "causal": causal, "max_len": 50, "dtype": torch.float64}
    attn = zoo.create("gqa(kv_heads=2)+fope", 24, 4, learnable=learnable, **facts)
    x = torch.randn(3, 13, 24, dtype=torch.float64)
    found = {}
    for attn.route in ROUTES:
        found[attn.route] = gradients(attn, x)
    assert ("position.coef" in found["dense"]) == learnable
    for route in ROUTES[1:]:
        for name, value in found["dense"].items():
            assert_close(found[route][name], value, f"{route} {name}", gradient=True)


@pytest.mark.parametrize("grouping", ["pair", "official"])
def test_a_query_turns_like_the_key_that_it_meets(grouping):
    """Differential attention pairs heads, so that grouped keys are not met in plain order."""
    spec = f"differential(kv_grouping={grouping})+fope"
    attn = zoo.create(spec, 32, 4, kv_heads=2, causal=True, max_len=64, dtype=torch.float64)
    assert attn.position.coef.shape[1] == 4
    x, steps = torch.randn(1, 1, 6, 4, dtype=torch.float64), torch.arange(6)
    q, k = attn.position.rotate(x.expand(1, 8, 6, 4), x.expand(1, 4, 6, 4), steps, steps)
    met = attn.normalize.share_keys(k)
    met = met.repeat_interleave(8 // met.shape[1], 1)
    assert torch.equal(q, met)
    assert not torch.equal(met[:, 0], met[:, 1]) or grouping == "official"
    copied = pickle.loads(pickle.dumps(attn))
    y = torch.randn(2, 7, 32, dtype=torch.float64)
    assert torch.equal(copied(y), attn(y))


def test_more_key_heads_than_coefficients():
    module = part(8, 4, 2, dtype=torch.float64)
    x, steps = torch.randn(1, 4, 5, 8, dtype=torch.float64), torch.arange(5)
    q, k = module.rotate(x, x, steps, steps)
    assert torch.equal(q, k)
    with pytest.raises(ZooError, match="coefficients for 2 key heads, but is given keys of 3"):
        module.rotate(x, x[:, :3], steps, steps)


def test_compiles_with_learnable_coefficients():
    attn = zoo.create("fope", 16, 2, causal=True, max_len=32, learnable=True, dtype=torch.float64)
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert_close(compiled(x), attn(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": None}, "train_len=None of 'fope'.* give train_len or the host's max_len"),
        ({"train_len": 0}, "train_len=0 of 'fope' must be a whole number of at least 1"),
        ({"train_len": 6}, "no frequency makes 1 turns .* nearest allowed: train_len=7"),
        ({"train_len": 60, "floor_ratio": 10}, "nearest allowed: train_len=63"),
        ({"base": 1}, "base=1 of 'fope' must be a number above 1"),
        ({"sigma": -0.1}, "sigma=-0.1 of 'fope' must be a number of at least 0"),
        ({"floor_ratio": -1}, "floor_ratio=-1"),
        ({"zero_sin": "no"}, "zero_sin='no'"),
        ({"out_pairs": 0}, "out_pairs=0"),
        ({"out_pairs": 3}, "out_pairs=3 .*nearest: 2.*, with 2 frequencies kept"),
        ({"out_pairs": 9, "floor_ratio": 0}, "out_pairs=9 .*nearest: 8.* 8 pairs of a head"),
        ({"fourier_dim": 17}, r"fourier_dim=17 .* even .*\(nearest: 16, 18\)"),
        ({"fourier_dim": 8}, r"fourier_dim=8 .*\(nearest: 16\), not below the width"),
        ({"ignore_zero": False, "out_pairs": 2}, "out_pairs=2 .* no effect with ignore_zero=False"),
        ({"ignore_zero": False, "zero_sin": 0.0}, "zero_sin=0.0 .* no effect"),
        ({"scaling": "ntk"}, "unknown scaling of 'fope' 'ntk'"),
        ({"scaling": "linear", "factor": 0.5}, "factor=0.5 of 'fope' must be"),
        ({"factor": 2.0}, "factor=2.0 of 'fope' has no effect with scaling='none'"),
        ({"head_dim": 5}, "width 5 .* choose head_dim so that the width is even, e.g. 6"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        zoo.create("fope", 32, 2, **{"max_len": 50, **options})
