"""The core of linear attention: three forms that agree in everything, and what they refuse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import zoo
from zoo.ops import _linear_work
from zoo.ops import linear as linear_core
from zoo.ops.linear import (
    chunked_linear_attention,
    parallel_linear_attention,
    recurrent_linear_attention,
)
from zoo.testing.memory import Largest, measure
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close


def sums(q, k, v, decay, state):
    """o_t = q_t S_t with S_t = decay S_(t-1) + k_t v_t^T, in loops over all there is."""
    samples, heads, length, width = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(samples, heads, length, v.shape[3], dtype=torch.float64)
    after = torch.zeros(samples, heads, width, v.shape[3], dtype=torch.float64)
    for b in range(samples):
        for h in range(heads):
            s = after[b, h] if state is None else state[b, h].clone()
            for t in range(length):
                s = decay[h] * s + torch.outer(k[b, h // share, t], v[b, h // share, t])
                out[b, h, t] = q[b, h, t] @ s
            after[b, h] = s
    return out, after


def inputs(length, *, batch=2, heads=4, groups=2, key=3, value=5, state=True):
    """q in the layout of a projection, k, v and a state before the first token."""
    q = draw(batch, length, heads, key).transpose(1, 2)
    k, v = draw(batch, groups, length, key, seed=1), draw(batch, groups, length, value, seed=2)
    return [q, k, v, draw(batch, heads, key, value, seed=3) if state else None]


def settle(form, tensors, decay, *, used=("out", "state"), **options):
    """Output, state and all gradients of a form that takes the four tensors."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
    *qkv, state = leaves
    out, after = form(*qkv, decay, initial_state=state, **options)
    loss = (out * draw(*out.shape, seed=7, dtype=out.dtype)).sum() * ("out" in used)
    if "state" in used:
        loss = loss + (after * draw(*after.shape, seed=8, dtype=after.dtype)).sum()
    loss.backward()
    found = {"out": out.detach(), "state": after.detach()}
    names = ("q", "k", "v", "initial_state")
    found.update({n: x.grad for n, x in zip(names, leaves, strict=True) if x is not None})
    return found


def same(found, expected, what):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gradient = name not in ("out", "state")
        assert_close(found[name], value, f"{what}: {name}", gradient=gradient)


DECAY = -torch.tensor([0.0, 0.01, 0.7, 9.0], dtype=torch.float64)


@pytest.mark.parametrize("decay", [None, DECAY], ids=["none", "decay"])
@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])
def test_forms_equal_the_sums(form, decay):
    function = getattr(linear_core, f"{form}_linear_attention")
    for state in (True, False):
        *qkv, before = inputs(7, state=state)
        out, after = function(*qkv, decay, initial_state=before)
        rate = torch.ones(4, dtype=torch.float64) if decay is None else decay.exp()
        expected = sums(*qkv, rate, before)
        assert_close(out, expected[0], "outputs")
        assert_close(after, expected[1], "state")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 100, None])
@pytest.mark.parametrize("decay", [None, DECAY], ids=["none", "decay"])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_all_forms_have_the_same_gradients(chunk, decay, length):
    tensors = inputs(length)
    expected = settle(parallel_linear_attention, tensors, decay)
    same(settle(recurrent_linear_attention, tensors, decay), expected, "recurrent")
    found = settle(chunked_linear_attention, tensors, decay, chunk=chunk)
    same(found, expected, f"chunks of {chunk}")


@pytest.mark.parametrize("segment", [1, 6, 30, 200])
@pytest.mark.parametrize("length", [29, 30])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 2), (5, 2, 1)], ids=str)
def test_any_segment_gives_the_same(monkeypatch, segment, length, shape):
    """Segments of one head, of some heads and of several samples; chunks that do not divide."""
    monkeypatch.setattr(_linear_work, "SEGMENT", segment)
    batch, heads, groups = shape
    tensors = inputs(length, batch=batch, heads=heads, groups=groups)
    for decay in (None, DECAY[-heads:]):
        expected = settle(parallel_linear_attention, tensors, decay)
        found = settle(chunked_linear_attention, tensors, decay, chunk=6)
        same(found, expected, "segments")


