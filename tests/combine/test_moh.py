"""Mixture-of-head attention: golden values, the routers, the balance loss, skipped rows."""

from __future__ import annotations

import math
import re
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from golden_files import read, under
from torch import Tensor

import zoo
from zoo.combine import _selected_rows, moh
from zoo.combine._selected_rows import SelectedRows
from zoo.combine.moh import (
    MoH,
    head_usage,
    moh_gates_reference,
    moh_reference,
    query_norm_gates_reference,
)
from zoo.models.language.decoder_lm import DecoderLM
from zoo.ops import flops
from zoo.parts import Layout
from zoo.project.mha import MHA
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

# Not with shared_heads=2: there a choice of the contracts' tokens is so close that rounding the
# router to bfloat16 turns it. Its second stage is tried here.
CONTRACT_OPTIONS = [{}, {"shared_heads": 0, "top_k": 2}, {"router": "query_norm"}]
ROUTERS = {"routed": "wg", "shared": "wg_1", "balance": "wg_0"}
VARIANTS = [
    {},
    {"shared_heads": 0, "top_k": 2},
    {"shared_heads": 2, "top_k": 1},
    {"shared_heads": 3, "top_k": 1},
    {"shared_heads": 4},
    {"router": "query_norm"},
    {"router": "query_norm", "shared_heads": 0, "top_k": 2},
]


def build(spec="moh", heads=4, **options):
    options = {"dim": 8 * heads, "heads": heads, "dtype": torch.float64, **options}
    return zoo.create(spec, **options)


def gates_of(attn, x, **inputs):
    """What the part prepared for a pass."""
    seen = []
    hook = attn.combine.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    attn(x, **inputs)
    hook.remove()
    return seen[0]["gates"]


def weight(layer):
    return None if layer is None else layer.weight


GOLDEN_ROUTES = ("sdpa", "engine", "moh_skip")


def golden_variants(tensors, metadata):
    return list(metadata["config"]["variants"])


def compare_variant(tensors, metadata, variant, route):
    """Output, balance loss and all gradients of a layer of the diffusion model."""
    config = metadata["config"]
    wanted = config["variants"][variant]
    options = {"shared_heads": wanted["shared_head"], "top_k": wanted["routed_head"]}
    options |= {"aux_weight": config["aux_coeff"]}
    options["bias"] = f"param.{variant}.qkv.bias" in tensors
    attn = build(dim=config["dim"], heads=config["num_heads"], **options)
    routed = wanted["shared_head"] < config["num_heads"]
    if route == "moh_skip" and not routed:
        assert "moh_skip" not in zoo.host.attention.routes.names(attn), "nothing to skip"
        return
    attn.route = route
    names = {"project.qkv": "qkv", "combine.proj": "proj"}
    names |= {f"combine.{own}": theirs for own, theirs in ROUTERS.items()}

    def theirs(prefix, name):
        layer, _, kind = name.rpartition(".")
        return tensors[f"{prefix}.{names[layer]}.{kind}"]

    attn.load_state_dict({name: theirs(f"param.{variant}", name) for name in attn.state_dict()})
    x = tensors[f"in.{variant}.x"].clone().requires_grad_()
    y = attn(x)
    losses = zoo.auxiliary_losses(attn)
    loss = (y * tensors[f"in.{variant}.cotangent"]).sum() + sum(losses.values())
    loss.backward()
    assert_close(y, tensors[f"out.{variant}.y"], "output")
    aux = tensors[f"out.{variant}.aux"][0] * config["aux_coeff"]
    assert ("moh_balance" in losses) == routed
    if losses:
        # The official code averages the selection in float32.
        assert_close(losses["moh_balance"], aux, "balance loss", dtype=torch.float32)
    assert_close(x.grad, tensors[f"grad.{variant}.in.x"], "x", gradient=True)
    for name, parameter in attn.named_parameters():
        expected = theirs(f"grad.{variant}.param", name)
        assert_close(parameter.grad, expected, name, gradient=True)


class TransNeXtProject(MHA):
    """Queries and keys of the vision variant: of length one, scaled, with a learned addition."""

    embedding: Tensor
    factor: Tensor

    def forward(self, x, context, cache):
        q, k, v = super().forward(x, context, cache)
        q = (F.normalize(q, dim=-1) + self.embedding) * self.factor
        return q, F.normalize(k, dim=-1), v


def compare_vision(tensors, metadata):
    config = metadata["config"]
    options = {"shared_heads": config["shared"], "top_k": config["routed_topk"], "bias": True}
    heads = config["vit"]["num_heads"]
    attn = zoo.create("moh", config["dim"], heads, scale=1.0, **options)
    width = config["dim"] // heads
    layout = Layout(heads, heads, heads, heads, width, width)
    attn.project = TransNeXtProject(config["dim"], layout, bias=True)
    param = under(tensors, "param.vit.")
    attn.project.embedding = param["query_embedding"]
    temperature = F.softplus(param["temperature"])
    attn.project.factor = temperature * tensors["in.vit.seq_length_scale"]
    state = {f"project.qkv.{kind}": param[f"qkv.{kind}"] for kind in ("weight", "bias")}
    state |= {f"combine.proj.{kind}": param[f"proj.{kind}"] for kind in ("weight", "bias")}
    state |= {
        f"combine.{own}.weight": param[f"{name}.weight"]
        for own, name in ROUTERS.items()
        if f"{name}.weight" in param
    }
    attn.load_state_dict(state)
    hidden = F.linear(tensors["in.vit.rel_table"], param["cpb_fc1.weight"], param["cpb_fc1.bias"])
    table = F.linear(hidden.relu(), param["cpb_fc2.weight"], param["cpb_fc2.bias"])
    bias = table.T[:, tensors["in.vit.rel_index"].long()]  # (H, N, N)
    y = attn(tensors["in.vit.x"], bias=bias[None])
    assert_close(y, tensors["out.vit.y"], "output")


