"""Each check of values: what it takes, what it refuses, and what it says, word by word."""

from __future__ import annotations

import inspect
import math
import typing
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo import checks
from zoo.errors import ZooError
from zoo.parts import Layout


def said(call, *args, **options):
    with pytest.raises(ZooError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "args", "options", "found"),
    [
        (checks.whole, (1,), {}, 1),
        (checks.whole, (np.int64(3), 3, 3), {}, 3),
        (checks.whole, (np.uint8(255), 1, 1000), {}, 255),
        (checks.whole, (-7, None), {}, -7),
        (checks.whole, (-7, None, -7), {}, -7),
        (checks.whole, (10**400,), {}, 10**400),
        (checks.multiple, (8, 4), {}, 8),
        (checks.multiple, (np.int8(4), 2, 4), {}, 4),
        (checks.multiple, (np.uint8(200), 1000, 200), {}, 200),
        (checks.multiple, (0, 2, 0), {}, 0),
        (checks.odd, (1,), {}, 1),
        (checks.odd, (np.int16(7), 3), {}, 7),
        (checks.number, (2,), {}, 2),
        (checks.number, (np.float32(0.5), 0, 1), {}, 0.5),
        (checks.number, (np.int64(2), 2), {}, 2),
        (checks.number, (Fraction(1, 4), 0), {"below": 1}, 0.25),
        (checks.number, (0.0, 0), {"below": 1}, 0.0),
        (checks.number, (1e-9,), {"above": 0}, 1e-9),
        (checks.flag, (True,), {}, True),
        (checks.flag, (False,), {}, False),
        (checks.text, ("a",), {}, "a"),
        (checks.choice, ("a", ("a", "b")), {}, "a"),
        (checks.choice, ("b", {"a": 1, "b": 2}), {}, "b"),
        (checks.several, ((1, 2),), {}, [1, 2]),
        (checks.several, ([],), {}, []),
        (checks.several, ([1, 1],), {"distinct": False}, [1, 1]),
        (checks.wholes, ([2, np.int32(3)],), {}, (2, 3)),
        (checks.wholes, (np.array([2, 3]), 2), {}, (2, 3)),
        (checks.wholes, ((0, 0), 2, 0), {}, (0, 0)),
        (checks.image_shape, ([3, np.int64(8), 9],), {}, (3, 8, 9)),
    ],
)
def test_what_is_taken_comes_back_in_one_form(call, args, options, found):
    got = call("x", *args, **options)
    assert got == found
    kinds = [type(item) for item in got] if isinstance(got, list | tuple) else type(got)
    assert kinds == (
        [type(item) for item in found] if isinstance(got, list | tuple) else type(found)
    )


