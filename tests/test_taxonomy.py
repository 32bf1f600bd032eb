"""What a paper, a taxonomy and traits may say of a mechanism, and what they may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import zoo
from zoo.errors import ZooError
from zoo.registry import Paper, Taxonomy, Traits

PLAIN = Taxonomy(
    sequences="self",
    levels="single",
    positions="global",
    representations="single",
    alignment="scaled_dot",
    distribution="inherited",
    complexity="quadratic",
)


@pytest.mark.parametrize("value", ["nonsense", ""])
@pytest.mark.parametrize(
    "axis",
    [
        *("sequences", "levels", "positions", "representations", "alignment", "distribution"),
        *("complexity", "exact", "family"),
    ],
)
def test_each_axis_refuses_foreign_values(axis: str, value: str) -> None:
    with pytest.raises(ZooError, match=f"unknown taxonomy {axis} '{value}'"):
        replace(PLAIN, **{axis: value})


@pytest.mark.parametrize("axis", ["modality", "needs"])
def test_lists_refuse_foreign_values(axis: str) -> None:
    with pytest.raises(ZooError, match=f"unknown taxonomy {axis} 'smell'"):
        replace(PLAIN, **{axis: ("smell",)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "hard", "distribution": "sigmoid"}, "positions='hard'"),
        ({"sequences": "co"}, "two_sequences"),
        ({"sequences": "distinctive"}, "two_sequences"),
        ({"complexity": "linear", "distribution": "softmax", "exact": "yes"}, "does not exist"),
        ({"family": "kernel"}, "exact='yes'"),
        ({"family": "kernel", "exact": "yes", "distribution": "sigmoid"}, "exact='yes'"),
        ({"family": "sequence_parallel", "exact": "no"}, "exact='yes'"),
    ],
)
def test_taxonomy_rules(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "hard", "distribution": "hard_topk"},
        {"sequences": "co", "needs": ("two_sequences",)},
        {"complexity": "linear", "distribution": "softmax", "exact": "no"},
        {"family": "kernel", "exact": "yes"},
    ],
)
def test_taxonomy_rules_allow_their_counterparts(changes: dict[str, Any]) -> None:
    assert replace(PLAIN, **changes) != PLAIN


def test_a_kind_can_imply_a_family_with_rules() -> None:
    with pytest.raises(ZooError, match="sequence_parallel needs exact='yes'"):
        zoo.register("ring_test", kind="parallel", taxonomy=PLAIN)(type("Ring", (), {}))
    assert not zoo.list("ring_test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 2020), "title is empty"),
        (("A", 1999), "2014 to 2026"),
        (("A", 2027), "2014 to 2026"),
        (("A", 2020, "20.1"), "not an identifier"),
    ],
)
def test_paper_checks(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Paper(*arguments)
    assert Paper("A", 2020).url is None


def test_trait_checks() -> None:
    with pytest.raises(ZooError, match="unknown trait mask 'all'"):
        Traits(mask="all")
    with pytest.raises(ZooError, match="one must hold"):
        Traits(causal=False, bidirectional=False)