def compare_llama(tensors, metadata):
    config = metadata["config"]["llama"]
    heads, width, shared = config["num_heads"], config["head_dim"], config["shared"]
    style = "interleaved" if "interleaved" in config["rope"] else "half"
    spec = f"moh(router=query_norm)+rope(base={config['rope_theta']}, style={style})"
    options = {"kv_heads": config["kv_heads"], "head_dim": width, "causal": config["causal"]}
    options |= {"shared_heads": shared, "top_k": config["routed_topk"]}
    x = tensors["in.llama.x"]
    attn = zoo.create(spec, x.shape[-1], heads, **options)
    rows = [tensors[f"param.llama.{name}_proj.weight"] for name in "qkv"]
    out = tensors["param.llama.o_proj.weight"]
    attn.load_state_dict({"project.qkv.weight": torch.cat(rows), "combine.proj.weight": out})
    q = attn.project.queries(x)[:, shared:]
    norms = q.norm(dim=-1).transpose(1, 2).flatten(0, 1)
    assert_close(norms, tensors["out.llama.query_norms"], "norms")
    for mode in (True, False):  # the straight-through estimator changes no value
        attn.train(mode)
        for route in GOLDEN_ROUTES:
            attn.route = route
            assert_close(attn(x), tensors["out.llama.y"], f"output of {route}")


@pytest.mark.parametrize("route", GOLDEN_ROUTES)
@pytest.mark.parametrize("variant", golden_variants(*read("moh")))
def test_golden_with_gradients(golden, variant, route):
    compare_variant(*golden("moh"), variant, route)


def test_golden_vision(golden):
    compare_vision(*golden("moh"))


def test_golden_llama(golden):
    compare_llama(*golden("moh"))


def test_another_golden_file(other_golden):
    file = other_golden("moh")
    for variant in golden_variants(*file):
        for route in GOLDEN_ROUTES:
            compare_variant(*file, variant, route)
    compare_vision(*file)
    compare_llama(*file)


def plainly(attn, mask=None):
    """The host's forward by the reference functions, and the balance loss that it owes."""
    part = attn.combine

    def forward(x):
        q, k, v = attn.project(x, None, None)
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        part.aux_losses.clear()
        if part.router == "linear":
            layers = [weight(layer) for layer in (part.routed, part.shared, part.balance)]
            sizes = (q.shape[1], part.shared_heads, part.top_k)
            gates, loss = moh_gates_reference(x, *sizes, *layers)
            if loss is not None:
                part.aux_losses["moh_balance"] = part.aux_weight * loss
        else:
            gates = query_norm_gates_reference(q, part.shared_heads, part.top_k)
            p = q[:, part.shared_heads :].norm(dim=-1)
            p = (p / p.std(1, keepdim=True)).softmax(1)
            even = (gates[:, part.shared_heads :] > 0).double().mean((0, 2)) * p.mean((0, 2))
            part.aux_losses["moh_balance"] = part.aux_weight * even.mean() * p.shape[1] ** 2
        y = F.scaled_dot_product_attention(q, k, v, is_causal=attn.causal)
        return moh_reference(y, gates, part.proj.weight, part.proj.bias)

    return forward