@pytest.mark.parametrize(
    ("call", "args", "options", "message"),
    [
        (checks.whole, (0,), {}, "x=0 must be a whole number of at least 1"),
        (checks.whole, (True,), {}, "x=True must be a whole number of at least 1"),
        (checks.whole, ("1",), {}, "x='1' must be a whole number of at least 1"),
        (checks.whole, (None,), {}, "x=None must be a whole number of at least 1"),
        (checks.whole, (math.nan,), {}, "x=nan must be a whole number of at least 1"),
        (checks.whole, (math.inf,), {}, "x=inf must be a whole number of at least 1"),
        (checks.whole, (2.5,), {}, "x=2.5 must be a whole number of at least 1 (nearest: 2, 3)"),
        (checks.whole, (8.0,), {}, "x=8.0 must be a whole number of at least 1 (nearest: 8)"),
        (checks.whole, (-0.5,), {}, "x=-0.5 must be a whole number of at least 1 (nearest: 1)"),
        (checks.whole, (1.5, None), {}, "x=1.5 must be a whole number (nearest: 1, 2)"),
        (checks.whole, (5, 1, 4), {}, "x=5 must be a whole number from 1 to 4 (nearest: 4)"),
        (checks.whole, (5, None, 4), {}, "x=5 must be a whole number of at most 4"),
        (
            checks.whole,
            (0,),
            {"of": "rope", "also": "or None"},
            "x=0 of 'rope' must be a whole number of at least 1, or None",
        ),
        (
            checks.multiple,
            (30, 4, 8),
            {},
            "x=30 must be a multiple of 4 of at least 8 (nearest: 28, 32)",
        ),
        (checks.multiple, (5, 4, 8), {}, "x=5 must be a multiple of 4 of at least 8 (nearest: 8)"),
        (checks.multiple, (3, 2), {}, "x=3 must be an even number of at least 2 (nearest: 2, 4)"),
        (checks.multiple, (4.0, 2), {}, "x=4.0 must be an even number of at least 2 (nearest: 4)"),
        (checks.multiple, (False, 2, 0), {}, "x=False must be an even number of at least 0"),
        (
            checks.multiple,
            (3, 2),
            {"of": "fope", "also": "as pairs turn"},
            "x=3 of 'fope' must be an even number of at least 2 (nearest: 2, 4), as pairs turn",
        ),
        (checks.odd, (4,), {}, "x=4 must be an odd number of at least 1 (nearest: 3, 5)"),
        (checks.odd, (0, 3), {}, "x=0 must be an odd number of at least 3 (nearest: 3)"),
        (checks.odd, (True,), {}, "x=True must be an odd number of at least 1"),
        (checks.odd, (math.nan,), {}, "x=nan must be an odd number of at least 1"),
        (checks.number, ("1",), {}, "x='1' must be a finite number"),
        (checks.number, (math.nan,), {}, "x=nan must be a finite number"),
        (checks.number, (math.inf, 0), {}, "x=inf must be a number of at least 0"),
        (checks.number, (-math.inf,), {"below": 1}, "x=-inf must be a number below 1"),
        (
            checks.number,
            (np.float32("nan"), 0),
            {},
            f"x={np.float32('nan')!r} must be a number of at least 0",
        ),
        (checks.number, (True, 0), {}, "x=True must be a number of at least 0"),
        (checks.number, (1.0, 0), {"below": 1}, "x=1.0 must be a number in [0, 1)"),
        (checks.number, (1j,), {}, "x=1j must be a finite number"),
        (checks.number, (0,), {"above": 0, "high": 1}, "x=0 must be a number in (0, 1]"),
        (checks.number, (2,), {"above": 0, "below": 1}, "x=2 must be a number in (0, 1)"),
        (checks.number, (2, 0, 0.9), {}, "x=2 must be a number in [0, 0.9]"),
        (checks.number, (0,), {"above": 0}, "x=0 must be a number above 0"),
        (checks.number, (2, -math.inf, 1), {}, "x=2 must be a number of at most 1"),
        (checks.number, (0, 1234567), {}, "x=0 must be a number of at least 1234567"),
        (
            checks.number,
            (1,),
            {"above": 1, "of": "rope", "also": "e.g. 10000.0"},
            "x=1 of 'rope' must be a number above 1, e.g. 10000.0",
        ),
        (checks.flag, ("false",), {}, "x='false' must be True or False"),
        (checks.flag, (1,), {"of": "CoPE"}, "x=1 of 'CoPE' must be True or False"),
        (
            checks.flag,
            (None,),
            {"also": "one for each"},
            "x=None must be True or False, one for each",
        ),
        (checks.text, ("",), {}, "x='' must be a non-empty string"),
        (checks.text, (3,), {}, "x=3 must be a non-empty string"),
        (
            checks.choice,
            ("colour", ("color", "size")),
            {},
            "unknown x 'colour'; did you mean 'color'?",
        ),
        (checks.choice, (3, ("a", "b")), {}, "unknown x 3; allowed: a, b"),
        (checks.choice, (["a"], ("a", "b")), {}, "unknown x ['a']; allowed: a, b"),
        (
            checks.choice,
            (None, ("a", "b")),
            {"of": "moh"},
            "unknown x of 'moh' None; allowed: a, b",
        ),
        (checks.several, (3,), {}, "x=3 must be a list"),
        (checks.several, ("ab",), {}, "x='ab' must be a list"),
        (checks.several, ((1, 2, 1),), {}, "x=[1, 2, 1] must be a list of different values"),
        (checks.several, ([[1], [1]],), {}, "x=[[1], [1]] must be a list of different values"),
        (checks.wholes, (3,), {}, "x=3 must be whole numbers of at least 1"),
        (checks.wholes, ([],), {}, "x=[] must be whole numbers of at least 1"),
        (checks.wholes, ((), 2), {}, "x=() must be 2 whole numbers of at least 1"),
        (checks.wholes, ("12", 2), {}, "x='12' must be 2 whole numbers of at least 1"),
        (checks.wholes, ([1, 2, 3], 2), {}, "x=[1, 2, 3] must be 2 whole numbers of at least 1"),
        (checks.wholes, ([1, True], 2, 0), {}, "x=[1, True] must be 2 whole numbers of at least 0"),
        (
            checks.wholes,
            ((1, 0),),
            {"of": "rope", "also": "(rows, columns)"},
            "x=(1, 0) of 'rope' must be whole numbers of at least 1, (rows, columns)",
        ),
        (checks.image_shape, (8,), {}, "x=8 must be (channels, height, width)"),
        (checks.image_shape, ((8, 8),), {}, "x=(8, 8) must be (channels, height, width)"),
        (checks.image_shape, ((1, 0, 8),), {}, "x: height=0 must be a whole number of at least 1"),
    ],
)
def test_what_is_refused_is_named_with_what_is_allowed(call, args, options, message):
    assert said(call, "x", *args, **options) == message


