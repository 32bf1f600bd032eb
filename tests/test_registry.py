"""Names, filters, taxonomy rules, plug-ins and dotted paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import ZooError, nearest, unknown
from zoo.parts import Score, Strip
from zoo.registry import Entry, Paper, Taxonomy, Traits, unregister

PLAIN = Taxonomy(
    sequences="self",
    levels="single",
    positions="global",
    representations="single",
    alignment="scaled_dot",
    distribution="inherited",
    complexity="quadratic",
)
PAPER = Paper("A paper", 2020, "2001.00001")


class Plain(Score):
    """Scores all pairs with zero.

    Args:
        sharpness: Does nothing but be there.
    """

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, strip: Strip) -> torch.Tensor:
        return 0 * self.sharpness * (strip.q @ strip.k.transpose(-1, -2))


class Foreign:
    """Neither registered nor a part."""


@pytest.fixture
def add() -> Iterator[Any]:
    """Register under a name for the length of a test."""
    names: set[str] = set()

    def register(name: str, cls: type = Plain, **facts: Any) -> Entry:
        settings = {"kind": "score", "taxonomy": PLAIN, "paper": PAPER, **facts}
        zoo.register(name, **settings)(cls)
        names.add(name)
        return zoo.info(name)

    yield register
    for name in names:
        unregister(name)


def test_registered_mechanism_is_listed_and_built(add: Any) -> None:
    entry = add("flat_test", aliases=("flat2_test",), notes="for a test")
    assert zoo.list("flat*") == ["flat_test"]
    assert zoo.info("flat2_test") is zoo.info("flat_test") is entry
    assert entry.summary == "Scores all pairs with zero."
    assert list(entry.options) == ["sharpness"]
    assert entry.paper is not None
    assert entry.paper.url == "https://arxiv.org/abs/2001.00001"
    module = zoo.create("flat2_test", 8, 2, sharpness=3.0)
    assert module.score.sharpness == 3.0
    assert module.spec == "flat_test(sharpness=3.0)"


def test_unregister_takes_aliases_out(add: Any) -> None:
    add("gone_test", aliases=("gone2_test",))
    unregister("gone_test")
    for name in ("gone_test", "gone2_test"):
        with pytest.raises(ZooError, match="unknown mechanism"):
            zoo.info(name)
    entry = add("gone_test", aliases=("gone2_test",))  # both are free again
    assert zoo.info("gone2_test") is entry


@pytest.mark.parametrize(
    ("name", "aliases"),
    [("mha", ()), ("nope", ()), ("new_test", ("mha",)), ("new_test", ("nope",))],
)
def test_taken_names_and_aliases_raise(name: str, aliases: tuple[str, ...]) -> None:
    before = zoo.list()
    with pytest.raises(ZooError, match=r"is taken by zoo\.\w+\.\w+\.\w+; choose another"):
        zoo.register(name, kind="score", taxonomy=PLAIN, aliases=aliases)(Plain)
    assert zoo.list() == before


@pytest.mark.parametrize("name", ["Mha", "two-words", "9lives", "", "a b", "a+b"])
def test_malformed_names_raise(name: str) -> None:
    with pytest.raises(ZooError, match="not snake_case"):
        zoo.register(name, kind="score", taxonomy=PLAIN)


@pytest.mark.parametrize("aliases", [("twice_test",), ("second_test", "second_test")])
def test_a_name_twice_in_one_registration_raises(add: Any, aliases: tuple[str, ...]) -> None:
    with pytest.raises(ZooError, match=aliases[0]):
        add("twice_test", aliases=aliases)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ZooError, match=r"unknown kind 'normalise'.*'normalize'"):
        zoo.register("x_test", kind="normalise", taxonomy=PLAIN)


def test_constructor_that_hides_options_is_refused() -> None:
    class Hiding(Plain):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()

    with pytest.raises(ZooError, match=r"\*\*kwargs hides options"):
        zoo.register("hiding_test", kind="score", taxonomy=PLAIN)(Hiding)
    assert not zoo.list("hiding_test")


@pytest.mark.parametrize(
    ("wrong", "right"), [("sofmax", "softmax"), ("MHA", "mha"), ("mhaa", "mha"), ("nop", "nope")]
)
def test_unknown_name_says_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ZooError, match=f"unknown mechanism '{wrong}'; did you mean.*'{right}'"):
        zoo.info(wrong)


def test_unknown_error_lists_what_is_allowed() -> None:
    assert str(unknown("thing", "zzz", ["b", "a"])) == "unknown thing 'zzz'; allowed: a, b"
    assert "none is allowed here" in str(unknown("thing", "zzz", []))
    many = [f"name{i}" for i in range(20)]
    assert "there are 20, e.g. name0, name1, name10" in str(unknown("thing", "qqq", many))
    assert nearest("gamma", ["alpha", "gamma_ray", "Gamma"]) == ["Gamma", "gamma_ray"]
    assert nearest("", ["alpha"]) == []


def test_wildcards_and_natural_order(add: Any) -> None:
    for name in ("nat10_test", "nat9_test", "nat_test", "nat9b_test"):
        add(name)
    assert zoo.list("nat*_test") == ["nat9_test", "nat9b_test", "nat10_test", "nat_test"]
    assert zoo.list(["nat9*", "nat1?_*"]) == ["nat9_test", "nat9b_test", "nat10_test"]
    assert zoo.list("Nat*") == []
    assert zoo.list("no_such_thing") == []
    assert zoo.list() == zoo.list("*")
    assert zoo.list("nope") == ["none"], "an alias finds its entry"


def test_filters(add: Any) -> None:
    add("far_test", traits=Traits(causal=False, mask="keys"))
    add(
        "near_test",
        traits=Traits(bidirectional=False),
        taxonomy=replace(PLAIN, positions="local", needs=("pattern", "cuda"), modality=("video",)),
    )
    both = ["far_test", "near_test"]

    def found(**filters: Any) -> list[str]:
        return zoo.list("*_test", **filters)

    assert found() == both
    assert found(kind="score") == both
    assert found(kind=["score", "select"]) == both
    assert found(kind="select") == []
    assert found(traits={"causal": True}) == ["near_test"]
    assert found(traits={"mask": "keys", "causal": False}) == ["far_test"]
    assert found(positions="local") == ["near_test"]
    assert found(needs="cuda") == ["near_test"]
    assert found(modality="any") == ["far_test"]
    assert found(family="token_mixer") == both
    assert found(causality="required") == ["near_test"]
    assert found(causality="unsupported", alignment="scaled_dot") == ["far_test"]
    assert zoo.info("mha").causality == "supported"
    with pytest.raises(ZooError, match=r"unknown kind 'scor'.*'score'"):
        found(kind="scor")
    with pytest.raises(ZooError, match=r"unknown trait 'causl'.*'causal'"):
        found(traits={"causl": True})
    with pytest.raises(ZooError, match=r"unknown filter 'position'.*'positions'"):
        found(position="local")
    with pytest.raises(ZooError, match=r"unknown taxonomy positions 'lokal'.*'local'"):
        found(positions="lokal")


def test_dotted_path() -> None:
    path = f"{__name__}:Plain"
    entry = zoo.info(path)
    assert (entry.name, entry.kind, entry.cls, entry.paper) == (path, "score", Plain, None)
    module = zoo.create(f"{path}(sharpness=2.0)", 8, 2)
    assert module.score.sharpness == 2.0
    assert module(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    assert zoo.info("zoo.normalize.softmax:Softmax") is zoo.info("softmax")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Thing", "cannot import 'no_such_module'"),
        (f"{__name__}:Plan", "unknown class.*'Plan'.*'Plain'"),
        (f"{__name__}:Foreign", "neither registered nor a part"),
        (f"{__name__}:PLAIN", "unknown class"),
    ],
)
def test_wrong_dotted_paths(path: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        zoo.info(path)


def test_kinds_have_the_traits_that_mean_something_for_them():
    """No list by a trait holds a kind that the trait says nothing about, whatever its value."""
    every = [item.name for item in fields(Traits)]
    for name in zoo.list():
        entry = zoo.info(name)
        assert set(entry.promises) <= set(every)
        assert entry.promises["cost"] == entry.traits.cost
        for trait in every:
            for value in (True, False, "any", "keys", "none"):
                listed = name in zoo.list(traits={trait: value})
                assert listed == (trait in entry.promises and entry.promises[trait] == value)
    assert set(zoo.info("cbam").promises) == {"compile", "gradient", "cost"}
    assert "cbam" not in zoo.list(traits={"decode": True}) + zoo.list(traits={"decode": False})
    assert zoo.info("slot").promises["mask"] == zoo.info("mesh").promises["mask"] == "keys"


def test_a_class_of_torch_stays_as_it_is_when_it_is_registered(add):
    forward = torch.nn.Flatten.forward
    add("borrowed_test", torch.nn.Flatten, kind="slots")
    assert torch.nn.Flatten.forward is forward
    assert torch.nn.Flatten()(torch.zeros(1, 2, 3, 4)).shape == (1, 24)