@pytest.mark.parametrize("route", ["auto", "engine", "dense", "moh_skip"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(("causal", "kv_heads"), [(True, 4), (False, 2)])
def test_equals_reference(many_strips, options, causal, kv_heads, route):
    with patch.object(_selected_rows, "STRIP_ROWS", 3):
        attn = build(causal=causal, kv_heads=kv_heads, bias=True, aux_weight=0.3, **options)
        if route == "moh_skip" and not attn.combine.routed_heads:
            return
        attn.route = route
        x = draw(3, 17, 32)
        found = settle(attn, x)
    assert ("moh_balance" in attn.combine.aux_losses) == bool(attn.combine.routed_heads)
    attn.forward = plainly(attn)
    expected = settle(attn, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, name, gradient=name != "output")


@pytest.mark.parametrize(("shared", "top_k"), [(0, 3), (1, 1), (1, 2), (2, 2), (3, 1), (4, 0)])
def test_gates_of_a_token_sum_to_its_share(shared, top_k):
    attn = build(shared_heads=shared, top_k=top_k)
    x, part = 3 * draw(2, 9, 32), attn.combine
    gates = gates_of(attn, x)
    scale = x.new_ones(2, 9, 2)
    if 0 < shared < 4:
        scale = 2 * part.balance(x).softmax(-1)
        assert float(scale.detach().std()) > 0.1
        a = gates[:, :shared].sum(1) / shared + gates[:, shared:].sum(1) / top_k
        assert_close(a, torch.full_like(a, 2), "a_1 + a_2")
    assert_close(gates[:, :shared].sum(1), scale[..., 0] * shared, "shared")
    assert_close(gates[:, shared:].sum(1), scale[..., 1] * top_k, "routed")
    assert bool((gates[:, :shared] > 0).all())
    assert bool(((gates[:, shared:] > 0).sum(1) == top_k).all())


@pytest.mark.parametrize("router", moh.ROUTERS)
def test_ties_switch_on_no_more_heads_than_top_k(router):
    undecided = build(router=router, shared_heads=1, top_k=2)
    for parameter in undecided.parameters():
        parameter.data.zero_()
    for x in (draw(2, 9, 32), torch.zeros(2, 9, 32, dtype=torch.float64)):
        gates = gates_of(undecided, x)
        assert torch.equal(gates.sum(1), torch.full((2, 9), 3.0, dtype=torch.float64))
        assert bool(((gates == 0) | (gates == 1)).all())
        assert torch.equal(gates_of(undecided, x), gates)


def test_one_shared_head_has_the_gate_one():
    attn, x = build(shared_heads=1, top_k=2), draw(2, 9, 32)
    assert attn.combine.shared is None
    a = 2 * attn.combine.balance(x).softmax(-1)
    assert_close(gates_of(attn, x)[:, 0], a[..., 0], "a_1 and nothing else")
    bare = build(router="query_norm", shared_heads=1, top_k=2)
    assert torch.equal(gates_of(bare, x)[:, 0], torch.ones(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("shared", range(5))
@pytest.mark.parametrize(("causal", "kv_heads"), [(True, 4), (False, 2)])
def test_undecided_with_all_heads_on_is_multi_head_attention(shared, causal, kv_heads):
    """Output and gradients, that of x included: the gates stand still."""
    options = {"causal": causal, "kv_heads": kv_heads, "bias": True}
    attn = build(shared_heads=shared, top_k=4 - shared, **options)
    plain = build("mha", **options)
    plain.load_state_dict({name: attn.state_dict()[name] for name in plain.state_dict()})
    for layer in (attn.combine.routed, attn.combine.shared, attn.combine.balance):
        if layer is not None:
            layer.weight.data.zero_()
    x = draw(2, 9, 32)
    found = settle(attn, x)
    for name, value in settle(plain, x).items():
        assert_close(found[name], value, name, gradient=name != "output")
    bare = build(router="query_norm", shared_heads=shared, top_k=4 - shared, **options).eval()
    bare.load_state_dict(plain.state_dict())
    assert_close(bare(x), plain(x), "norms of queries")


@pytest.mark.parametrize("weight", [1.0, 0.01])
@pytest.mark.parametrize(("shared", "top_k"), [(0, 1), (0, 4), (1, 2), (2, 1)])
def test_balance_loss_of_an_undecided_router_is_top_k(shared, top_k, weight):
    attn = build(shared_heads=shared, top_k=top_k, aux_weight=weight)
    attn.combine.routed.weight.data.zero_()
    attn(draw(2, 9, 32))
    loss = zoo.auxiliary_losses(attn)["moh_balance"]
    assert loss.shape == ()
    assert float(loss.detach()) == pytest.approx(weight * top_k, rel=1e-12)
    bare = build(router="query_norm", shared_heads=shared, top_k=top_k, aux_weight=weight)
    bare(torch.zeros(2, 9, 32, dtype=torch.float64))
    loss = zoo.auxiliary_losses(bare)["moh_balance"]
    assert float(loss.detach()) == pytest.approx(weight * top_k, rel=1e-12)


@pytest.mark.parametrize("router", moh.ROUTERS)
def test_balance_loss_only_where_it_is_wanted(router):
    attn, x = build(router=router, aux_weight=0.3), draw(2, 9, 32)
    attn(x)
    assert set(zoo.auxiliary_losses(attn)) == {"moh_balance"}
    attn.eval()(x)
    assert zoo.auxiliary_losses(attn) == {}
    for options in ({"aux_weight": 0}, {"shared_heads": 4}):
        other = build(router=router, **options)
        other(x)
        assert zoo.auxiliary_losses(other) == {}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 3 + 2),  # one shared head needs no router
        ({"shared_heads": 0}, 4),
        ({"shared_heads": 2}, 2 + 2 + 2),
        ({"shared_heads": 3}, 1 + 3 + 2),
        ({"shared_heads": 4}, 4),
        ({"router": "query_norm"}, 0),
        ({"router": "query_norm", "shared_heads": 0, "top_k": 1}, 0),
    ],
)
def test_parameters_beside_those_of_multi_head_attention(options, rows):
    count = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in {"moh": build(**options), "mha": build("mha")}.items()
    }
    assert count["moh"] - count["mha"] == 32 * rows


@pytest.mark.parametrize(
    ("router", "heads", "shared", "top_k"),
    [
        ("linear", 1, 0, 1),
        ("linear", 2, 0, 1),
        ("linear", 6, 1, 3),
        ("linear", 16, 4, 8),
        ("query_norm", 1, 0, 1),
        ("query_norm", 2, 1, 1),
        ("query_norm", 32, 16, 8),  # LLaMA3-8B in the paper
    ],
)
def test_three_quarters_of_the_heads_by_default(router, heads, shared, top_k):
    part = MoH(heads, Layout(heads, heads, heads, heads, 1, 1), router=router)
    assert (part.shared_heads, part.top_k) == (shared, top_k)
    assert part.routed_heads == heads - shared


def unit_host(q=None, v=None, **options):
    """Heads of width one that weigh all keys alike, over tokens that are unit vectors.

    What token t gives a head stands in column t.
    """
    heads = len(v)
    attn = build(heads=heads, dim=heads, **options)
    with torch.no_grad():
        weight = attn.project.qkv.weight.zero_()
        for start, columns in ((0, q), (2 * heads, v)):
            if columns is not None:
                columns = torch.tensor(columns, dtype=torch.float64)
                weight[start : start + heads, : columns.shape[1]] = columns
        attn.combine.proj.weight.copy_(torch.eye(heads))
    return attn


def hand_example(**options):
    """Two shared and three routed heads, two of them on; odds 3 : 2 : 1 and 1 : 2 : 5."""
    attn = unit_host(v=[[2, 0], [4, 4], [2, 8], [10, 0], [0, 14]], **options)
    odds = {
        attn.combine.routed: [[3, 1], [2, 2], [1, 5]],
        attn.combine.shared: [[3, 1], [1, 1]],
        attn.combine.balance: [[1, 4], [3, 1]],
    }
    with torch.no_grad():
        for layer, rows in odds.items():
            layer.weight[:, :2] = torch.tensor([[math.log(n) for n in row] for row in rows])
    return attn, torch.eye(5, dtype=torch.float64)[None, :2]


HAND = {"shared_heads": 2, "top_k": 2}


