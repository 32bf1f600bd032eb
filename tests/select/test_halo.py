"""Blocks of queries with the halos of their keys, against the dense mask of the same windows."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

import zoo
from zoo.select import _halo_plan
from zoo.select._grid import Grid
from zoo.select._halo import halo_attention
from zoo.select._halo_plan import Window, make_plan
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

ODD, EVEN, STRIDED = Window(2, 2), Window(2, 1), Window(2, 2, stride=3)
PAST, CUT = Window(3, 0, causal=True, shift=False), Window(2, 2, shift=False)
CASES = [
    ((23,), (ODD,), None),
    ((23,), (EVEN,), (5,)),
    ((23,), (PAST,), (4,)),
    ((24,), (STRIDED,), (7,)),
    ((3,), (ODD,), None),  # fewer tokens than the window
    ((1,), (ODD,), None),
    ((9, 11), (ODD, EVEN), (4, 3)),  # last tiles that are not full
    ((9, 11), (PAST, STRIDED), (2, 8)),
    ((8, 8), (ODD, ODD), (4, 4)),
    ((7, 6), (CUT, ODD), None),
    ((3, 6, 7), (PAST, Window(1, 1), ODD), (2, 4, 5)),
    ((2, 1, 5), (CUT, ODD, EVEN), (1, 1, 2)),
]


def dense(q, k, v, shape, windows, scale, mask=None):
    """Outputs and lse by all scores; heads of k and v as many as those of q."""
    seen = Grid(shape, windows, (1,) * len(shape)).mask()
    if mask is not None:
        seen = seen & mask[:, None, None]
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    safe = scores.masked_fill(empty, 0.0)
    out = safe.softmax(-1).masked_fill(empty, 0.0) @ v
    return out, safe.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def tensors(shape, heads=2, groups=2, size=1.0, dtype=torch.float64):
    length = math.prod(shape)
    q = size * draw(2, heads, length, 5, dtype=dtype)
    k, v = (draw(2, groups, length, n, seed=s, dtype=dtype) for s, n in ((1, 5), (2, 3)))
    return [x.requires_grad_() for x in (q, k, v)]


def check(inputs, shape, windows, *, mask=None, sizes=None, with_lse=True):
    found = halo_attention(*inputs, shape, windows, scale=0.4, mask=mask, sizes=sizes)
    heads = inputs[0].shape[1]
    wide = [zoo.parts.repeat_heads(x, heads) for x in inputs]
    expected = dense(*wide, shape, windows, 0.4, mask)
    assert_close(found[0], expected[0], "output")
    rows = expected[1].isfinite()
    assert torch.equal(found[1].isfinite(), rows)
    assert_close(found[1][rows], expected[1][rows], "lse")
    cotangents = [draw(*x.shape, seed=5 + i) for i, x in enumerate(expected)]
    total = []
    for out, lse in (found, expected):
        loss = (out * cotangents[0]).sum()
        if with_lse:
            loss = loss + (lse[rows] * cotangents[1][rows]).sum()
        total.append(torch.autograd.grad(loss, inputs))
    for name, a, b in zip("qkv", *total, strict=True):
        assert_close(a, b, f"gradient of {name}", gradient=True)


@pytest.mark.parametrize("budget", [_halo_plan.BUDGET, 100])
@pytest.mark.parametrize(("shape", "windows", "sizes"), CASES)
def test_blocks_equal_the_dense_mask(shape, windows, sizes, budget):
    with patch.object(_halo_plan, "BUDGET", budget):
        check(tensors(shape), shape, windows, sizes=sizes)


@pytest.mark.parametrize("shape", [(23,), (9, 11)])
def test_hidden_keys_and_rows_without_keys(shape):
    windows = (ODD,) * len(shape)
    mask = torch.rand(2, math.prod(shape)) < 0.4
    mask[1, : math.prod(shape) // 2] = False
    for with_lse in (True, False):
        check(tensors(shape), shape, windows, mask=mask, with_lse=with_lse)
    out, lse = halo_attention(*tensors(shape), shape, windows, scale=1.0, mask=mask & False)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("size", [30.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_need_their_maximum(size, dtype):
    inputs = tensors((9, 11), size=size, dtype=dtype)
    out, _ = halo_attention(*inputs, (9, 11), (ODD, ODD), scale=0.4)
    exact = [x.detach().double() for x in inputs]
    expected, _ = dense(*exact, (9, 11), (ODD, ODD), 0.4)
    assert_close(out, expected, "output", dtype=torch.float32)
    for x in torch.autograd.grad(out.sum(), inputs):
        assert bool(x.isfinite().all())


def test_shared_keys_and_memory_laid_out_otherwise():
    q, k, v = tensors((9, 11), heads=4, groups=2)
    check([q, k, v], (9, 11), (ODD, EVEN), sizes=(4, 4))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    a, _ = halo_attention(*turned, (9, 11), (ODD, EVEN), scale=0.4)
    b, _ = halo_attention(q, k, v, (9, 11), (ODD, EVEN), scale=0.4)
    assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted):
    inputs = tensors((6, 7))
    every = torch.autograd.grad(
        halo_attention(*inputs, (6, 7), (ODD, ODD), scale=0.4)[0].square().sum(), inputs
    )
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    y = halo_attention(*some, (6, 7), (ODD, ODD), scale=0.4)[0]
    y.square().sum().backward()
    for i, (x, expected) in enumerate(zip(some, every, strict=True)):
        if i in wanted:
            assert torch.equal(x.grad, expected)
        else:
            assert x.grad is None


@pytest.mark.parametrize(("results", "wanted"), [((1,), (0, 1, 2)), ((0, 1), (2,))])
def test_second_derivatives_where_the_sums_do_not_know_the_values(results, wanted):
    def penalty(form):
        inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors((6, 7)))]
        outs = form(inputs)
        total = sum(outs[r].square().sum() for r in results)
        leaves = [inputs[i] for i in wanted]
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(total, leaves, create_graph=True, **options)
        total = total + sum(x.square().sum() for x in first)
        return torch.autograd.grad(total, leaves, **options)

    found = penalty(lambda x: halo_attention(*x, (6, 7), (ODD, ODD), scale=0.4))
    expected = penalty(lambda x: dense(*x, (6, 7), (ODD, ODD), 0.4))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "gradient of the penalty", gradient=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "sizes"), [((7,), (3,)), ((3, 5), (2, 3))])
def test_derivatives_against_finite_differences(shape, sizes, masked):
    length = math.prod(shape)
    inputs = [draw(1, 1, length, 2, seed=i).requires_grad_() for i in range(3)]
    mask = torch.arange(length)[None] % 4 != 1 if masked else None
    windows = (Window(1, 1),) * len(shape)

    def run(q, k, v):
        return halo_attention(q, k, v, shape, windows, scale=0.7, mask=mask, sizes=sizes)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_dropout_is_the_same_in_both_passes():
    q, k, v = tensors((9, 11))
    windows = (ODD, ODD)

    def run(q, k, v):
        torch.manual_seed(3)
        return halo_attention(q, k, v, (9, 11), windows, scale=0.4, dropout=0.3)[0]

    assert torch.equal(run(q, k, v), run(q, k, v))
    assert torch.autograd.gradcheck(run, [x[:1, :1] for x in (q, k, v)], fast_mode=True)
    with pytest.raises(zoo.ZooError, match="second derivative"):
        torch.autograd.grad(run(q, k, v).sum(), q, create_graph=True)
    torch.manual_seed(0)
    ones = torch.ones_like(v)
    y = halo_attention(q, k, ones, (9, 11), windows, scale=0.4, dropout=0.3)[0].detach()
    assert float(y.std()) > 0.1
    assert abs(float(y.mean()) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors((9, 11))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = dense(*exact, (9, 11), (ODD, ODD), 0.4)
    due = torch.autograd.grad(expected.square().sum(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = halo_attention(*inputs, (9, 11), (ODD, ODD), scale=0.4)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        found = torch.autograd.grad(out.float().square().sum(), inputs)
    assert_close(out, expected, "output", dtype=dtype)
    for name, a, b in zip("qkv", found, due, strict=True):
        assert_close(a, b, name, gradient=True, dtype=dtype)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_at_all(batch, length):
    inputs = [draw(batch, 2, length, 3).requires_grad_() for _ in range(3)]
    out, lse = halo_attention(*inputs, (length,), (ODD,), scale=1.0)
    assert out.shape == (batch, 2, length, 3)
    assert lse.shape == (batch, 2, length)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_what_is_kept_for_the_backward_pass():
    inputs = tensors((16, 16))
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = halo_attention(*inputs, (16, 16), (ODD, ODD), scale=0.4)
    assert sorted(kept) == sorted([x.numel() for x in inputs] + [out.numel(), lse.numel()])


def test_blocks_in_the_middle_share_their_mask():
    plan = make_plan((400,), (PAST,), 8, torch.float32, torch.device("cpu"), (16,))
    assert len({id(block.mask) for block in plan.blocks}) == 2  # the first block, and the others
    assert {block.keys.stop - block.keys.start for block in plan.blocks} == {16, 19}


def test_the_cost_grows_with_the_tokens():
    pairs = []
    for length in (1024, 2048):
        plan = make_plan((length,), (ODD,), 4, torch.float32, torch.device("cpu"))
        pairs.append(sum(math.prod(block.mask.shape[1:]) for block in plan.blocks))
    assert pairs[1] < 2.1 * pairs[0]


@pytest.mark.parametrize("budget", [_halo_plan.BUDGET, 2000, 100])
@pytest.mark.parametrize(
    ("shape", "windows", "sizes"),
    [
        ((23,), (ODD,), (5,)),
        ((9, 11), (ODD, ODD), (4, 3)),  # last tiles that are not full
        ((24, 8), (ODD, ODD), (4, 4)),  # blocks in the middle that share their offsets
        ((6, 7), (ODD, Window(1, 1)), (2, 4)),
        ((5, 6, 7), (Window(1, 1), Window(1, 1), ODD), (2, 4, 5)),
    ],
)
def test_a_table_of_relative_positions(shape, windows, sizes, budget):
    """Against all scores with the entries of the pairs, for several samples of two heads."""
    grid = Grid(shape, windows, (1,) * len(shape))
    table = draw(2, *(2 * w.width - 1 for w in windows), seed=4).requires_grad_()
    inputs = [*tensors(shape), table]
    index = torch.arange(math.prod(shape))
    entries = table.flatten(1)[:, grid.offsets(index[:, None], index)]
    scores = (inputs[0] @ inputs[1].mT * 0.4 + entries).masked_fill(~grid.mask(), -torch.inf)
    expected = scores.softmax(-1) @ inputs[2], scores.logsumexp(-1)
    with patch.object(_halo_plan, "BUDGET", budget):
        found = halo_attention(*inputs[:3], shape, windows, scale=0.4, rpb=table, sizes=sizes)
        total = []
        for result, name in ((found, "found"), (expected, "expected")):
            assert_close(result[0], expected[0], f"output {name}")
            assert_close(result[1], expected[1], f"lse {name}")
            loss = (result[0] * draw(*expected[0].shape, seed=6)).sum() + result[1].square().sum()
            total.append(torch.autograd.grad(loss, inputs))
    for name, a, b in zip(("q", "k", "v", "rpb"), *total, strict=True):
        assert_close(a, b, f"gradient of {name}", gradient=True)


@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_a_table_that_needs_the_maximum_of_the_scores(size):
    inputs = [x.detach().float().requires_grad_() for x in tensors((6, 7))]
    table = (size * draw(2, 9, 9, seed=4)).float().requires_grad_()
    y, lse = halo_attention(*inputs, (6, 7), (ODD, ODD), scale=0.4, rpb=table)
    bias = torch.full((2, 42), size)
    again, more = halo_attention(*inputs, (6, 7), (ODD, ODD), scale=0.4, rpb=table, key_bias=bias)
    assert_close(again, y, "a constant on all scores changes nothing")
    assert_close(more, lse + size, "but the sums")
    for x in torch.autograd.grad(y.sum(), [*inputs, table]):
        assert bool(x.isfinite().all())


def test_derivatives_of_a_table_against_finite_differences():
    inputs = [draw(2, 2, 15, 2, seed=i).requires_grad_() for i in range(3)]
    table = draw(2, 5, 5, seed=4).requires_grad_()

    def run(q, k, v, rpb):
        windows = (Window(1, 1), Window(1, 1))
        return halo_attention(q, k, v, (3, 5), windows, scale=0.7, rpb=rpb, sizes=(2, 3))

    assert torch.autograd.gradcheck(run, [*inputs, table], fast_mode=True)
    assert torch.autograd.gradgradcheck(run, [*inputs, table], fast_mode=True)
    y = run(*(x.detach() for x in inputs), table)[0]
    assert torch.autograd.grad(y.square().sum(), table)[0].any()  # the table alone


@pytest.mark.parametrize(("width", "of_values"), [(16, 33), (40, 1), (7, 16)])
def test_wide_and_narrow_heads(width, of_values):
    """Products are laid out the one way or the other by the width."""
    inputs = [draw(2, 2, 99, n, seed=i) for i, n in enumerate((width, width, of_values))]
    check([x.requires_grad_() for x in inputs], (9, 11), (ODD, ODD), sizes=(4, 4))
