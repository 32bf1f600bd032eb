from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.claims.expressions import LONGEST, Comparison
from zoo.errors import ZooError

VALUES = {("a", "x"): 2.0, ("a", "y"): -3.0, ("b", "x"): 0.5, ("b", "zero"): 0.0}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a.x > b.x", True),
        ("a.x < b.x", False),
        ("a.x >= 2", True),
        ("a.x <= 1.999", False),
        ("a.x == 2", True),
        ("a.x != 2", False),
        ("b.x < 0.5 * a.x", True),
        ("b.x < 0.25 * a.x", False),
        ("a.x - a.y * 2 == 8", True),  # 2 + 6: the product binds more strongly
        ("(a.x - a.y) * 2 == 10", True),
        ("-a.y / a.x == +1.5", True),
        ("min(a.x, a.y, 7) == -3", True),
        ("max(a.x, a.y) == 2", True),
        ("abs(a.y + 1) == 2", True),
        ("0 < b.x < a.x < 3", True),
        ("0 < b.x < a.x < 2", False),
        ("a.x / b.zero > 1", None),
        ("1e-3 < b.x", True),
    ],
)
def test_what_holds(text, holds):
    assert Comparison(text).holds(VALUES) is holds


def test_the_figures_that_are_named():
    found = Comparison("a.x < 2 * min(b.x, abs(c.y)) - 1").figures
    assert found == {("a", "x"), ("b", "x"), ("c", "y")}
    assert Comparison("1 < 2").figures == set()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.x", "compares nothing"),
        ("a.x + 1", "compares nothing"),
        ("", "cannot be read"),
        ("a.x <", "cannot be read"),
        ("a.x < 1; b.x > 2", "cannot be read"),
        ("a.x = 1", "cannot be read"),
        ("a < 1", "'a' alone is no figure; write variant.figure"),
        ("nan < 1", "'nan' alone is no figure"),
        ("a.x.real < 1", "'a.x.real' is not allowed"),
        ("a.__class__.__mro__ < 1", "is not allowed"),
        ("(1).real < 1", "is not allowed"),
        ("a.x ** 9 < 1", "'a.x ** 9' is not allowed"),
        ("9 ** 9 ** 9 ** 9 > a.x", "is not allowed"),
        ("a.x // 2 < 1", "is not allowed"),
        ("a.x % 2 < 1", "is not allowed"),
        ("a.x << 100 < 1", "is not allowed"),
        ("a.x[0] < 1", "is not allowed"),
        ("[a.x] < 1", "is not allowed"),
        ("(a.x < 1) < 1", "is not allowed"),
        ("a.x < 1 and b.x < 1", "compares nothing"),
        ("not a.x < 1", "compares nothing"),
        ("(a.x if a.y else b.x) < 1", "is not allowed"),
        ("(lambda: 1)() < 1", "a call of 'lambda: 1' is not allowed"),
        ("a.x() < 1", "a call of 'a.x' is not allowed"),
        ("__import__('os') < 1", "unknown function in criterion"),
        ("maxx(a.x, 1) < 1", "did you mean 'max'"),
        ("min(a.x) < 1", "min takes two values or more, not 1"),
        ("abs(a.x, 1) < 1", "abs takes one value, not 2"),
        ("min(*a.x) < 1", "'min(*a.x)' is not allowed"),
        ("min(1, *a.x) < 1", "is not allowed"),
        ("max(1, 2, key=a.x) < 1", "is not allowed"),
        ("a.x in b.x", "a comparison by 'in' is not allowed"),
        ("a.x is b.x", "a comparison by 'is' is not allowed"),
        ("a.x < True", "the value 'True' is not allowed"),
        ("a.x < 'text'", "the value 'text' is not allowed"),
        ("a.x < 1j", "is not allowed"),
        ("a.x < 1e999", "the value 'inf' is not allowed"),
        ("a.x < 0x" + "f" * 280, "is not allowed"),  # beyond the range of a float
        ("~a.x < 1", "is not allowed"),
        ("(y := 3) < 1", "is not allowed"),
        ("a.x < " + "9" * LONGEST, f"is longer than {LONGEST} characters"),
        ("a.x < " + "(" * 250, "cannot be read"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(ZooError) as caught:
        Comparison(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deep_expression_is_computed():
    assert Comparison("-" * (LONGEST - 10) + "a.x > 0").holds(VALUES) is True


@given(st.text(alphabet="ab.xy<>=+-*/() 12,minabs", max_size=40))
def test_any_text_is_read_or_refused_by_name(text):
    refusal = None
    try:
        Comparison(text)
    except ZooError as error:
        refusal = str(error)
    assert refusal is None or "criterion" in refusal