def test_a_number_beyond_all_floats_is_not_finite():
    message = said(checks.number, "x", 10**400)
    assert message.startswith("x=1000000")
    assert message.endswith("... must be a finite number")


def test_tensors_are_no_numbers():
    assert said(checks.whole, "x", torch.tensor(3)).startswith("x=tensor(3) must be")
    assert said(checks.number, "x", torch.tensor(0.5)).startswith("x=tensor(0.5000) must be")
    assert said(checks.flag, "x", torch.tensor(True)).startswith("x=tensor(True) must be")


@pytest.mark.parametrize(
    ("check", "value", "args", "message"),
    [
        (checks.optional(checks.whole), 0, (), "x=0 must be a whole number of at least 1, or None"),
        (
            checks.optional(checks.odd),
            4,
            (),
            "x=4 must be an odd number of at least 1 (nearest: 3, 5), or None",
        ),
        (
            checks.optional(checks.number, "for no clipping"),
            -1,
            (0,),
            "x=-1 must be a number of at least 0, or None for no clipping",
        ),
    ],
)
def test_none_is_taken_where_it_may_be_and_named_as_allowed(check, value, args, message):
    assert check("x", None, *args) is None
    assert check("x", 5, *args) == 5
    assert said(check, "x", value, *args) == message


def test_each_item_of_a_sequence_is_checked_and_named():
    check = checks.each(checks.whole)
    assert check("x", (np.int64(3), 4), 3) == [3, 4]
    assert check("x", [], 3) == []
    assert said(check, "x", [4, 2], 3) == "x[1]=2 must be a whole number of at least 3"
    assert said(check, "x", [4, 4], 3) == "x=[4, 4] must be a list of different values"
    assert said(check, "x", 4, 3) == "x=4 must be a list"
    assert checks.each(checks.number, distinct=False)("x", [1, 1], above=0) == [1, 1]
    nested = checks.each(checks.each(checks.whole))
    assert said(nested, "x", [[1], [2, 0]]) == "x[1][1]=0 must be a whole number of at least 1"


def test_an_error_for_a_relation_speaks_alike():
    assert str(checks.wrong("x", 3, "a divisor of y=4", nearest=(2, 4))) == (
        "x=3 must be a divisor of y=4 (nearest: 2, 4)"
    )
    assert str(checks.wrong("x", 3, "even", of="fope", also="e.g. 2")) == (
        "x=3 of 'fope' must be even, e.g. 2"
    )


def test_a_long_value_is_cut_and_shown_in_one_line():
    assert checks.shown("a" * 78) == repr("a" * 78)
    assert checks.shown("a" * 79) == "'" + "a" * 76 + "..."
    assert checks.shown(np.zeros((2, 2))) == "array([[0., 0.],        [0., 0.]])"


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-40, 40),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(
        [np.int64(3), np.uint8(200), np.float32(0.5), np.float64("nan"), np.bool_(True)]
    ),
)
CHECKS = {
    "whole": lambda v: checks.whole("x", v, -3, 30),
    "above": lambda v: checks.whole("x", v),
    "multiple": lambda v: checks.multiple("x", v, 3, -6),
    "odd": lambda v: checks.odd("x", v, -5),
    "number": lambda v: checks.number("x", v),
    "rate": lambda v: checks.number("x", v, 0, below=1),
    "flag": lambda v: checks.flag("x", v),
    "text": lambda v: checks.text("x", v),
    "choice": lambda v: checks.choice("x", v, ("a", "bc")),
    "optional": lambda v: checks.optional(checks.whole)("x", v),
    "several": lambda v: checks.several("x", [v, "another"]),
    "each": lambda v: checks.each(checks.number)("x", [v, 0.5]),
    "wholes": lambda v: checks.wholes("x", [v, 2], 2),
}


