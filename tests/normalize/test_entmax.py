"""Entmax and sparsemax: golden values, worked examples, gradients, masks, compilation."""

from __future__ import annotations

import pytest
import torch
from golden_files import read, under
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.normalize.entmax import Entmax, entmax, entmax_reference
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = {"entmax": [{}, {"alpha": 1.25}], "sparsemax": [{}]}
ALPHAS = (1.05, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


def gradient(function, scores, cotangent, *args):
    scores = scores.detach().clone().requires_grad_()
    y = function(scores, *args)
    (y * cotangent).sum().backward()
    return y.detach(), scores.grad


def golden_names(tensors, metadata):
    return sorted(under(tensors, "out."))


def alpha_of(name):
    """The file names its functions by alpha: entmax125 is that of 1.25, sparsemax that of 2."""
    digits = name.removeprefix("entmax")
    return 2.0 if name == "sparsemax" else float(f"{digits[0]}.{digits[1:]}")


def compare(tensors, metadata, name):
    axis = metadata["config"]["axis"]

    def along(scores, alpha):
        return entmax(scores.movedim(axis, -1), alpha).movedim(-1, axis)

    y, g = gradient(along, tensors["in.scores"], tensors["in.cotangent"], alpha_of(name))
    assert_close(y, tensors[f"out.{name}"], name)
    assert_close(g, tensors[f"grad.{name}.in.scores"], f"gradient of {name}", gradient=True)
    assert torch.equal(y == 0, tensors[f"out.{name}"] == 0), "another support"


@pytest.mark.parametrize("name", golden_names(*read("baseline_entmax")))
def test_golden(golden, name):
    compare(*golden("baseline_entmax"), name)


def test_another_golden_file(other_golden):
    file = other_golden("baseline_entmax")
    for name in golden_names(*file):
        compare(*file, name)


def test_worked_examples():
    x = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    expected = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
    assert_close(entmax(x, 2.0), expected, "sparsemax")
    # Both keys are in the support: (1/2 - t)^2 + t^2 = 1, so t = (1 - sqrt 7) / 4.
    tau = (1 - 7**0.5) / 4
    expected = torch.tensor([(0.5 - tau) ** 2, tau**2], dtype=torch.float64)
    assert_close(entmax(torch.tensor([1.0, 0.0], dtype=torch.float64), 1.5), expected, "entmax15")
    equal = torch.full((5,), 3.0, dtype=torch.float64)
    for alpha in ALPHAS:
        assert_close(entmax(equal, alpha), torch.full_like(equal, 0.2), f"equal, {alpha}")


def test_alpha_one_is_softmax():
    x = draw(3, 7)
    assert torch.equal(entmax(x, 1), x.softmax(-1))
    assert_close(entmax(x, 1.0001), x.softmax(-1), "alpha near 1", dtype=torch.float16)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_reference(alpha, dtype):
    x, cotangent = 2 * draw(2, 3, 5, 37, dtype=dtype), draw(2, 3, 5, 37, seed=1, dtype=dtype)
    y, g = gradient(entmax, x, cotangent, alpha)
    expected, expected_g = gradient(entmax_reference, x, cotangent, alpha)
    assert_close(y, expected, f"alpha={alpha}")
    assert_close(g, expected_g, f"gradient, alpha={alpha}", gradient=True)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_gradcheck(alpha):
    x = draw(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha), x)


def test_long_rows_in_float32_keep_their_sum():
    x = draw(4, 4096, dtype=torch.float32) / 100  # nearly all keys are in the support
    for alpha in (1.25, 1.5, 2.0):
        total = entmax(x, alpha).double().sum(-1)
        assert float((total - 1).abs().max()) < 1e-4, f"alpha={alpha}"


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.sampled_from(ALPHAS),
    st.floats(-50, 50),
)
def test_is_a_distribution_that_keeps_the_order(values, alpha, shift):
    x = torch.tensor(values, dtype=torch.float64)
    p = entmax(x, alpha)
    assert bool((p >= 0).all())
    assert abs(float(p.sum()) - 1) < 1e-8
    order = x.argsort()
    assert bool((p[order].diff() >= -1e-9).all()), "a lower score has a larger weight"
    assert float((entmax(x + shift, alpha) - p).abs().max()) < 1e-6, "a shift changes the weights"


