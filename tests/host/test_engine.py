"""The strip engine: how it cuts, that cutting changes nothing, and that memory stays linear."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import zoo
from zoo.host import engine
from zoo.normalize.softmax import Softmax
from zoo.parts import Call, Position, Score, Select, Stations, Strip, grouped_matmul, mask_scores
from zoo.position.none import NoPosition
from zoo.score.dot import Dot
from zoo.select.all import All
from zoo.testing.memory import growth
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close


class Bounded(Select):
    """Sees the keys in a band and says so."""

    def allow(self, strip: Strip) -> Tensor:
        return (strip.q_index[:, None] - strip.k_index).abs() <= 2

    def key_range(self, call: Call, rows: slice) -> tuple[int, int]:
        low, high = (call.q_start + i - call.k_start for i in (rows.start, rows.stop))
        return max(0, low - 2), min(call.k.shape[2], high + 2)


def _call(
    batch: int = 2, heads: int = 2, rows: int = 11, keys: int | None = None, **changes: Any
) -> Call:
    keys = rows if keys is None else keys
    plain: dict[str, Any] = {
        "x": draw(batch, rows, 8),
        "q": draw(batch, heads, rows, 4),
        "k": draw(batch, heads, keys, 4, seed=1),
        "v": draw(batch, heads, keys, 4, seed=2),
        "q_pos": torch.arange(rows) + keys - rows,
        "k_pos": torch.arange(keys),
        "q_start": keys - rows,
        "k_start": 0,
        "causal": False,
        "scale": 0.5,
    }
    return Call(**{**plain, **changes})


def _parts(select: Select | None = None, score: Score | None = None) -> Stations:
    return Stations(score or Dot(), select or All(), Softmax(), NoPosition())


def _dense(call: Call, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention in three lines."""
    scores = call.q @ call.k.transpose(-1, -2) * call.scale
    scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ call.v


def test_small_passes_are_one_strip() -> None:
    (strip,) = engine.strips(_call(), All())
    assert (strip.batch, strip.rows, strip.keys) == (slice(None), slice(0, 11), slice(0, 11))


@given(
    st.integers(1, 5), st.integers(1, 30), st.integers(0, 9), st.booleans(), st.integers(1, 4000)
)
def test_strips_cover_every_row_once(
    batch: int, rows: int, cached: int, causal: bool, budget: int
) -> None:
    call = _call(batch, 2, rows, rows + cached, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.WHOLE_BYTES, "cpu", 0)
        patch.setitem(engine.STRIP_BYTES, "cpu", budget)
        patch.setattr(engine, "MIN_ROWS", 3)
        pieces = list(engine.strips(call, All()))
        (whole,) = engine.strips(call, All(), whole=True)
    seen = torch.zeros(batch, rows, dtype=torch.int64)
    for strip in pieces:
        seen[strip.batch, strip.rows] += 1
        last = call.q_start + strip.rows.stop if causal else rows + cached
        assert (strip.keys.start, strip.keys.stop) == (0, last)
        size = (strip.batch.stop - strip.batch.start) * (strip.rows.stop - strip.rows.start)
        assert size * 2 * (rows + cached) * 8 <= budget or size <= 3
    assert bool((seen == 1).all())
    assert whole.rows == slice(0, rows)


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cached", [0, 5])
def test_strips_equal_dense_attention(causal: bool, cached: int) -> None:
    call = _call(3, 2, 11, 11 + cached, causal=causal)
    assert len(list(engine.strips(call, All()))) > 3
    allowed = torch.ones(11, 11 + cached, dtype=torch.bool)
    allowed = allowed.tril(cached) if causal else allowed
    expected = _dense(call, allowed)
    assert_close(engine.run(_parts(), call), expected, "engine")
    assert_close(engine.run(_parts(), call, fused=True), expected, "fused")
    with torch.no_grad():
        assert_close(engine.run(_parts(), call), expected, "engine without gradients")
    weights = engine.weights(_parts(), call)
    assert_close(weights @ call.v, expected, "weights")


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("causal", [False, True])
def test_key_range_skips_keys_and_changes_nothing(causal: bool) -> None:
    call = _call(2, 2, 13, causal=causal)
    select = Bounded()
    pieces = list(engine.strips(call, select))
    assert max(strip.keys.stop - strip.keys.start for strip in pieces) <= 3 + 4
    steps = torch.arange(13)
    allowed = (steps[:, None] - steps).abs() <= 2
    allowed = allowed & (steps[:, None] >= steps) if causal else allowed
    expected = _dense(call, allowed)
    assert_close(engine.run(_parts(select), call), expected, "bounded strips")
    assert_close(engine.run(_parts(select), call, whole=True), expected, "one bounded strip")
    weights = engine.weights(_parts(select), call)
    assert weights.shape == (2, 2, 13, 13)
    assert not weights[..., ~allowed].any()


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("shape", [(1, 1, 1, 11), (2, 1, 1, 11), (1, 2, 11, 1), (2, 2, 11, 11)])
def test_masks_and_biases_of_any_shape_are_cut(shape: tuple[int, ...]) -> None:
    mask = draw(*shape, seed=3) > -0.5
    bias = draw(*shape, seed=4)
    call = _call(mask=mask, bias=bias)
    scores = call.q @ call.k.transpose(-1, -2) * call.scale + bias
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0) @ call.v
    for fused in (False, True):
        assert_close(engine.run(_parts(), call, fused=fused), expected, f"fused={fused}")