@pytest.mark.parametrize("route", ["sdpa", "engine", "moh_skip"])
def test_by_hand(route):
    attn, x = hand_example(aux_weight=0.5, route=route, **HAND)
    expected = [
        # a = 1/2, 3/2; u = 3/4, 1/4; p = 3/6, 2/6, 1/6, of which 3/5 and 2/5 are left
        [1 / 2 * 2 * 3 / 4, 1 / 2 * 2 * 1 / 4, 3 / 2 * 2 * 3 / 5, 3 / 2 * 2 * 2 / 5, 0],
        # a = 8/5, 2/5; u = 1/2, 1/2; p = 1/8, 2/8, 5/8, of which 2/7 and 5/7 are left
        [8 / 5, 8 / 5, 0, 2 / 5 * 2 * 2 / 7, 2 / 5 * 2 * 5 / 7],
    ]
    expected = torch.tensor([expected], dtype=torch.float64)
    y = attn(x)
    # f = 1/2, 1, 1/2 and P = 15/48, 14/48, 19/48: 9 / 3 (15 + 28 + 19) / 96
    loss = zoo.auxiliary_losses(attn)["moh_balance"]
    assert float(loss.detach()) == pytest.approx(0.5 * 31 / 16, rel=1e-7)
    means = torch.tensor([1, 4, 5, 5, 7], dtype=torch.float64)
    sizes = {"dtype": torch.float32}  # the logarithms went through float32
    assert_close(gates_of(attn, x).transpose(1, 2), expected, "gates", **sizes)
    assert_close(y, expected * means, "output", **sizes)
    layers = (attn.combine.routed, attn.combine.shared, attn.combine.balance)
    gates, loss = moh_gates_reference(x, 5, 2, 2, *(layer.weight for layer in layers))
    assert_close(gates.transpose(1, 2), expected, "gates of the reference", **sizes)
    assert float(loss.detach()) == pytest.approx(31 / 16, rel=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_query_norms_by_hand(training):
    """Norms 2, 4, 6 and 9, 3, 6 are 1, 2, 3 and 3, 1, 2 of their standard deviations."""
    q = [[50, 0], [2, 9], [-4, 3], [6, -6]]
    attn = unit_host(q, v=[[1, 3]] * 4, router="query_norm", shared_heads=1, top_k=1, aux_weight=2)
    x = torch.eye(4, dtype=torch.float64)[None, :2]
    y = attn.train(training)(x)
    expected = torch.tensor([[[2, 0, 0, 2], [2, 2, 0, 0]]], dtype=torch.float64)
    assert_close(y, expected, "output")
    if training:
        # f = 1/2, 0, 1/2: L = 9 / 3 (P_1 + P_3) / 2, and P_1 + P_3 = (1 + p of the largest) / 2
        largest = math.e**2 / (1 + math.e + math.e**2)
        loss = float(zoo.auxiliary_losses(attn)["moh_balance"].detach())
        assert loss == pytest.approx(2 * 3 / 4 * (1 + largest), rel=1e-12)


def test_gradient_goes_straight_through_heads_that_are_on():
    """Keys of zero, so that queries matter for the gates alone."""
    attn = build(router="query_norm", heads=6, shared_heads=2, top_k=2, aux_weight=0)
    weight, x = attn.project.qkv.weight, draw(2, 9, 48)
    weight.data[48:96].zero_()

    def of_queries(y):
        (gradient,) = torch.autograd.grad(y, weight, allow_unused=True)
        return torch.zeros(48, 48) if gradient is None else gradient[:48]

    gates = gates_of(attn, x)[:, 2:]
    on = gates.detach() > 0.5
    assert bool((on.sum(1) == 2).all())
    assert not of_queries(gates[~on].sum()).any(), "a head that is off has a gradient"
    norms = attn.project.queries(x)[:, 2:].norm(dim=-1)
    p = (norms / norms.std(1, keepdim=True)).softmax(1)
    cotangent = draw(*p.shape, seed=3)
    wanted = of_queries((p * cotangent)[on].sum())
    assert float(wanted[16:].abs().max()) > 1e-3
    found = of_queries((gates_of(attn, x)[:, 2:] * cotangent).sum())
    assert_close(found, wanted, "gates", gradient=True)
    assert of_queries(attn(x).square().sum()).any()
    attn.eval()
    assert not gates_of(attn, x).requires_grad
    assert not of_queries(attn(x).square().sum()).any(), "a gradient without training"


def test_gradients_of_zero_queries_are_finite():
    """Norms without a spread, and without a direction."""
    attn = build(router="query_norm", aux_weight=0.3)
    found = settle(attn, torch.zeros(2, 9, 32, dtype=torch.float64))
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_gates_do_not_depend_on_rotations():
    x = draw(2, 9, 32)
    plain, turned = build(router="query_norm"), build("moh(router=query_norm)+rope")
    turned.load_state_dict(plain.state_dict())
    assert_close(gates_of(turned, x), gates_of(plain, x), "gates")


def test_two_queries_of_a_head_count_as_one_vector():
    """A differential head has two maps; its norm is that of both queries together."""
    attn = build("moh(router=query_norm, shared_heads=0, top_k=2)+differential").eval()
    x = draw(2, 9, 32)
    expected = attn.project.queries(x).unflatten(1, (4, 2)).square().sum((2, 4)).argsort(1)[:, 2:]
    gates = gates_of(attn, x)
    assert torch.equal(gates, torch.zeros_like(gates).scatter(1, expected, 1.0))


@pytest.mark.parametrize("router", moh.ROUTERS)
def test_routing_is_done_in_float32(router):
    """In half precision near ties would be ties."""
    attn = build(router=router, shared_heads=0, top_k=2, dtype=torch.bfloat16).eval()
    x = draw(4, 50, 32, dtype=torch.bfloat16)
    gates = gates_of(attn, x)
    assert gates.dtype == torch.float32
    if router == "linear":
        expected, _ = moh_gates_reference(x.float(), 4, 0, 2, attn.combine.routed.weight.float())
    else:
        expected = query_norm_gates_reference(attn.project.queries(x).float(), 0, 2)
    assert_close(gates, expected, "gates")


def test_routing_is_done_outside_autocast():
    attn, x = build(dtype=torch.float32), draw(2, 9, 32, dtype=torch.float32)
    expected = gates_of(attn, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gates_of(attn, x), expected)


def test_a_single_routed_head_has_the_gate_one_and_no_gradient():
    """Its share of itself: only the balance loss teaches such a router."""
    attn, x = build(shared_heads=0, top_k=1, aux_weight=0), draw(4, 50, 32)
    gates = gates_of(attn, x)
    assert bool(((gates == 0) | (gates == 1)).all())
    assert not settle(attn, x)["combine.routed.weight"].any()


def loss_of(attn, x, **inputs):
    attn(x, **inputs)
    return zoo.auxiliary_losses(attn)["moh_balance"]


LENGTHS = torch.tensor([9, 5])
PADDING = {
    "after": zoo.padding_mask(LENGTHS),
    "before": zoo.padding_mask(LENGTHS).flip(-1),
    "by head": zoo.padding_mask(LENGTHS).expand(2, 4, 1, 9),
    "by pair": zoo.padding_mask(LENGTHS) & torch.ones(9, 9, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("router", moh.ROUTERS)
@pytest.mark.parametrize("padding", PADDING)
def test_padding_does_not_count_in_the_balance_loss(padding, router, causal):
    attn = build(router=router, causal=causal)
    mask, x = PADDING[padding], draw(2, 9, 32).requires_grad_()
    real = mask.any(1).any(1)
    loss = loss_of(attn, x, mask=mask)
    together = loss_of(attn, x[real][None])  # a router does not ask where tokens stand
    assert_close(loss, together, "balance loss")
    assert abs(float((loss - loss_of(attn, x)).detach())) > 1e-5
    (gradient,) = torch.autograd.grad(loss, x)
    assert not gradient[~real].any()
    assert bool(gradient[real].any(-1).all())


def test_tokens_that_somebody_sees_count():
    attn, x = build(), draw(2, 9, 32)
    expected = loss_of(attn, x)
    mask = torch.zeros(2, 4, 9, 9, dtype=torch.bool)
    mask[:, 2] = torch.eye(9, dtype=torch.bool)
    assert_close(loss_of(attn, x, mask=mask), expected, "each token by itself, in one head")
    nobody = torch.zeros(9, 9, dtype=torch.bool)
    assert float(loss_of(attn, x, mask=nobody).detach()) == 0
    context = zoo.padding_mask(LENGTHS)
    found = loss_of(attn, x, context=draw(2, 9, 32, seed=1), mask=context)
    assert_close(found, expected, "a mask over the tokens of a context")


def test_padding_beside_cached_tokens():
    """The mask speaks of all keys held, the loss of the new tokens."""
    attn, x, cache = build(causal=True), draw(2, 9, 32), zoo.LayerCache()
    visible = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    visible[0, ..., 2] = visible[1, ..., 7] = False
    with torch.no_grad():
        attn(x[:, :4], cache=cache)
        found = loss_of(attn, x[:, 4:], mask=visible, cache=cache)
        expected = loss_of(attn, x[:, 4:][visible[:, 0, 0, 4:]][None])
    assert_close(found, expected, "balance loss")


def selected(attn, x):
    """What the fast route hands to its kernel in a pass."""
    with patch.object(SelectedRows, "apply", wraps=SelectedRows.apply) as apply:
        attn(x)
    (call,) = apply.call_args_list
    return call.args


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [v for v in VARIANTS if v != {"shared_heads": 4}], ids=str)
def test_only_selected_rows_are_computed(options, causal):
    attn, x = build(route="moh_skip", causal=causal, **options), draw(3, 17, 32)
    q, k, v, rows, counts, own, scale = selected(attn, x)
    part = attn.combine
    for given in (q, k, v):
        assert given.shape == (3, part.routed_heads, 17, 8), "a shared head is computed by rows"
    assert (own, scale) == (causal, 8**-0.5)
    assert len(rows) == sum(counts) == 3 * 17 * part.top_k
    on = gates_of(attn, x)[:, part.shared_heads :] > 0
    expected = [head.nonzero()[:, 0].tolist() for head in on.flatten(0, 1)]
    assert [piece.tolist() for piece in rows.split(counts)] == expected


def operations(route, x, **options):
    attn = build(route=route, **options)
    return flops.count(lambda: attn(x))


def test_only_selected_rows_cost_operations():
    x, options = draw(2, 17, 32), {"shared_heads": 1, "top_k": 1}
    saved = operations("sdpa", x, **options) - operations("moh_skip", x, **options)
    rows = 2 * 17 * (3 - 1)
    assert saved == rows * 2 * (2 * 8 * 17)  # a row of scores, and one of outputs


def test_selected_rows_cost_only_the_keys_of_their_past():
    x = draw(2, 60, 32)
    with patch.object(_selected_rows, "STRIP_ROWS", 3):
        full, causal = (operations("moh_skip", x, causal=c, **HAND) for c in (False, True))
    pairs = 2 * 60 * 2 * 60
    assert 0.4 < (full - causal) / (pairs * 2 * 2 * 8) < 0.5


def refusal(spec="moh(shared_heads=0, top_k=2)", tokens=1024, route="auto", **given):
    """Why the fast route does not take a pass, or None; without computing it."""
    inputs = {name: given.pop(name) for name in ("mask", "bias", "context") if name in given}
    attn = zoo.create(spec, 8, given.pop("heads", 4), route=route, **given)
    x = torch.zeros(1, tokens, 8, dtype=given.get("dtype"))
    return attn.explain(x, **inputs).refused.get("moh_skip")


def test_takes_long_sequences_with_few_heads_on():
    assert refusal() is None
    assert refusal(causal=True, kv_heads=2, dtype=torch.float64) is None
    assert refusal("moh(shared_heads=0, top_k=2)+rope") is None
    assert refusal("moh(shared_heads=2, top_k=1)+mqa") is None
    assert refusal("moh(router=query_norm)", context=torch.zeros(1, 1024, 8)) is None
    assert refusal("moh(shared_heads=0, top_k=7)", heads=10, head_dim=1) is None
    attn = zoo.create("moh(shared_heads=0, top_k=2)", 8, 4)
    assert attn.explain(torch.zeros(1, 1024, 8)).route == "moh_skip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1023}, "faster below 1024 tokens"),
        ({"context": torch.zeros(1, 1023, 8)}, "faster below 1024 tokens"),
        ({"spec": "moh(shared_heads=0, top_k=3)"}, "faster with more than 70% .* on: 3 of 4"),
        ({"mask": torch.ones(1, 1, 1, 1024, dtype=torch.bool)}, "no mask or bias"),
        ({"bias": torch.zeros(1, 1, 1, 1024)}, "no mask or bias"),
        ({"dropout": 0.1}, "no dropout"),
        ({"spec": "moh+alibi"}, "position 'alibi' biases the scores"),
        (
            {"spec": "moh+cope", "causal": True, "max_len": 1024},
            "position 'cope' biases the scores",
        ),
        ({"spec": "moh+sparsemax"}, "normalize is 'sparsemax', not 'softmax'"),
        ({"spec": "moh+differential"}, "normalize is 'differential', not 'softmax'"),
        ({"spec": "moh+neural"}, "score is 'neural', not 'dot'"),
        ({"spec": "moh+sliding_window(window=64)"}, "select is 'sliding_window', not 'all'"),
        ({"spec": "moh+mhe"}, "project 'mhe' reads the outputs of all heads"),
        ({"dtype": torch.bfloat16}, "float32 and float64 on a CPU, not torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("route", ["auto", "moh_skip"])
def test_says_why_not(options, message, route):
    if route == "auto":
        found = refusal(**options)
        assert found is not None
        assert re.search(message, found)
    elif "faster" in message:
        assert refusal(route=route, **options) is None, "asked for by name, it does slow work too"
    else:
        with pytest.raises(zoo.ZooError, match=f"route='moh_skip' cannot take this.*{message}"):
            refusal(route=route, **options)


def test_says_why_not_here():
    attn, x = build(causal=True), draw(2, 5, 32)
    with patch.object(moh, "SKIP_TOKENS", 2):
        assert attn.explain(x).route == "moh_skip"
        with patch.object(torch.compiler, "is_compiling", lambda: True):
            assert "no graph can hold" in attn.explain(x).refused["moh_skip"]
        with attn.capture():
            assert "captured" in attn.explain(x).refused["moh_skip"]
        cache = zoo.LayerCache()
        with torch.no_grad():
            attn(x[:, :2], cache=cache)
        assert "cached keys" in attn.explain(x[:, 2:], cache=cache).refused["moh_skip"]
    full = build(shared_heads=4)
    assert "moh_skip" not in full.explain(x).refused
    with pytest.raises(zoo.ZooError, match="unknown route 'moh_skip'"):
        full.route = "moh_skip"


@pytest.mark.parametrize("strip", [1, 4, 96])
@pytest.mark.parametrize("parts", ["", "+rope"])
@pytest.mark.parametrize(("causal", "kv_heads"), [(True, 4), (False, 2), (True, 1)])
def test_heads_with_one_row_and_with_none(causal, kv_heads, parts, strip):
    """Token 5 of one sample goes to head 0, all others to head 1, nobody to heads 2 and 3."""
    spec = f"moh(shared_heads=0, top_k=1){parts}"
    attn = build(spec, causal=causal, kv_heads=kv_heads)
    with torch.no_grad():
        attn.combine.routed.weight.zero_()
        attn.combine.routed.weight[:2, 0] = torch.tensor([9.0, -9.0])
    x = draw(2, 13, 32)
    x[..., 0] = -1
    x[1, 5, 0] = 1
    attn.route = "dense"
    expected = settle(attn, x)
    attn.route = "moh_skip"
    with patch.object(_selected_rows, "STRIP_ROWS", strip):
        found = settle(attn, x)
        _, _, _, rows, counts, *_ = selected(attn, x)
    assert counts == [0, 13, 0, 0, 1, 12, 0, 0]
    assert rows[13] == 5
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, name, gradient=name != "output")
    unused = found["project.qkv.weight"][16:32]
    assert not unused.any(), "queries of heads that nobody asked"


@pytest.mark.parametrize("keys", [7, 5])
def test_cross_attention_by_selected_rows(keys):
    attn, x, context = build(**HAND | {"top_k": 1}), draw(2, 7, 32), draw(2, keys, 32, seed=1)
    attn.route = "dense"
    expected = settle(attn, x, context=context)
    attn.route = "moh_skip"
    for name, value in settle(attn, x, context=context).items():
        assert_close(value, expected[name], name, gradient=name != "output")


@pytest.mark.parametrize("causal", [False, True])
def test_backward_of_selected_rows_against_finite_differences(causal):
    q, k, v = (draw(1, 3, 5, d, seed=d).requires_grad_() for d in (2, 2, 3))
    k = draw(1, 3, 5, 2, seed=5).requires_grad_()
    rows, counts = torch.tensor([0, 3, 4, 2]), [3, 0, 1]

    def form(q, k, v):
        return SelectedRows.apply(q, k, v, rows, counts, causal, 0.7)

    with patch.object(_selected_rows, "STRIP_ROWS", 2):
        assert torch.autograd.gradcheck(form, (q, k, v))
        y = form(q, k, v)
    on = torch.zeros(1, 3, 5, dtype=torch.bool)
    on[0, 0, [0, 3, 4]] = on[0, 2, 2] = True
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.7)
    assert_close(y[on], expected[on], "rows that are selected")
    assert not y[~on].any()


def test_what_is_kept_for_the_backward_pass():
    """No weights: nothing grows with the square of the length."""
    kept = []
    attn, x = build(route="moh_skip", shared_heads=0, top_k=2), draw(2, 65, 32)

    def pack(item):
        kept.append(item.numel())
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        attn(x)
    assert kept
    assert max(kept) < 65**2


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "spec",
    [
        "moh",
        "moh(shared_heads=0, top_k=2)+rope",
        "moh(shared_heads=2, top_k=1)+gqa(kv_heads=2)",
        "moh(router=query_norm)+rope",
        "moh(shared_heads=4)",
    ],
)
def test_decodes_step_by_step(spec, samples):
    attn, x = build(spec, causal=True), draw(samples, 12, 32)
    expected = attn(x)
    for threshold, pieces in ((1024, [1] * 12), (4, [5, 1, 3, 1, 2]), (1, [1] * 12)):
        cache = zoo.LayerCache()
        with torch.no_grad(), patch.object(moh, "SKIP_TOKENS", threshold):
            steps = [attn(piece, cache=cache) for piece in x.split(pieces, 1)]
        assert_close(torch.cat(steps, 1), expected, f"pieces of {pieces}")
        assert cache.get("k").shape[2] == 12, "a head that was off is needed later"