@pytest.mark.parametrize("decay", [None, DECAY], ids=["none", "decay"])
@pytest.mark.parametrize("group", [2, 32])
def test_the_plain_chunked_form(monkeypatch, decay, group):
    """The one that compilers and other devices get, with its groups of chunks."""
    monkeypatch.setattr(linear_core, "GROUP", group)
    monkeypatch.setattr(linear_core, "_wants_plain", lambda *_: True)
    for state in (True, False):
        tensors = inputs(23, state=state)
        expected = settle(parallel_linear_attention, tensors, decay)
        for chunk in (1, 4, 100):
            found = settle(chunked_linear_attention, tensors, decay, chunk=chunk)
            same(found, expected, f"chunks of {chunk}")


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])
def test_two_pieces_with_the_carried_state(form):
    function = getattr(linear_core, f"{form}_linear_attention")
    *qkv, before = inputs(21)
    whole, last = function(*qkv, DECAY, initial_state=before)
    for cut in (1, 8, 20):
        first, carried = function(*(x[:, :, :cut] for x in qkv), DECAY, initial_state=before)
        second, after = function(*(x[:, :, cut:] for x in qkv), DECAY, initial_state=carried)
        assert_close(torch.cat([first, second], 2), whole, f"in two pieces at {cut}")
        assert_close(after, last, "state after two pieces")


def test_gradients_through_the_carried_state():
    *qkv, _ = (x.requires_grad_() for x in inputs(21))
    cotangent = draw(2, 4, 21, 5, seed=7)
    whole, _ = chunked_linear_attention(*qkv, DECAY, chunk=4)
    expected = torch.autograd.grad((whole * cotangent).sum(), qkv)
    outs, state = [], None
    for piece in zip(*(x.split(8, 2) for x in qkv), strict=True):
        out, state = chunked_linear_attention(*piece, DECAY, initial_state=state, chunk=3)
        outs.append(out)
    found = torch.autograd.grad((torch.cat(outs, 2) * cotangent).sum(), qkv)
    for name, a, b in zip("qkv", found, expected, strict=True):
        assert_close(a, b, f"gradient of {name}", gradient=True)


@pytest.mark.parametrize("used", [("out",), ("state",)], ids=str)
def test_gradient_of_one_of_the_two_results(used):
    tensors = inputs(13)
    expected = settle(parallel_linear_attention, tensors, DECAY, used=used)
    same(settle(chunked_linear_attention, tensors, DECAY, used=used, chunk=4), expected, "one")


def test_only_some_inputs_want_a_gradient():
    q, k, v, before = inputs(9)
    expected = settle(parallel_linear_attention, [q, k, v, before], DECAY)
    v = v.requires_grad_()
    out, after = chunked_linear_attention(q, k, v, DECAY, initial_state=before, chunk=4)
    loss = (out * draw(*out.shape, seed=7)).sum() + (after * draw(*after.shape, seed=8)).sum()
    loss.backward()
    assert_close(v.grad, expected["v"], "gradient of v", gradient=True)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])
def test_packed_sequences_are_each_alone(form):
    function = getattr(linear_core, f"{form}_linear_attention")
    ends = [0, 3, 3, 16, 17, 29]
    q, k, v, before = inputs(29, batch=1)
    before = draw(5, 4, 3, 5, seed=3)

    def alone(q, k, v, decay, initial_state):
        found = [
            parallel_linear_attention(
                *(x[:, :, a:b] for x in (q, k, v)), decay, initial_state=initial_state[i : i + 1]
            )
            for i, (a, b) in enumerate(pairwise(ends))
        ]
        return torch.cat([y for y, _ in found], 2), torch.cat([s for _, s in found])

    for decay in (None, DECAY):
        expected = settle(alone, [q, k, v, before], decay)
        bounds = torch.tensor(ends, dtype=torch.int32)
        found = settle(function, [q, k, v, before], decay, cu_seqlens=bounds)
        same(found, expected, "packed")


def test_gradcheck_and_second_derivatives():
    tensors = [x.requires_grad_() for x in inputs(5, batch=1, heads=2, groups=1, key=2, value=2)]

    def form(q, k, v, state):
        return chunked_linear_attention(q, k, v, DECAY[1:3], initial_state=state, chunk=2)

    assert torch.autograd.gradcheck(form, tensors)
    assert torch.autograd.gradgradcheck(form, tensors, fast_mode=True)
    frozen = [tensors[0], *(x.detach() for x in tensors[1:])]
    assert torch.autograd.gradgradcheck(lambda q: form(q, *frozen[1:]), tensors[0])


def test_a_decay_that_wants_a_gradient_gets_it():
    tensors = inputs(11)
    grads = []
    for form in (parallel_linear_attention, recurrent_linear_attention, chunked_linear_attention):
        decay = DECAY.clone().requires_grad_()
        settle(form, tensors, decay)
        grads.append(decay.grad)
    for grad in grads[1:]:
        assert_close(grad, grads[0], "gradient of the decay", gradient=True)
    assert bool((grads[0] != 0).all())


