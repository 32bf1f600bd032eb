"""Transformer-XL's relative positions: both forms against double loops, routes, decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.errors import ZooError
from zoo.host.engine import strips
from zoo.position.transformer_xl import relative_sinusoid, transformer_xl_reference
from zoo.testing.tolerances import assert_close

ROUTES = ("dense", "engine")


def make(spec="transformer_xl", dim=12, heads=3, **options):
    """Host in float64 whose parameters have moved away from their start."""
    attn = zoo.create(spec, dim, heads, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.position.parameters():
            parameter.normal_(std=0.4)
    return attn


def double_loop(attn, x, positions, context=None, context_positions=None):
    """Scores pair by pair, as the paper writes them."""
    part, dim = attn.position, x.shape[-1]
    q, k, _ = attn.project(x, context, None)
    groups = q.shape[1] // k.shape[1]
    w_r = part.w_r.weight.view(q.shape[1], q.shape[3], dim)
    k_pos = positions if context is None else context_positions
    scores = torch.zeros(x.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.float64)
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            d = int(positions[i]) - int(k_pos[j])
            w = [10000 ** (-2 * m / dim) for m in range(dim // 2)]
            r = torch.tensor(
                [math.sin(d * f) for f in w] + [math.cos(d * f) for f in w], dtype=torch.float64
            )
            for h in range(q.shape[1]):
                content = ((q[:, h, i] + part.u[h]) * k[:, h // groups, j]).sum(-1)
                position = (q[:, h, i] + part.v[h]) @ (w_r[h] @ r)
                scores[:, h, i, j] = attn.scale * (content + position)
    return scores


def scores(attn, x, context=None, **inputs):
    """Scores of all strips put together, before masks; and whether the shift form made them."""
    positions, others = inputs.get("positions"), inputs.get("context_positions")
    call = attn.begin(x, context, positions=positions, context_positions=others)
    out = torch.zeros(*call.q.shape[:3], call.k.shape[2], dtype=torch.float64)
    for strip in strips(call, attn.select):
        out[strip.batch, :, strip.rows, strip.keys] = attn.position.bias(strip, attn.score(strip))
    return out, "relative" in call.prepared["position"]


def gradients(attn, x, **inputs):
    """Output and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    attn.zero_grad()
    y = attn(x, **inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in attn.named_parameters()}}


def test_sines_come_before_cosines():
    row = relative_sinusoid(torch.tensor([-3]), 4)[0]
    expected = [math.sin(-3), math.sin(-0.03), math.cos(-3), math.cos(-0.03)]
    assert_close(row, torch.tensor(expected))