def test_decoding_steps_skip_heads():
    attn, x, cache = build(causal=True, route="moh_skip"), draw(3, 6, 32), zoo.LayerCache()
    expected = attn(x)
    with torch.no_grad():
        for i in range(6):
            with patch.object(SelectedRows, "apply", wraps=SelectedRows.apply) as apply:
                y = attn(x[:, i : i + 1], cache=cache)
            ((_, k, _, rows, *_),) = (call.args for call in apply.call_args_list)
            assert k.shape[2] == i + 1
            assert len(rows) == 3 * attn.combine.top_k
            assert_close(y, expected[:, i : i + 1], f"step {i}")


def test_head_usage_counts_tokens_over_passes():
    attn, x = hand_example(**HAND)
    first, second = x[:, :1], x[:, 1:]
    with head_usage(attn) as usage:
        assert usage == {}
        attn(x)
        assert list(usage) == ["combine"]
        assert usage["combine"].tolist() == [1, 1, 0.5, 1, 0.5]
        attn(first.expand(2, 3, 5))  # six more of the first token
        assert usage["combine"].tolist() == [1, 1, 7 / 8, 1, 1 / 8]
        attn.eval()
        attn(second.expand(8, 1, 5))
        assert usage["combine"].tolist() == [1, 1, 7 / 16, 1, 9 / 16]
    attn(first)
    assert usage["combine"].tolist() == [1, 1, 7 / 16, 1, 9 / 16], "counts after its block"