def test_keys_that_no_row_of_a_strip_sees() -> None:
    class Late(All):
        def key_range(self, call: Call, rows: slice) -> tuple[int, int]:
            return (9, 9) if rows.start == 0 else (0, 99)

    call = _call()
    for x in (call.q, call.k, call.v):
        x.requires_grad_()
    y = engine.run(_parts(Late()), call)
    assert not y.any()
    y.sum().backward()
    assert call.q.grad is not None
    assert not call.q.grad.any()


class Recorder(Dot):
    """Counts how often scores are made."""

    calls = 0

    def forward(self, strip: Strip) -> Tensor:
        type(self).calls += 1
        return super().forward(strip)


@pytest.mark.usefixtures("many_strips")
def test_strips_are_computed_again_only_for_gradients() -> None:
    call = _call(1, 2, 9)
    count = len(list(engine.strips(call, All())))
    Recorder.calls = 0
    with torch.no_grad():
        engine.run(_parts(score=Recorder()), call)
    assert Recorder.calls == count
    call.q.requires_grad_()
    engine.run(_parts(score=Recorder()), call).sum().backward()
    assert Recorder.calls == 3 * count


@pytest.mark.parametrize("route", ["engine", "sdpa_strips"])
def test_memory_grows_with_length_not_its_square(route: str) -> None:
    host = zoo.create("mha", 16, 2, causal=True, route=route)
    assert max(growth(host).values()) < 2.3
    host.route = "dense"
    assert min(growth(host).values()) > 3, "a dense pass shows that the measure can tell"


@pytest.mark.usefixtures("many_strips")
def test_gradcheck_through_many_strips() -> None:
    host = zoo.create("mha", 8, 2, causal=True, route="engine", dtype=torch.float64)
    x = draw(2, 7, 8).requires_grad_()
    assert torch.autograd.gradcheck(host, (x,), fast_mode=True)


@pytest.mark.usefixtures("many_strips")
def test_second_derivatives_through_many_strips() -> None:
    host = zoo.create("mha", 8, 2, causal=True, dtype=torch.float64)
    x = draw(1, 7, 8)

    def curvature(route: str) -> Tensor:
        host.route = route
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(host(y).square().sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), y)
        return second

    assert_close(curvature("engine"), curvature("dense"), "second derivative", gradient=True)