@pytest.mark.parametrize("spec", ["transformer_xl", "mqa+transformer_xl"])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("shift", [False, True])
def test_bidirectional_scores_equal_a_double_loop(spec, offset, shift, many_strips):
    attn = make(spec)
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    positions = torch.arange(10) + offset
    expected = double_loop(attn, x, positions)
    # The same positions given for each sample take the form that needs no order.
    given = positions if shift else positions.expand(2, 10)
    found, shifted = scores(attn, x, positions=given)
    assert shifted == shift
    assert_close(found, expected)
    reference = transformer_xl_reference(
        *(t.repeat_interleave(3 // t.shape[1], 1) for t in attn.project(x, None, None)[:2]),
        *(attn.position.w_r.weight, attn.position.u, attn.position.v),
        *(positions, positions, attn.scale),
    )
    assert_close(reference, expected)


@pytest.mark.parametrize("shift", [False, True])
def test_causal_scores_equal_a_double_loop(shift, many_strips):
    attn = make(causal=True)
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    positions = torch.arange(10) + 5
    found, shifted = scores(attn, x, positions=positions if shift else positions.expand(2, 10))
    assert shifted == shift
    assert_close(found.tril(), double_loop(attn, x, positions).tril())


def test_arbitrary_positions_equal_a_double_loop(many_strips):
    attn = make()
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    shared = torch.tensor([3, 3, 0, 90, 7, 8, 9, 11])
    found, shifted = scores(attn, x, positions=shared)
    assert not shifted
    assert_close(found, double_loop(attn, x, shared))
    each = torch.stack((shared, torch.randperm(40)[:8]))
    found, _ = scores(attn, x, positions=each)
    for b in range(2):
        assert_close(found[b : b + 1], double_loop(attn, x[b : b + 1], each[b]))


@pytest.mark.parametrize("rows", [2, 9])
def test_context_equals_a_double_loop(rows, many_strips):
    attn = make()
    x = torch.randn(2, rows, 12, dtype=torch.float64)
    context = torch.randn(2, 7, 12, dtype=torch.float64)
    places = torch.arange(rows) + 4, torch.arange(7) + 1
    found, shifted = scores(attn, x, context, positions=places[0], context_positions=places[1])
    assert shifted == (rows == 9)  # for two queries the other form has fewer products
    assert_close(found, double_loop(attn, x, places[0], context, places[1]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_host_equals_softmax_of_the_double_loop(causal, heads):
    attn = make(heads=heads, causal=causal)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    s = double_loop(attn, x, torch.arange(7))
    if causal:
        s = s.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    v = attn.project(x, None, None)[2]
    assert_close(attn(x), attn.combine(s.softmax(-1) @ v, x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", ["gqa(kv_heads=3)+transformer_xl", "differential+transformer_xl"])
def test_routes_and_forms_agree_with_all_gradients(causal, spec, many_strips):
    attn = make(spec, 24, 6, causal=causal)
    x = torch.randn(3, 13, 24, dtype=torch.float64)
    inputs = {"mask": torch.rand(3, 1, 13, 13) > 0.2}
    found = {}
    for attn.route in ROUTES:
        for name, positions in (("shift", None), ("turn", torch.arange(13).expand(3, 13))):
            found[attn.route, name] = gradients(attn, x, positions=positions, **inputs)
    expected = found.pop(("dense", "shift"))
    for name in ("position.u", "position.v", "position.w_r.weight"):
        assert expected[name].abs().max() > 0
    for form, values in found.items():
        for name, value in expected.items():
            assert_close(values[name], value, f"{form} {name}", gradient=True)


def test_only_distances_matter():
    attn = make(causal=True)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    for positions in (torch.arange(9) + 1000, (torch.arange(9) + 1000).expand(2, 9)):
        assert_close(attn(x, positions=positions), attn(x))


def test_fused_strips_are_refused():
    attn = make(route="sdpa_strips")
    with pytest.raises(ZooError, match="depends on queries or scores"):
        attn(torch.randn(1, 4, 12, dtype=torch.float64))


@pytest.mark.parametrize("spec", ["transformer_xl", "sliding_window(window=4)+transformer_xl"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_decoding_equals_parallel(spec, chunk):
    attn = make(spec, causal=True)
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    cache = zoo.LayerCache()
    steps = [attn(x[:, :9], cache=cache)]
    steps += [attn(x[:, i : i + chunk], cache=cache) for i in range(9, 19, chunk)]
    assert_close(torch.cat(steps, 1), attn(x))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor):
                # What it occupies: an expanded view is no larger than its base.
                self.elements = max(self.elements, item.untyped_storage().nbytes() // 8)
        return out


@pytest.mark.parametrize("batched", [False, True])
def test_holds_no_tensor_of_all_pairs(batched, many_strips):
    attn = make(dim=16, heads=2, causal=True)
    x = torch.randn(1, 200, 16, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(200).expand(1, 200) if batched else None
    with Largest() as seen:
        attn(x, positions=positions).sum().backward()
    assert seen.elements < 200 * 200 / 2


def test_parameters_start_normal_and_init_weights_draws_them_again():
    attn = zoo.create("transformer_xl", 256, 8)
    for _ in range(2):
        for parameter in attn.position.parameters():
            assert abs(float(parameter.detach().std()) - 0.02) < 0.002
            parameter.detach().fill_(5.0)
        attn.init_weights()


def test_runs_on_meta():
    attn = zoo.create("transformer_xl", 16, 4, device="meta")
    out = attn(torch.randn(2, 9, 16, device="meta"))
    assert out.is_meta
    assert out.shape == (2, 9, 16)


def test_odd_dim_is_refused():
    with pytest.raises(ZooError, match=r"dim=9 of 'transformer_xl' .* even .*nearest: 8, 10"):
        zoo.create("transformer_xl", 9, 3)