def test_head_usage_leaves_padding_out():
    attn, x = hand_example(**HAND)
    with head_usage(attn) as usage:
        attn(x, mask=torch.tensor([[True, False]])[:, None, None])
        assert usage["combine"].tolist() == [1, 1, 1, 1, 0]
        attn(x, mask=torch.zeros(2, 2, dtype=torch.bool))
        assert usage["combine"].tolist() == [1, 1, 1, 1, 0]
        attn(x, mask=torch.tensor([[False, True], [False, False]]))
        assert usage["combine"].tolist() == [1, 1, 0.5, 1, 0.5]
    with head_usage(attn) as usage:
        attn(x, mask=torch.zeros(2, 2, dtype=torch.bool))
        assert usage["combine"].tolist() == [0] * 5


def test_head_usage_of_a_model():
    layers = {"default": "moh", "last": "moh(router=query_norm)", "first": "mha"}
    model = DecoderLM(11, dim=32, depth=3, heads=4, attention=layers).double()
    tokens = torch.randint(11, (2, 9))
    with head_usage(model) as usage:
        model(tokens)
    assert list(usage) == ["blocks.1.attn.combine", "blocks.2.attn.combine"]
    for found, shared in zip(usage.values(), (1, 2), strict=True):
        assert found.shape == (4,)
        assert bool((found[:shared] == 1).all())
        assert float(found.sum()) == pytest.approx(3)
    with head_usage(model) as alone, head_usage(model.blocks[1].attn) as inner:
        model(tokens)
    assert torch.equal(inner["combine"], alone["blocks.1.attn.combine"])