def test_support_shrinks_as_alpha_grows():
    x = 2 * draw(40, 30)
    sizes = [int((entmax(x, alpha) > 0).sum()) for alpha in (1.25, 1.5, 2.0, 3.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize("name", ["entmax", "entmax(alpha=1.2)", "sparsemax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_scores_get_exactly_zero(name, dtype):
    part = zoo.create(name, dim=8, heads=2).normalize
    scores = (20 * draw(2, 2, 5, 9)).to(dtype)
    mask = torch.rand(2, 1, 5, 9) < 0.6
    mask[..., 0] = True
    weights = part(scores, mask)
    assert float(weights.masked_select(~mask).abs().max()) == 0
    assert float((weights.sum(-1) - 1).abs().max()) < 1e-5
    for row in ((0, 0, 2), (1, 1, 4)):
        kept = mask[row[0], 0, row[2]]
        assert_close(weights[row][kept], part(scores[row][kept], None), "the visible keys alone")


@pytest.mark.parametrize("alpha", ALPHAS)
def test_empty_and_extreme_rows_stay_finite(alpha):
    lowest, infinite = torch.finfo(torch.float64).min, -torch.inf
    rows = [[lowest] * 4, [infinite] * 4, [1e30, 0, -1e30, 0], [1e4, 9999, infinite, lowest]]
    x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    y = entmax(x, alpha)
    y[:, 0].sum().backward()
    assert_close(y.sum(-1), torch.ones_like(y[:, 0]), "sums")
    assert_close(y[:2], torch.full_like(y[:2], 0.25), "rows of equal scores")
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_half_precision_is_computed_in_float32():
    x = draw(3, 9).bfloat16()
    assert torch.equal(entmax(x, 1.5), entmax(x.float(), 1.5))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_compiles_whole_and_inside_a_checkpoint(alpha):
    def inner(scores):
        return entmax(scores, alpha).square()

    def outer(scores):
        return checkpoint(inner, scores, use_reentrant=False) + inner(scores)

    x = draw(2, 3, 7)
    torch._dynamo.reset()
    compiled = torch.compile(outer, fullgraph=True, backend="eager")
    cotangent = draw(2, 3, 7, seed=1)
    expected, found = (gradient(f, x, cotangent) for f in (outer, compiled))
    torch._dynamo.reset()
    assert_close(found[0], expected[0], "compiled")
    assert_close(found[1], expected[1], "gradient of compiled", gradient=True)
    assert_close(gradient(lambda s: 2 * inner(s), x, cotangent)[1], expected[1], "checkpointed")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["entmax", "entmax(alpha=1.7)", "sparsemax"])
def test_many_strips(many_strips, name, causal):
    attn = zoo.create(name, dim=12, heads=3, causal=causal, dtype=torch.float64)
    x = draw(3, 17, 12)
    attn.route = "dense"
    expected = settle(attn, x)
    attn.route = "engine"
    for item, value in settle(attn, x).items():
        assert_close(value, expected[item], item, gradient=item != "output")


def test_sparsemax_is_entmax_with_alpha_two():
    x = draw(2, 5, 12)
    torch.manual_seed(1)
    first = zoo.create("sparsemax", dim=12, heads=3, dtype=torch.float64)
    torch.manual_seed(1)
    second = zoo.create("entmax(alpha=2.0)", dim=12, heads=3, dtype=torch.float64)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("alpha", [0.99, -1, float("nan"), float("inf"), "two"])
def test_bad_alpha(alpha):
    with pytest.raises(zoo.ZooError, match=r"alpha=.*at least 1"):
        zoo.create("entmax", dim=8, heads=2, alpha=alpha)
    with pytest.raises(zoo.ZooError, match="alpha="):
        entmax(torch.zeros(3), alpha)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_solution_is_nan_like_a_softmax_and_no_other(alpha, bad):
    scores = draw(3, 5)
    scores[1, 2] = bad
    scores[2, 0] = -torch.inf
    scores.requires_grad_()
    weights = Entmax(alpha)(scores, None)
    assert weights.isnan().tolist() == scores.softmax(-1).isnan().tolist()
    (gradient,) = torch.autograd.grad(weights[[0, 2]].square().sum(), scores)
    assert bool(gradient[[0, 2]].isfinite().all())
    clean = draw(3, 5)
    clean[2, 0] = -torch.inf
    assert_close(weights[[0, 2]], Entmax(alpha)(clean, None)[[0, 2]])
