from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zoo.report.markdown import NONE, code, figures, milliseconds, quantity, size, table, words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (18234, "18.2k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (1_234_567, "1.23M"),
        (2.5e9, "2.5G"),
        (3e18, "3000P"),
        (None, NONE),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1023, "1023 B"),
        (1024**2 - 1, "1 MiB"),
        (1024, "1 KiB"),
        (16384, "16 KiB"),
        (300 * 2**20, "300 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (None, NONE),
    ],
)
def test_size(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "12.3"), (1.5, "1500"), (0.00004567, "0.0457"), (None, NONE)]
)
def test_milliseconds(value, text):
    assert milliseconds(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.98765, 0.00012), ["0.9877", "0.0001"]),
        ((0.0, 0.0), ["0.0000", "0.0000"]),
        ((0.0004,), ["4.000e-04"]),
        ((12345.0, 1.0), ["1.234e+04", "1.000e+00"]),
        ((-0.5, -0.00001), ["-0.5000", "0.0000"]),
    ],
)
def test_figures_that_stand_together_share_a_style(values, texts):
    assert figures(*values) == texts


def test_signed_figures_show_their_sign():
    assert figures(0.25, -0.5, -0.00001, sign=True) == ["+0.2500", "-0.5000", "+0.0000"]


@given(st.floats(0, 1e20))
@example(999_500.0)
def test_a_quantity_reads_back_to_three_digits(value):
    text = quantity(value)
    power = "kMGTP".find(text[-1]) + 1
    number = float(text[:-1] if power else text)
    assert number * 1000**power == pytest.approx(value, rel=5.1e-3, abs=1e-300)
    assert number < 1000 or power == 5


def test_code_cannot_break_a_table():
    assert code("a|b`c\nd") == "`a\\|b'c d`"


def test_table_aligns_its_columns():
    assert table(["a", "b", "c"], [["1", "2", "3"]], left=2) == (
        "| a | b | c |\n| :-- | :-- | --: |\n| 1 | 2 | 3 |\n"
    )


def test_a_sentence_stays_in_its_cell():
    text = words("a < b & c > d\n  | `x` *y* _z_ [link](u) \\ end")
    assert text == r"a &lt; b &amp; c > d \| \`x\` \*y\* \_z\_ \[link\](u) \\ end"
    assert words("Table 2; section 5.1 (p. 3) - 10 %") == "Table 2; section 5.1 (p. 3) - 10 %"