def test_head_usage_lets_go_after_an_error():
    attn, x = hand_example(**HAND)
    with pytest.raises(ZeroDivisionError), head_usage(attn) as usage:
        raise ZeroDivisionError
    attn(x)
    assert usage == {}


def test_head_usage_of_a_model_without_routed_heads():
    with (
        pytest.raises(zoo.ZooError, match="Attention has no 'moh' layer"),
        head_usage(build("mha")),
    ):
        raise AssertionError("unreachable")


@pytest.mark.parametrize("router", moh.ROUTERS)
def test_trains_a_step(router):
    """The losses of all layers reach the routers."""
    spec = f"moh(router={router}, aux_weight=0.1)"
    model = DecoderLM(11, dim=32, depth=2, heads=4, attention=spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(11, (2, 9))

    def total():
        task = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        losses = zoo.auxiliary_losses(model)
        assert set(losses) == {"moh_balance"}
        return task + losses["moh_balance"]

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = total()
    loss.backward()
    optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []
    assert float(total().detach()) < float(loss.detach())


@pytest.mark.parametrize(
    ("layers", "with_loss"),
    [
        ({"default": "moh"}, [0, 1, 2]),
        ({"default": "moh", "first": "mha"}, [1, 2]),
        ({"default": "mha", "last": "moh(aux_weight=3.0)"}, [2]),
        ({"default": "moh", "every": 2, "other": "moh(shared_heads=4)"}, [0, 2]),
        ({"default": "moh(router=query_norm)", "first": "moh(aux_weight=0)"}, [1, 2]),
    ],
)
def test_losses_of_mixed_layers_add_up(layers, with_loss):
    model = DecoderLM(11, dim=32, depth=3, heads=4, attention=layers)
    tokens = torch.randint(11, (2, 9))
    model(tokens)
    parts = [block.attn.combine for block in model.blocks]
    assert [i for i, part in enumerate(parts) if "moh_balance" in part.aux_losses] == with_loss
    found = zoo.auxiliary_losses(model)
    assert set(found) == {"moh_balance"}
    expected = sum(parts[i].aux_losses["moh_balance"] for i in with_loss)
    assert_close(found["moh_balance"], expected, "sum over layers")
    model.eval()(tokens)
    assert zoo.auxiliary_losses(model) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_heads": 5}, r"shared_heads=5 .*from 0 to 4 \(nearest: 4\), with 4 heads"),
        ({"shared_heads": -1}, r"shared_heads=-1 .*from 0 to 4 \(nearest: 0\)"),
        ({"shared_heads": True}, r"shared_heads=True .*whole number from 0 to 4"),
        ({"shared_heads": 1.5}, r"shared_heads=1.5 .*whole number.*\(nearest: 1, 2\)"),
        ({"shared_heads": "2"}, r"shared_heads='2' .*whole number from 0 to 4"),
        ({"top_k": 4}, r"top_k=4 .*from 1 to 3 \(nearest: 3\), with 3 routed heads"),
        ({"shared_heads": 2, "top_k": 3}, r"top_k=3 .*from 1 to 2 \(nearest: 2\), with 2 routed"),
        ({"shared_heads": 4, "top_k": 1}, r"top_k=1 .*from 0 to 0 \(nearest: 0\), with 0 routed"),
        ({"top_k": 0}, r"top_k=0 .*from 1 to 3 \(nearest: 1\)"),
        ({"top_k": -1}, r"top_k=-1 .*from 1 to 3"),
        ({"top_k": True}, r"top_k=True .*whole number from 1 to 3"),
        ({"top_k": 1.5}, r"top_k=1.5 .*whole number from 1 to 3"),
        ({"top_k": "2"}, r"top_k='2' .*whole number from 1 to 3"),
        ({"router": "liner"}, r"router of 'moh' 'liner'.*did you mean 'linear'"),
        ({"router": "query"}, r"router of 'moh' 'query'.*did you mean 'query_norm'"),
        ({"router": "xyz"}, r"router of 'moh' 'xyz'.*linear, query_norm"),
        ({"aux_weight": -0.1}, r"aux_weight=-0.1 .*number of at least 0"),
        ({"aux_weight": "much"}, r"aux_weight='much' .*number of at least 0"),
        ({"router": "query_norm", "qk_norm": True}, r"'query_norm'.*qk_norm=True.*'linear'"),
        ({"dim": 30}, r"dim=30.*heads=4"),
        ({"heads": 0}, r"heads=0.*at least 1"),
        ({"shared": 1}, r"'shared'.*'shared_heads'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(**{"dim": 32, **options})


def test_qk_norm_goes_with_the_linear_router():
    attn = build(qk_norm=True)
    x = draw(2, 9, 32)
    plain = build()
    plain.load_state_dict(attn.state_dict(), strict=False)
    assert torch.equal(gates_of(attn, x), gates_of(plain, x))


def test_equal_norms_route_evenly_and_with_gradients_of_ordinary_size():
    attn = build("mhe(init_std=0)+moh(router=query_norm)", 8, dtype=torch.float32)
    y = attn(draw(2, 5, 64, dtype=torch.float32))
    (y.sum() + sum(zoo.auxiliary_losses(attn).values())).backward()
    assert float(attn.project.e_q.grad.abs().max()) < 1e3


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 5, 32)])
def test_an_empty_batch_or_sequence_is_routed_without_a_warning(shape):
    attn = build("moh(router=query_norm)")
    assert attn(torch.zeros(shape, dtype=torch.float64)).shape == shape