@pytest.mark.parametrize("name", CHECKS)
@given(value=anything)
def test_what_a_check_returns_passes_again_and_what_it_says_is_one_line(name, value):
    check = CHECKS[name]
    try:
        found = check(value)
    except ZooError as error:
        text = str(error)
        assert "\n" not in text
        assert text.startswith(("x", "unknown x "))
        assert " must be " in text or name == "choice"
        return
    inner = found[0] if isinstance(found, list | tuple) else found
    assert type(inner).__module__ == "builtins" or name == "several"
    again = check(inner)
    assert repr(again) == repr(found)


@given(value=st.one_of(st.integers(-99, 99), st.floats(-99, 99)), step=st.integers(1, 9))
def test_the_nearest_values_are_allowed_and_none_is_nearer(value, step):
    low = -3 * step
    try:
        checks.multiple("x", value, step, low)
    except ZooError as error:
        near = [int(n) for n in str(error).partition("(nearest: ")[2].rstrip(")").split(", ")]
    else:
        return
    assert [checks.multiple("x", n, step, low) for n in near] == near
    allowed = range(low, 200, step)
    assert min(abs(n - value) for n in near) == min(abs(n - value) for n in allowed)


def test_checks_can_be_compiled():
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def scaled(x, size, rate):
        size = checks.whole("size", size) + checks.multiple("even", 2 * size, 2)
        rate = checks.optional(checks.number)("rate", rate, 0, below=1)
        checks.flag("flag", True)
        checks.choice("mode", "a", ("a", "b"))
        return x * size * rate

    for size, rate in ((2, 0.5), (3, 0.25), (5, 0.125)):
        assert scaled(torch.ones(()), size, rate).item() == 3 * size * rate


def numeric_options():
    """Every option of every mechanism whose type names numbers."""
    for name in zoo.list():
        hints = typing.get_type_hints(zoo.info(name).cls.__init__)
        for option in zoo.info(name).options:
            if {int, float} & {hints[option], *typing.get_args(hints[option])}:
                yield name, option


NUMERIC = list(numeric_options())


def build(name, **options):
    """The class itself: a specification would write options down and read them as words."""
    entry = zoo.info(name)
    sizes = {"channels": 16, "dim": 16, "dim_in": 16, "slots": 3, "heads": 2, "max_len": 16}
    layout = Layout(2, 2, 2, 2, 8, 8)
    given = {**sizes, "layout": layout, "causal": not entry.traits.bidirectional, **options}
    wanted = inspect.signature(entry.cls).parameters
    return entry.cls(**{key: value for key, value in given.items() if key in wanted})


def test_the_numeric_options_are_found():
    found = {("rope", "base"), ("sinusoidal", "base"), ("fope", "sigma"), ("slot", "eps")}
    assert found < set(NUMERIC)
    assert len({name for name, _ in NUMERIC}) > 20


@pytest.mark.parametrize(("name", "option"), NUMERIC)
@pytest.mark.parametrize("value", [True, math.nan, math.inf, -math.inf])
def test_no_option_takes_what_is_no_number(name, option, value):
    with pytest.raises(ZooError, match=rf"{option}\b.*{value}"):
        build(name, **{option: value})


@pytest.mark.parametrize(("name", "option"), NUMERIC)
def test_every_option_takes_a_number_of_numpy_in_place_of_its_default(name, option):
    plain = zoo.info(name).options[option].default
    if type(plain) in (int, float):
        build(name, **{option: np.asarray(plain)[()]})
    else:
        assert plain is None or isinstance(plain, str | tuple), (name, option)


def test_sizes_of_a_host_may_be_numbers_of_numpy():
    host = zoo.Attention(np.int64(16), np.int32(2), dropout=np.float32(0.5), scale=np.float32(0.25))
    assert [type(x) for x in (host.dim, host.heads, host.head_dim)] == [int] * 3
    assert [type(x) for x in (host.dropout, host.scale)] == [float] * 2
