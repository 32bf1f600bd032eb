"""Specification strings, their canonical form, and layouts of layers."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zoo
from zoo.errors import CompatibilityError, ZooError
from zoo.host import spec
from zoo.host.spec import DEFAULTS, PartSpec, canonical, layout, parse, sockets, split, without
from zoo.parts import Attend, Normalize, Score, Select
from zoo.registry import Paper, Taxonomy, unregister

PLAIN = Taxonomy(
    sequences="self",
    levels="single",
    positions="global",
    representations="single",
    alignment="scaled_dot",
    distribution="inherited",
    complexity="quadratic",
)


class Sharp(Score):
    """Takes options of every sort."""

    def __init__(
        self,
        number: float = 1.0,
        word: str = "plain",
        maybe: int | None = None,
        pair: tuple[int, ...] = (1, 2),
        on: bool = False,
    ) -> None:
        super().__init__()


class Near(Select):
    """Has an option."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()


class Norm(Normalize):
    """Has an option of the same name as another."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()


class Whole(Attend):
    """Fills three sockets."""


class Module:
    """A whole module."""


PARTS = {
    "sharp_t": ("score", Sharp, {"default": "plain", "first": "same"}),
    "near_t": ("select", Near, {}),
    "norm_t": ("normalize", Norm, {"first": "plain", "every": 3, "other": "entmax"}),
    "whole_t": ("attend", Whole, {}),
    "module_t": ("mixer", Module, {}),
}


@pytest.fixture(autouse=True, scope="module")
def _parts() -> Iterator[None]:
    for name, (kind, cls, layers) in PARTS.items():
        zoo.register(
            name,
            kind=kind,
            taxonomy=PLAIN,
            paper=Paper("A paper", 2020),
            layers=layers,
            aliases=(f"{name}_alias",),
        )(cls)
    yield
    for name in PARTS:
        unregister(name)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("sharp_t", {}),
        ("sharp_t()", {}),
        (" sharp_t ( number = 2 ) ", {"number": 2}),
        ("sharp_t(number=-1e-3)", {"number": -1e-3}),
        ("sharp_t(word=other)", {"word": "other"}),
        ("sharp_t(word='a+b, (c)')", {"word": "a+b, (c)"}),
        ('sharp_t(word="it\'s")', {"word": "it's"}),
        ("sharp_t(maybe=None, on=True)", {"maybe": None, "on": True}),
        ("sharp_t(pair=(3, 4), word=x)", {"pair": (3, 4), "word": "x"}),
        ("sharp_t(pair=[1, {'a': 2}])", {"pair": [1, {"a": 2}]}),
        ("sharp_t_alias(number=3)", {"number": 3}),
    ],
)
def test_parse_one_part(text: str, options: dict[str, Any]) -> None:
    assert parse(text) == [PartSpec("sharp_t", options)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("+", "empty part"),
        ("mha+", "empty part"),
        ("mha++nope", "empty part"),
        ("(number=1)", "empty part"),
        ("sharp_t(number=1", "do not match"),
        ("sharp_t)number=1(", "do not match"),
        ("sharp_t(word='x)", "do not match"),
        ("sharp_t(1)", "written name=value"),
        ("sharp_t(**x)", "written name=value"),
        ("sharp_t(number=)", "cannot read"),
        ("sharp_t(number=1) x", "cannot read"),
        ("sharp_t(number=1)(word=2)", "written name=value|cannot read"),
        ("sharp_t(number=f(1))", "'number' is not a plain value"),
        ("sharp_t(number=__import__('os'))", "'number' is not a plain value"),
        ("sharp_t(number=1, number=2)", "number"),
        ("sharp_t(nummer=1)", "unknown option of 'sharp_t' 'nummer'.*'number'"),
        ("sofmax", "unknown mechanism 'sofmax'.*'softmax'"),
        ("mha(heads=4)", "unknown option of 'mha' 'heads'"),
    ],
)
def test_unreadable_specifications(text: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        parse(text)


@pytest.mark.parametrize("wrong", [None, 3, ["mha"]])
def test_a_specification_is_a_string(wrong: Any) -> None:
    with pytest.raises(ZooError, match="specification"):
        parse(wrong)


def test_two_parts_for_one_socket() -> None:
    with pytest.raises(CompatibilityError, match=r"'sharp_t' and 'dot' both fill .*'score'"):
        parse("sharp_t+dot")
    with pytest.raises(CompatibilityError, match="both fill the socket 'project'"):
        parse("mha+near_t+gqa")


@pytest.mark.parametrize("other", ["sharp_t", "near_t", "norm_t"])
def test_attend_leaves_no_room_for_its_sockets(other: str) -> None:
    with pytest.raises(CompatibilityError, match=f"'whole_t'.*'{other}'"):
        parse(f"{other}+whole_t")
    assert set(sockets(parse("whole_t+gqa+none"))) == {"attend", "project", "position"}


def test_whole_modules_do_not_combine() -> None:
    with pytest.raises(CompatibilityError, match=r"'module_t' is a mixer.*'mha'"):
        parse("mha+module_t")
    assert [p.name for p in parse("module_t")] == ["module_t"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mha", "mha"),
        ("softmax", "mha"),
        ("dot+all+softmax+mha+none+concat", "mha"),
        ("nope", "mha"),
        ("none+near_t", "near_t"),
        ("near_t(width=4)", "near_t"),
        ("near_t(width=5)+sharp_t", "sharp_t+near_t(width=5)"),
        ("near_t_alias", "near_t"),
        ("gqa+norm_t+near_t+sharp_t", "sharp_t+near_t+norm_t+gqa"),
        ("sharp_t(word=b, number=2)", "sharp_t(number=2, word=b)"),
        ("sharp_t(word='b c')", "sharp_t(word='b c')"),
        ("sharp_t(word='None')", "sharp_t(word='None')"),
        ("mha(kv_heads=2)", "mha(kv_heads=2)"),
        ("module_t", "module_t"),
    ],
)
def test_canonical(text: str, expected: str) -> None:
    assert canonical(text) == expected
    assert canonical(expected) == expected


def test_canonical_keeps_a_position_beside_its_attention() -> None:
    assert canonical("rope") == canonical("rope+mha") == canonical("softmax+rope") == "mha+rope"
    assert canonical("rope+near_t") == "near_t+rope"


WORDS = st.text(string.printable, max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(WORDS, inner, max_size=2)
    ),
    max_leaves=6,
)


@example({"word": "lambda"}, "")
@example({"word": "None", "maybe": "True"}, "+gqa")
@example({"number": float("inf")}, "")
@example({"word": "ﬁ"}, "")  # an identifier, but Python reads the ligature as two letters
@settings(max_examples=150)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("number", "word", "maybe", "pair", "on"), VALUES)
    ),
    st.sampled_from(["", "+near_t(width=7)", "+gqa", "+gqa+norm_t"]),
)
def test_any_options_survive_writing_and_reading(options: dict[str, Any], more: str) -> None:
    text = str(PartSpec("sharp_t", options)) + more
    part = parse(text)[0]
    assert part == PartSpec("sharp_t", options)
    once = canonical(text)
    assert canonical(once) == once
    assert {p.name: p.options for p in parse(once)}.keys() == {p.name for p in parse(text)}


@given(st.permutations(["sharp_t", "near_t(width=9)", "gqa", "none", "concat"]))
def test_canonical_does_not_depend_on_order(parts: list[str]) -> None:
    assert canonical("+".join(parts)) == "sharp_t+near_t(width=9)+gqa"


def test_split_respects_brackets_and_quotes() -> None:
    assert split("a(x='+')+b([1+2])+c", "+") == ["a(x='+')", "b([1+2])", "c"]
    assert split("a, b(1,2), 'c,d'", ",") == ["a", "b(1,2)", "'c,d'"]


def test_without() -> None:
    assert without("near_t+rope", "position") == ("near_t", PartSpec("rope"))
    assert without("rope", "position") == ("mha", PartSpec("rope"))
    assert without("near_t", "position") == ("near_t", None)


@pytest.mark.parametrize(
    ("attention", "layers", "expected"),
    [
        ("mha", None, "mmmmmm"),
        ({"default": "mha"}, None, "mmmmmm"),
        ("mha", {"first": "near_t"}, "nmmmmm"),
        ("mha", {"last": "near_t"}, "mmmmmn"),
        ("mha", {"every": 2, "other": "near_t"}, "mnmnmn"),
        ("mha", {"every": 4, "other": "near_t"}, "mmmnmm"),
        ("mha", {"every": 9, "other": "near_t"}, "mmmmmm"),
        ("mha", {"every": 1, "other": "near_t", "last": "mha"}, "nnnnnm"),
        ("mha", {"first": None, "last": None, "every": None, "other": None}, "mmmmmm"),
        ({"default": "mha", "first": "near_t"}, {"last": "near_t"}, "nmmmmn"),
        ({"default": "mha", "first": "near_t"}, {"first": "mha"}, "mmmmmm"),
    ],
)
def test_layout(attention: Any, layers: Any, expected: str) -> None:
    assert "".join(s[0] for s in layout(attention, 6, layers)) == expected


def test_layout_of_the_paper_unless_told_otherwise() -> None:
    paper = ["mha", "norm_t", "entmax", "norm_t"]
    assert layout("norm_t", 4) == paper
    assert layout({"default": "norm_t"}, 4) == paper
    assert layout("norm_t", 4, {"first": "same"}) == ["norm_t"] * 4
    assert layout("norm_t", 3, {"last": "mha"}) == ["norm_t", "norm_t", "mha"]


def test_a_declared_layout_touches_only_the_sockets_of_its_part() -> None:
    assert layout("rope+norm_t(width=2)", 4) == [
        "rope",
        "rope+norm_t(width=2)",
        "rope+entmax",
        "rope+norm_t(width=2)",
    ]
    both = layout("norm_t+sharp_t", 4)
    assert both == ["sharp_t", "norm_t", "entmax", "norm_t"]


def test_a_model_too_shallow_for_a_declared_layout_keeps_the_part() -> None:
    assert layout("norm_t", 1) == ["norm_t"]
    assert layout("norm_t+sharp_t", 1) == ["norm_t+sharp_t"]


@pytest.mark.parametrize(
    ("attention", "depth", "layers", "message"),
    [
        ("mha", 0, None, "depth=0"),
        ("mha", 2, {"frist": "mha"}, "unknown key of layers 'frist'.*'first'"),
        ({"first": "mha"}, 2, None, "'default' is missing"),
        ("mha", 2, {"every": 2}, "go together"),
        ("mha", 2, {"other": "mha"}, "go together"),
        ("mha", 2, {"every": 0, "other": "mha"}, "every=0"),
        ("mha", 2, {"every": "2", "other": "mha"}, "every='2'"),
        ("mha", 2, {"first": "mhaa"}, "unknown mechanism 'mhaa'"),
        ("mhaa", 2, None, "unknown mechanism 'mhaa'"),
    ],
)
def test_wrong_layouts(attention: Any, depth: int, layers: Any, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        layout(attention, depth, layers)


def test_defaults_are_registered_in_their_sockets() -> None:
    assert {kind: zoo.info(name).kind for kind, name in DEFAULTS.items()} == {
        kind: kind for kind in DEFAULTS
    }
    assert set(spec._ORDER) == {*DEFAULTS, "attend"}


def test_create_takes_options_beside_the_spec() -> None:
    assert zoo.create("near_t", 8, 2, width=7).spec == "near_t(width=7)"
    assert zoo.create("near_t(width=7)+sharp_t", 8, 2, number=3.0).spec == (
        "sharp_t(number=3.0)+near_t(width=7)"
    )
    with pytest.raises(ZooError, match="'width' belongs to 'near_t' and 'norm_t'"):
        zoo.create("near_t+norm_t", 8, 2, width=7)
    with pytest.raises(ZooError, match="'width' is given twice"):
        zoo.create("near_t(width=3)", 8, 2, width=7)
    with pytest.raises(ZooError, match=r"unknown option of 'near_t' 'widht'.*'width'"):
        zoo.create("near_t", 8, 2, widht=7)
    with pytest.raises(ZooError, match=r"unknown option of 'near_t' 'casual'.*'causal'"):
        zoo.create("near_t", 8, 2, casual=True)
    with pytest.raises(ZooError, match="heads"):
        zoo.create("mha", 8)
    with pytest.raises(ZooError, match="too many positional"):
        zoo.create("mha", 8, 2, "mha", 4)


@pytest.mark.parametrize(("word", "shared"), [("true", True), ("False", False), ("false", False)])
def test_switches_are_read_as_yaml_and_python_write_them(word: str, shared: bool) -> None:
    (part,) = parse(f"cope(shared={word})")
    assert part.options == {"shared": shared}
    assert canonical(f"cope(npos=4, shared={word})") == (
        "mha+cope(npos=4, shared=True)" if shared else "mha+cope(npos=4)"
    )


@pytest.mark.parametrize("value", ["no", 1, None, "'false'"])
def test_a_switch_that_is_no_truth_value_is_refused(value: object) -> None:
    with pytest.raises(ZooError, match=r"sep_key=.* of 'CoPE' must be True or False"):
        zoo.create(f"cope(npos=4, sep_key={value})", 16, 2, causal=True)


def test_what_was_read_once_belongs_to_whoever_asked() -> None:
    text = "triplet(branches=['hc'])"
    parse(text)[0].options["branches"].append("hw")
    assert parse(text)[0].options == {"branches": ["hc"]}
    zoo.info("triplet").options.clear()
    assert "branches" in zoo.info("triplet").options
    for _ in range(2):
        with pytest.raises(zoo.ZooError, match="given twice"):
            parse("triplet(kernel_size=3, kernel_size=5)")