def test_torch_func_takes_it():
    q, k, v, _ = inputs(9)

    def loss(q):
        return chunked_linear_attention(q, k, v, DECAY, chunk=4)[0].square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(q), expected, "torch.func", gradient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype):
    tensors = [x.to(dtype) if i < 3 else x.float() for i, x in enumerate(inputs(200))]
    expected = settle(parallel_linear_attention, [x.double() for x in tensors], DECAY)
    found = settle(chunked_linear_attention, tensors, DECAY.float(), chunk=32)
    assert found["out"].dtype == found["q"].dtype == dtype
    assert found["state"].dtype == found["initial_state"].dtype == torch.float32
    for name, value in expected.items():
        gradient = name not in ("out", "state")
        assert_close(found[name], value, name, gradient=gradient, dtype=dtype)
    ones = torch.ones(1, 1, 3000, 2, dtype=dtype)
    _, state = chunked_linear_attention(ones, 30 * ones, ones)
    assert state.flatten().tolist() == [90000.0] * 4, "more than float16 holds, or bfloat16 counts"


def test_autocast_does_not_round_the_sums():
    q, k, v, _ = (x.float() for x in inputs(90))
    decay = DECAY.float()
    plain = settle(chunked_linear_attention, [q, k, v, None], decay)
    with torch.autocast("cpu", torch.bfloat16):
        found = settle(chunked_linear_attention, [q, k, v, None], decay)
    for name, value in plain.items():
        assert torch.equal(found[name], value), f"{name} is rounded under autocast"


def test_the_steepest_decay_leaves_the_token_alone():
    q, k, v, before = inputs(150)
    for steep in (1e3, 1e30, torch.inf):
        decay = torch.full((4,), -steep, dtype=torch.float64)
        for form in (parallel_linear_attention, chunked_linear_attention):
            found = settle(form, [q, k, v, before], decay)
            repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
            alone = (q * repeated[0]).sum(-1, keepdim=True) * repeated[1]
            assert_close(found["out"], alone, f"slope {steep}")
            assert all(bool(x.isfinite().all()) for x in found.values())


def test_nothing_in_nothing_out():
    for batch, length in ((0, 5), (2, 0)):
        tensors = inputs(length, batch=batch)
        for form in (parallel_linear_attention, chunked_linear_attention):
            found = settle(form, tensors, DECAY)
            assert found["out"].shape == (batch, 4, length, 5)
            assert_close(found["state"], tensors[3], "the state goes through")


def test_memory_grows_with_the_length():
    found = {}
    for length in (1024, 4096):
        q = torch.randn(1, 2, length, 8, requires_grad=True)
        found[length] = measure(lambda q=q: chunked_linear_attention(q, q, q, DECAY[:2].float())[0])
    (few, kept), (many, more) = found.values()
    assert many <= 4.1 * few
    assert more <= 4.1 * kept
    with Largest() as seen:
        chunked_linear_attention(*[torch.randn(1, 2, 16384, 8)] * 3)
    assert seen.elements <= 2 * 16384 * 8, "nothing larger than the output is made"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": (2, 2, 6, 4)}, "k of shape"),
        ({"k": (2, 2, 7, 3)}, "k of shape"),
        ({"v": (2, 1, 7, 5)}, "v of shape"),
        ({"k": (2, 3, 7, 4), "v": (2, 3, 7, 5)}, "k has 3 heads"),
        ({"q": (4, 7, 4)}, "q of shape"),
        ({"log_decay": (3,)}, "log_decay of shape"),
        ({"initial_state": (2, 4, 5, 4)}, "initial_state of shape"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(change, named):
    shapes = {"q": (2, 4, 7, 4), "k": (2, 2, 7, 4), "v": (2, 2, 7, 5), "log_decay": (4,)}
    tensors = {name: draw(*shape) for name, shape in {**shapes, **change}.items()}
    tensors["log_decay"] = -tensors["log_decay"].abs()
    for form in (
        parallel_linear_attention,
        recurrent_linear_attention,
        chunked_linear_attention,
    ):
        with pytest.raises(zoo.ZooError, match=named):
            form(**tensors)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"log_decay": torch.tensor([0.0, 0.0, 0.0, 0.1])}, "log_decay="),
        ({"log_decay": torch.full((4,), torch.nan)}, "log_decay="),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 2.0}, r"chunk=2\.0"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 7.0])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 7])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, "batch of 2"),
        ({"initial_state": torch.ones(2, 4, 3, 5, dtype=torch.int64)}, "initial_state"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(options, named):
    q, k, v, _ = inputs(7)
    with pytest.raises(zoo.ZooError, match=named):
        chunked_linear_attention(q, k, v, **options)
