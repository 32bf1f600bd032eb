"""Who computes what: every route gives the same numbers, and the refusals say why."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.host import routes
from zoo.host.attention import Attention
from zoo.host.routes import Explanation, Route
from zoo.parts import Call, Position, Select, Strip
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close


@pytest.mark.parametrize("spec", ["mha", "mha+rope", "differential", "moh", "mha+alibi"])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive_is_right_on_every_route(spec: str, scale: float) -> None:
    host = zoo.create(spec, 24, 4, causal=True, scale=scale, dtype=torch.float64)
    x = draw(2, 5, 24)
    host.route = "dense"
    expected = settle(host, x)
    host.route = "auto"
    for name, value in settle(host, x).items():
        assert_close(value, expected[name], name, gradient=name != "output")


class Even(Select):
    """Lets queries meet keys of even index, and themselves."""

    def allow(self, strip: Strip) -> Tensor:
        return (strip.k_index % 2 == 0) | (strip.q_index[:, None] == strip.k_index)


class Decay(Position):
    """Static bias with a learned slope."""

    biases = True
    static = True

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.2))

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        term = -self.slope * strip.distance().abs()
        term = term.view((1,) * (4 - term.ndim) + term.shape)
        return term if scores is None else scores + term


class Gate(Position):
    """A bias that depends on the scores."""

    biases = True

    def bias(self, strip: Strip, scores: Tensor | None) -> Tensor:
        assert scores is not None
        return scores + scores.tanh()


class Own(Select):
    """Brings a route of its own."""

    def allow(self, strip: Strip) -> None:
        return None

    def routes(self) -> tuple[Route, ...]:
        return (Route("own", self._refuse, self._run),)

    @staticmethod
    def _refuse(host: Attention, call: Call) -> str | None:
        return "too few queries" if call.q.shape[2] < 4 else None

    @staticmethod
    def _run(host: Attention, call: Call) -> Tensor:
        return routes.ENGINE.run(host, call)


def _path(cls: type) -> str:
    return f"{__name__}:{cls.__name__}"


MASKS: dict[str, Tensor | None] = {
    "none": None,
    "keys": zoo.padding_mask(torch.tensor([9, 5])),
    "pairs": draw(9, 9, seed=2) > -0.3,
    "heads": draw(2, 4, 9, 9, seed=3) > -0.3,
}
BIASES = {"none": None, "pairs": draw(9, 9, seed=4), "heads": draw(1, 4, 9, 9, seed=5)}
SPECS = ("mha", "gqa", f"gqa+{_path(Even)}", _path(Decay), f"mqa+{_path(Even)}+{_path(Decay)}")


def _possible(host: Attention, x: Tensor, **inputs: Any) -> list[str]:
    host.route = "auto"
    found = host.explain(x, **inputs)
    return ["auto", found.route, *found.skipped]


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_all_routes_give_the_same_numbers_and_gradients(spec: str, causal: bool) -> None:
    host = zoo.create(spec, 16, 4, causal=causal, dtype=torch.float64).double()
    x = draw(2, 9, 16)
    taken = set()
    for (mask_name, mask), (bias_name, bias) in itertools.product(MASKS.items(), BIASES.items()):
        given = None if bias is None else bias.clone().requires_grad_()
        host.route = "dense"
        expected = settle(host, x, mask=mask, bias=given)
        slope = None if given is None else given.grad
        for name in _possible(host, x, mask=mask, bias=given):
            host.route = name
            again = None if bias is None else bias.clone().requires_grad_()
            found = settle(host, x, mask=mask, bias=again)
            where = f"{name}, mask {mask_name}, bias {bias_name}"
            for item, value in expected.items():
                assert_close(found[item], value, f"{where}: {item}", gradient=item != "output")
            if again is not None:
                assert again.grad is not None
                assert slope is not None
                assert_close(again.grad, slope, f"{where}: bias", gradient=True)
            taken.add(name)
    assert {"auto", "sdpa_strips", "engine"} <= taken
    assert ("sdpa" in taken) == (spec in ("mha", "gqa"))


@pytest.mark.parametrize("spec", ["mha", f"{_path(Even)}", f"{_path(Decay)}"])
def test_all_routes_agree_on_a_context(spec: str) -> None:
    host = zoo.create(spec, 16, 4, dtype=torch.float64).double()
    x, context = draw(2, 5, 16), draw(2, 9, 16, seed=1)
    for mask in (None, MASKS["keys"], draw(2, 1, 5, 9, seed=2) > 0):
        host.route = "dense"
        expected = host(x, context, mask=mask)
        for name in _possible(host, x, context=context, mask=mask):
            host.route = name
            assert_close(host(x, context, mask=mask), expected, name)


def test_explanations() -> None:
    x = torch.randn(2, 9, 16)
    host = zoo.create("mha", 16, 4, causal=True)
    assert host.explain(x) == Explanation("sdpa", {}, ("sdpa_strips", "engine"))
    assert str(host.explain(x)) == "takes sdpa\nalso possible, but slower: sdpa_strips, engine"
    found = host.explain(x, mask=MASKS["keys"])
    assert found.route == "sdpa_strips"
    assert found.refused == {"sdpa": "it takes no mask or bias beside is_causal"}
    assert str(found).splitlines()[1] == "not sdpa: it takes no mask or bias beside is_causal"


@pytest.mark.parametrize(
    ("spec", "causal", "inputs", "route", "reason"),
    [
        ("mha", False, {}, "sdpa", ""),
        ("mha", False, {"mask": "keys"}, "sdpa", ""),
        ("mha", False, {"mask": "pairs"}, "sdpa_strips", "rows of the mask may be empty"),
        ("mha", False, {"bias": "heads"}, "sdpa", ""),
        ("mha", False, {"mask": "keys", "bias": "pairs"}, "sdpa_strips", "a mask or a bias"),
        ("mha", True, {"bias": "pairs"}, "sdpa_strips", "beside is_causal"),
        (_path(Even), True, {}, "sdpa_strips", f"select '{_path(Even)}' hides pairs"),
        (_path(Decay), False, {}, "sdpa_strips", f"position '{_path(Decay)}' biases"),
        (_path(Gate), False, {}, "engine", "biases the scores"),
    ],
)
def test_choice_and_its_reason(
    spec: str, causal: bool, inputs: dict[str, str], route: str, reason: str
) -> None:
    host = zoo.create(spec, 16, 4, causal=causal)
    given = {k: (MASKS if k == "mask" else BIASES)[v] for k, v in inputs.items()}
    found = host.explain(torch.randn(2, 9, 16), **given)
    assert found.route == route
    assert reason in found.refused.get("sdpa", "")
    assert bool(reason) == ("sdpa" in found.refused)


def test_engine_alone_takes_biases_that_depend_on_scores() -> None:
    found = zoo.create(_path(Gate), 16, 4).explain(torch.randn(1, 5, 16))
    assert found.route == "engine"
    assert "depends on queries or scores" in found.refused["sdpa_strips"]
    assert found.skipped == ()


def test_other_scores_and_normalizers_go_to_the_engine() -> None:
    name = "entmax" if "entmax" in zoo.list() else zoo.list(kind="normalize")[0]
    found = zoo.create(name, 16, 4).explain(torch.randn(1, 5, 16))
    assert found.refused["sdpa"] == f"normalize is {name!r}, not 'softmax'"
    assert "sdpa_strips" in found.refused


def test_dropout_on_a_cpu_stays_out_of_fused_softmax() -> None:
    host = zoo.create("mha", 16, 4, dropout=0.1)
    x = torch.randn(1, 5, 16)
    assert host.train().explain(x).refused["sdpa"] == (
        "its CPU form with dropout holds all N x M weights"
    )
    assert host.train().explain(x).route == "engine"
    assert host.eval().explain(x).route == "sdpa"


def test_cached_keys() -> None:
    host, cache = zoo.create("mha", 16, 4, causal=True), zoo.LayerCache()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        assert host.explain(x, cache=cache).route == "sdpa"
        host(x, cache=cache)
        before = cache.nbytes
        assert host.explain(x[:, :1], cache=cache).route == "sdpa", "one query needs no mask"
        found = host.explain(x[:, :3], cache=cache)
    assert found.refused["sdpa"] == "its causal mask starts top-left, but there are cached keys"
    assert (cache.length, cache.nbytes) == (9, before), "explain used up the cache"


def test_routes_of_parts_come_first() -> None:
    host = zoo.create(_path(Own), 16, 4)
    assert [route.name for route in routes.candidates(host)] == [
        *("own", "sdpa", "sdpa_strips", "engine")
    ]
    assert host.explain(torch.randn(1, 5, 16)).route == "own"
    found = host.explain(torch.randn(1, 3, 16))
    assert found.route != "own"
    assert found.refused["own"] == "too few queries"


def test_a_route_by_name_is_taken_or_raises() -> None:
    x = torch.randn(2, 9, 16)
    host = zoo.create("mha", 16, 4, causal=True, route="sdpa")
    host(x)
    with pytest.raises(zoo.ZooError, match="route='sdpa' cannot take this pass: it takes no mask"):
        host(x, mask=MASKS["keys"])
    for name, near in (("sdpa_strip", "sdpa_strips"), ("engin", "engine"), ("dens", "dense")):
        with pytest.raises(zoo.ZooError, match=f"unknown route '{name}'.*'{near}'"):
            host.route = name
    assert host.route == "sdpa"


def test_a_wrong_route_is_refused_at_construction() -> None:
    with pytest.raises(zoo.ZooError, match="unknown route 'fast'"):
        zoo.create("mha", 16, 4, route="fast")
    assert zoo.create(_path(Own), 16, 4, route="own").route == "own"


def test_attend_parts_explain_themselves() -> None:
    names = zoo.list(kind="attend")
    if not names:
        pytest.skip("no attend part is registered")
    host = zoo.create(names[0], 16, 4, causal=zoo.info(names[0]).traits.causal)
    found = host.explain(torch.randn(1, 5, 16))
    assert found.route == names[0]
    assert f"{names[0]!r} fills score, select and normalize" in found.refused["engine"]


@pytest.mark.parametrize("wrong", [{"maks": None}, {"route": "engine"}])
def test_explain_refuses_unknown_arguments(wrong: dict[str, Any]) -> None:
    host = zoo.create("mha", 16, 4)
    with pytest.raises(zoo.ZooError, match=f"unknown argument of explain '{next(iter(wrong))}'"):
        host.explain(torch.randn(1, 5, 16), **wrong)


def test_a_route_named_for_an_attend_part_is_not_ignored() -> None:
    names = zoo.list(kind="attend")
    if not names:
        pytest.skip("no attend part is registered")
    causal = not zoo.info(names[0]).traits.bidirectional
    with pytest.raises(zoo.ZooError, match="route"):
        zoo.create(names[0], 16, 4, causal=causal, route="engine")
