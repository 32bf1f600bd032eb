from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from zoo.errors import ZooError
from zoo.statistics import spread as stats
from zoo.statistics.spread import Failure, Spread, baseline, is_softmax, paired, spread, summarise

LOSS = {"select": "val/loss", "report": "test/loss", "mode": "min", "solved": 0.1}


def loss(make, report, select=None, **changes):
    metrics = {"val/loss": report if select is None else select, "test/loss": report}
    return make(metric=LOSS, metrics=metrics, **changes)


def only(records):
    (row,) = summarise(records)
    return row


def test_spread_divides_by_one_less_than_the_number():
    assert spread([1.0, 2.0, 4.0]) == Spread(7 / 3, math.sqrt(7 / 3), 3)


def test_one_figure_has_no_deviation_and_none_has_no_spread():
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([]) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.randoms())
@settings(deadline=None)
def test_spread_does_not_depend_on_the_order(values, shuffler):
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    assert spread(shuffled) == spread(values)


def test_paired_interval_is_students_over_the_shared_seeds():
    ours = {0: 0.91, 1: 0.95, 2: 0.90, 3: 0.97, 9: 0.1}
    theirs = {3: 0.90, 2: 0.85, 1: 0.93, 0: 0.88, 8: 0.9}
    shared = [0, 1, 2, 3]
    test = reference.ttest_rel([ours[s] for s in shared], [theirs[s] for s in shared])
    expected = test.confidence_interval(0.95)
    found = paired(ours, theirs)
    assert found.n == 4
    assert found.mean == pytest.approx((0.03 + 0.02 + 0.05 + 0.07) / 4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.excludes_zero is True
    wider = paired(ours, theirs, level=0.999)
    assert wider.low < 0 < wider.high
    assert wider.excludes_zero is False


def test_paired_difference_has_a_sign():
    worse = paired({0: 0.1, 1: 0.11, 2: 0.1}, {0: 0.9, 1: 0.9, 2: 0.91})
    assert worse.high < 0
    assert worse.excludes_zero is True


def test_equal_figures_do_not_exclude_zero():
    found = paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.excludes_zero is False


def test_one_shared_seed_has_no_interval_and_none_no_difference():
    found = paired({0: 0.5, 1: 0.6}, {1: 0.25})
    assert found == (0.35, None, None, 1)
    assert found.excludes_zero is None
    assert paired({0: 0.5}, {1: 0.5}) is None


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_that_is_no_coverage_is_refused(level):
    with pytest.raises(ZooError, match="level"):
        paired({0: 1.0}, {0: 1.0}, level=level)


def test_the_rate_is_chosen_on_validation_and_reported_on_test(make):
    row = only(
        [make(seed=s, lr=1e-3, select=0.9, report=0.5 + s / 10) for s in range(3)]
        + [make(seed=s, lr=3e-3, select=0.8, report=0.99) for s in range(3)]
    )
    assert row.lr == 1e-3
    assert row.lrs == (1e-3, 3e-3)
    assert row.values == {0: 0.5, 1: 0.6, 2: 0.7}
    assert row.spread.mean == pytest.approx(0.6)
    assert row.spread.std == pytest.approx(0.1)
    assert len(row.records) == 3
    assert len(row.runs) == 6


def test_the_rate_with_the_most_seeds_comes_before_the_best(make):
    few = [make(seed=s, lr=3e-3, report=0.9) for s in range(2)]
    many = [make(seed=s, lr=1e-3, report=0.4) for s in range(3)]
    assert only(few + many).lr == 1e-3
    # A seed that failed is not usable, so that it cannot win the count.
    broken = [make(seed=s, lr=3e-3, status="nan") for s in range(2, 5)]
    assert only(few + many + broken).lr == 1e-3


def test_the_smaller_rate_wins_a_tie(make):
    assert only([make(lr=lr, report=0.5) for lr in (3e-3, 1e-3, 1e-2)]).lr == 1e-3


def test_the_lower_loss_is_the_better_one(make):
    row = only([loss(make, 0.3, lr=1e-3), loss(make, 0.2, lr=3e-3)])
    assert row.lr == 3e-3
    assert row.solved == 0
    assert only([loss(make, 0.1), loss(make, 0.11, seed=1)]).solved == 1


def test_failures_are_counted_and_never_dropped(make):
    row = only(
        [
            make(seed=0, report=0.995),
            make(seed=1, report=0.5),
            make(seed=2, status="nan"),
            make(seed=0, lr=3e-3, status="failed"),
        ]
    )
    assert row.values == {0: 0.995, 1: 0.5}
    assert row.attempts == 3
    assert row.solved == 1
    assert row.failures == (Failure(1e-3, 2, "nan"), Failure(3e-3, 0, "failed"))
    assert len(row.runs) == 4


@pytest.mark.parametrize("odd", [{"report": math.nan}, {"select": math.inf, "report": 0.5}])
def test_a_finished_run_with_an_infinite_figure_has_diverged(make, odd):
    row = only([make(seed=0, report=0.5), make(seed=1, **odd)])
    assert row.values == {0: 0.5}
    assert row.failures == (Failure(1e-3, 1, "nan"),)


def test_a_mechanism_that_always_fails_keeps_its_row(make):
    row = only([make(seed=s, status="failed") for s in range(3)] + [make(lr=1.0, status="nan")])
    assert row.lr is None
    assert row.spread is None
    assert row.attempts == 3
    assert row.solved == 0
    assert len(row.failures) == 4
    assert row.median("flops") is None


def test_without_a_threshold_nothing_is_solved(make):
    metric = {"select": "val/accuracy", "report": "test/accuracy", "mode": "max", "solved": None}
    assert only([make(metric=metric)]).solved is None


def test_a_run_done_again_replaces_the_older_one(make):
    old = make(id="a", report=0.1, created="2026-01-01T00:00:00Z")
    new = make(id="b", report=0.9, created="2026-01-02T00:00:00Z")
    for records in ([old, new], [new, old], [new, old, new, old]):
        row = only(records)
        assert row.values == {0: 0.9}
        assert row.repeats == 1
    assert only([old, old]).repeats == 0


def test_further_test_metrics_have_a_spread_of_their_own(make):
    def metrics(sparse):
        return {"val/accuracy": 0.5, "test/accuracy": 0.5, "test_sparse/accuracy": sparse}

    row = only([make(seed=s, metrics=metrics(v)) for s, v in enumerate([0.25, 0.75, math.nan])])
    assert row.extra == {"test_sparse/accuracy": Spread(0.5, math.sqrt(0.125), 2)}


def test_the_median_leaves_out_what_is_unknown(make):
    row = only([make(seed=s, step_time_cpu=t) for s, t in enumerate([0.3, None, 0.1, 0.2])])
    assert row.median("step_time_cpu") == 0.2


def test_what_cannot_be_compared_stands_in_different_tables(make):
    base = make()
    others = [
        replace(base, id="t", track="other"),
        replace(base, id="r", recipe="other"),
        replace(base, id="g", group="other"),
        replace(base, id="m", metric={**base.metric, "solved": None}),
        replace(base, id="n", metric={**base.metric, "mode": "min"}),
    ]
    rows = summarise([base, *others])
    assert len(rows) == len(stats.tables(rows)) == 6


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["mha", "linear", "cog+rope"]),
            st.integers(0, 3),
            st.sampled_from([1e-3, 3e-3]),
            st.sampled_from(["finished", "nan", "failed"]),
            st.floats(0, 1),
        ),
        max_size=24,
    )
)
@settings(max_examples=40, deadline=None)
def test_every_record_is_accounted_for_in_any_order(make, runs):
    records = [
        make(attention=a, seed=s, lr=lr, status=status, report=figure, id=f"r{i}")
        for i, (a, s, lr, status, figure) in enumerate(runs)
    ]
    rows = summarise(records)
    assert sum(len(row.runs) + row.repeats for row in rows) == len(records)
    for row in rows:
        assert sum(r.status != "finished" for r in row.runs) == len(row.failures)
        assert len(row.values) <= row.attempts
    random.Random(0).shuffle(records)
    assert summarise(records) == rows


@pytest.mark.parametrize("spec", ["mha", "softmax", "dot+softmax", "mha+none+all+concat"])
def test_default_parts_are_softmax_attention(spec):
    assert is_softmax(spec)


@pytest.mark.parametrize("spec", ["mha+rope", "linear", "mha(bias=False)", "cog(a='x+mha')"])
def test_any_other_part_is_not(spec):
    assert not is_softmax(spec)


def test_mha_is_preferred_as_baseline(make):
    rows = summarise([make(attention=a) for a in ("dot", "softmax", "mha", "linear")])
    assert baseline(rows).attention == "mha"
    assert baseline([row for row in rows if row.attention != "mha"]).attention == "dot"
    assert baseline([row for row in rows if row.attention == "linear"]) is None