def test_gates_of_query_norm_are_exactly_one_in_training():
    attn = build("moh(router=query_norm)", 8, dtype=torch.float32)
    gates = gates_of(attn.train(), draw(3, 40, 64, dtype=torch.float32))
    assert gates.requires_grad
    assert gates.unique().tolist() == [0, 1]


def test_explain_leaves_the_losses_of_the_latest_pass():
    attn = build()
    attn(draw(2, 5, 32))
    before = zoo.auxiliary_losses(attn)["moh_balance"]
    attn.explain(draw(2, 7, 32))
    assert zoo.auxiliary_losses(attn)["moh_balance"] is before
    assert before.requires_grad


@pytest.mark.parametrize("value", [math.inf, math.nan, True, -0.1])
def test_a_weight_of_the_loss_that_is_no_weight_is_refused(value):
    with pytest.raises(zoo.ZooError, match=r"aux_weight=.* must be a number of at least 0"):
        MoH(32, Layout(4, 4, 4, 4, 8, 8), aux_weight=value)


def test_a_number_of_heads_that_is_none_is_refused():
    with pytest.raises(zoo.ZooError, match=r"shared_heads=nan .*whole number from 0 to 4"):
        MoH(32, Layout(4, 4, 4, 4, 8, 8), shared_heads=math.nan)