@pytest.mark.usefixtures("many_strips")
def test_dropout_is_the_same_when_a_strip_is_computed_again() -> None:
    host = zoo.create("mha", 8, 2, dropout=0.5, dtype=torch.float64, route="engine").train()
    x = draw(1, 9, 8).requires_grad_()
    v = draw(1, 9, 8, seed=1)
    eps = 1e-6

    def value(shift: float) -> Tensor:
        torch.manual_seed(3)
        return host(x + shift * v).sum()

    (gradient,) = torch.autograd.grad(value(0.0), x)
    slope = (value(eps) - value(-eps)) / (2 * eps)
    assert abs(float((gradient * v).sum() - slope.detach())) < 1e-6


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("inputs", [{}, {"mask": torch.rand(2, 1, 10, 10) < 0.7}])
def test_many_strips_compile_whole(inputs: dict[str, Tensor]) -> None:
    host = zoo.create("mha", 8, 2, causal=True, route="engine", dtype=torch.float64)
    x = draw(2, 10, 8)
    expected = settle(host, x, **inputs)
    torch._dynamo.reset()
    found = settle(torch.compile(host, fullgraph=True, backend="eager"), x, **inputs)
    torch._dynamo.reset()
    assert_close(found["output"], expected["output"], "compiled strips")
    assert_close(found["x"], expected["x"], "compiled gradient", gradient=True)


@pytest.mark.usefixtures("many_strips")
def test_parameters_of_parts_get_their_gradients_through_strips() -> None:
    class Slope(Position):
        biases = True

        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
            assert scores is not None
            return scores - self.slope * strip.distance().abs()

    call, found = _call(), []
    for whole in (False, True):
        position = Slope()
        y = engine.run(replace_position(_parts(), position), call, whole=whole)
        (y * draw(*y.shape, seed=5)).sum().backward()
        found.append(position.slope.grad)
    assert found[0] is not None
    assert found[0] != 0
    assert_close(found[0], found[1], "gradient of a slope", gradient=True)


def replace_position(parts: Stations, position: Position) -> Stations:
    return replace(parts, position=position)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("many_strips", "_two_threads")
def test_threads_change_nothing() -> None:
    call = _call()
    assert_close(engine.run(_parts(), call), _dense(call), "two threads")


@pytest.mark.parametrize("route", ["auto", "engine", "dense", "sdpa_strips"])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_batches_and_sequences(route: str, shape: tuple[int, ...]) -> None:
    host = zoo.create("mha", 8, 2, route=route)
    x = torch.zeros(shape, requires_grad=True)
    y = host(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_grouped_matmul(heads: int, groups: int) -> None:
    a, b = draw(2, heads, 5, 3), draw(2, groups, 3, 7)
    expected = torch.stack([a[:, h] @ b[:, h // (heads // groups)] for h in range(heads)], 1)
    assert_close(grouped_matmul(a, b), expected)


def test_mask_scores_stay_finite() -> None:
    scores = torch.randn(1, 1, 2, 3, dtype=torch.bfloat16)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    found = mask_scores(scores, mask)
    assert bool(found.isfinite().all())
    assert torch.equal(found[0, 0][mask], scores[0, 0][mask])
    assert bool((found[0, 0][~mask] < -1e30).all())
    assert mask_scores(scores, None) is scores


def test_the_backward_pass_needs_memory_linear_in_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zoo.bench import memory

    monkeypatch.setitem(engine.WHOLE_BYTES, "cpu", 0)
    monkeypatch.setitem(engine.STRIP_BYTES, "cpu", 2**16)
    host = zoo.create("mha", 32, 2, causal=True, route="engine")

    def used(length: int) -> int:
        x = torch.randn(1, length, 32, requires_grad=True)
        return memory.peak(lambda: host(x).sum().backward(), "cpu")

    # Doubled twice: 4 where memory is linear, 16 where every strip keeps a gradient of its own.
    assert used(2048) < 6 * used(512)
