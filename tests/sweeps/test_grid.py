from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.sweeps.grid import cells, parse_grid


def test_commas_separate_only_outside_brackets():
    grid = parse_grid(
        [
            "attention=mha,linear,sliding_window(window=16,x=2)+rope",
            "optim.betas=[0.9,0.95],[0.9,0.99]",
            "lr=1e-3,3e-3",
            "note='a,b'",
        ]
    )
    assert grid == {
        "attention": ("mha", "linear", "sliding_window(window=16,x=2)+rope"),
        "optim.betas": ("[0.9,0.95]", "[0.9,0.99]"),
        "lr": ("1e-3", "3e-3"),
        "note": ("'a,b'",),
    }


def test_seeds_counts_and_seed_names():
    assert parse_grid(["seeds=3"]) == {"seed": ("0", "1", "2")}
    assert parse_grid(["seed=4,7"]) == {"seed": ("4", "7")}


def test_cells_are_the_product_with_the_last_axis_fastest():
    grid = parse_grid(["attention=mha,linear", "seeds=2", "model.dim=64"])
    assert cells(grid) == [
        ["attention=mha", "seed=0", "model.dim=64"],
        ["attention=mha", "seed=1", "model.dim=64"],
        ["attention=linear", "seed=0", "model.dim=64"],
        ["attention=linear", "seed=1", "model.dim=64"],
    ]


def test_a_value_may_hold_an_equals_sign():
    assert parse_grid(["attention=moba(block=16)"]) == {"attention": ("moba(block=16)",)}


def test_an_empty_grid_is_one_run_as_the_recipe_says():
    assert cells(parse_grid([])) == [[]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["attention"], "'attention'.*write key=value"),
        (["=3"], "write key=value"),
        (["lr="], "empty value"),
        (["lr=1e-3,"], "empty value"),
        (["lr=1e-3,,3e-3"], "empty value"),
        (["lr=1e-3", "lr=3e-3"], "'lr' is given twice"),
        (["seeds=2", "seed=5"], "'seed' is given twice"),
        (["seed=1,2,1"], "'1' twice"),
        (["seeds=0"], "seeds=0 must be a whole number of at least 1"),
        (["seeds=-1"], "at least 1"),
        (["seeds=many"], "at least 1"),
        (["seeds=1,2"], "write seed=4,7"),
        (["attention=moba(block=16"], "do not match"),
        (["attention=mha),linear"], "do not match"),
    ],
)
def test_a_malformed_axis_is_refused(items, message):
    with pytest.raises(ZooError, match=message):
        parse_grid(items)


values = st.text("abc123._-", min_size=1, max_size=5)


@given(
    st.dictionaries(
        values.filter(lambda key: key not in ("seed", "seeds")),
        st.lists(st.one_of(values, values.map(lambda v: f"f({v},{v})")), min_size=1, unique=True),
        max_size=4,
    )
)
def test_what_is_written_is_read_back(axes):
    items = [f"{key}={','.join(texts)}" for key, texts in axes.items()]
    assert parse_grid(items) == {key: tuple(texts) for key, texts in axes.items()}
