from __future__ import annotations

import pytest

from zoo.errors import ZooError
from zoo.leaderboard import comparison
from zoo.leaderboard.comparison import compare, outcomes, read, signs
from zoo.leaderboard.current import group_now
from zoo.runs import config
from zoo.runs.records import write

LOSS = {"select": "val/loss", "report": "test/loss", "mode": "min", "solved": None}


def seeds(make, attention, figures, **changes):
    return [make(attention=attention, seed=s, report=f, **changes) for s, f in enumerate(figures)]


def losses(make, attention, figures, **changes):
    return [
        make(
            attention=attention,
            seed=s,
            metric=LOSS,
            metrics={"val/loss": f, "test/loss": f},
            recipe="bytes",
            track="language",
            **changes,
        )
        for s, f in enumerate(figures)
    ]


@pytest.fixture
def records(make):
    return [
        *seeds(make, "linear", [0.80, 0.81, 0.82], parameters=20, step_time_cpu=0.03),
        *seeds(make, "mha", [0.99, 0.995, 1.0], parameters=10, step_time_cpu=0.01),
        *losses(make, "linear", [1.0, 1.1, 1.2]),
        *losses(make, "mha", [2.0, 2.1, 2.2]),
        *seeds(make, "cog", [0.5], group="g1"),
        *seeds(make, "mha", [0.5, 0.6], group="g2"),
    ]


def test_two_attentions_meet_in_every_table_that_both_stand_in(records):
    found = compare(records, "linear", "mha")
    assert [p.table.recipe for p in found.pairings] == ["bytes", "mqar"]
    assert [p.outcome for p in found.pairings] == ["win", "loss"]
    assert [p.sign for p in found.pairings] == ["better", "worse"]
    assert [(key.group, spec) for key, spec in found.alone] == [("g2", "mha")]
    recall = found.pairings[1]
    assert recall.difference.mean == pytest.approx(-0.185)
    assert recall.difference.n == 3
    assert recall.difference.excludes_zero
    assert recall.first.solved == 0
    assert recall.second.solved == 3
    assert recall.ratio("parameters") == 2
    assert recall.ratio("step_time_cpu") == pytest.approx(3)


def test_turned_round_wins_are_losses(records):
    one, other = compare(records, "linear", "mha"), compare(records, "mha", "linear")
    assert outcomes(one.counted) == {"win": 1, "tie": 0, "loss": 1, "undecided": 0}
    assert [p.outcome for p in other.pairings] == ["loss", "win"]
    assert [p.sign for p in other.pairings] == ["worse", "better"]
    assert list(one.groups) == ["language", "recall"]


@pytest.mark.parametrize(
    ("figures", "outcome", "sign"),
    [
        ([0.90, 0.99, 0.97], "tie", "better"),  # on the mean, but not on every seed
        ([0.85, 0.95, 0.96], "tie", "equal"),
        ([0.90], "undecided", "worse"),
        ([], "undecided", "unknown"),
    ],
)
def test_what_is_not_decided_is_no_win(make, figures, outcome, sign):
    records = [
        *seeds(make, "mha", [0.85, 0.95, 0.96]),
        *(seeds(make, "cog", figures) or [make(attention="cog", status="failed")]),
    ]
    (pairing,) = compare(records, "cog", "mha").pairings
    assert (pairing.outcome, pairing.sign) == (outcome, sign)


def test_seeds_that_are_not_shared_are_not_compared(make):
    records = [make(attention="mha", seed=0), make(attention="cog", seed=1)]
    (pairing,) = compare(records, "cog", "mha").pairings
    assert pairing.difference is None
    assert pairing.outcome == "undecided"
    assert pairing.sign == "equal"


def test_specifications_are_spelt_in_any_way(records):
    found = compare(records, "mha+none", "linear")
    assert (found.first, found.second) == ("mha", "linear")
    with pytest.raises(ZooError, match=r"'mha\+none' and 'mha' are both 'mha'; give two"):
        compare(records, "mha+none", "mha")
    with pytest.raises(ZooError, match=r"unknown mechanism 'mhaa'; did you mean 'mha'"):
        compare(records, "mhaa", "linear")


def test_a_specification_without_records_has_the_nearest_named(make):
    specs = ("mha", "moba(block=8)", "moba(block=8)+rope", "mha+rope", "gone_since(k=1)")
    records = [make(attention=spec) for spec in specs]
    near = r"no record of 'moba\+rope'; nearest with records: 'moba\(block=8\)\+rope', 'mha\+rope',"
    with pytest.raises(ZooError, match=near):
        compare(records, "moba+rope", "mha")
    with pytest.raises(ZooError, match=r"no record of 'mha\+cope'; there are records of 'linear'$"):
        compare([make(attention="linear")], "linear", "cope")


def test_devices_that_differ_show(make):
    other = {"type": "cuda", "name": "Some card", "threads": 1}
    records = [make(attention="mha"), make(attention="cog", device=other)]
    (pairing,) = compare(records, "cog", "mha").pairings
    assert pairing.devices == ["Some CPU (cpu, threads 1)", "Some card (cuda, threads 1)"]


def test_a_cost_that_is_not_known_has_no_ratio(make):
    records = [make(attention="mha", flops=None), make(attention="cog", state_bytes=0)]
    (pairing,) = compare(records, "mha", "cog").pairings
    assert pairing.ratio("flops") is None
    assert pairing.ratio("state_bytes") is None


def test_a_stale_table_is_shown_and_counts_for_nothing(records):
    found = compare(records, "linear", "mha", {"mqar": "another", "bytes": "g0"})
    assert [p.stale for p in found.pairings] == [False, True]
    assert signs(found.counted) == {"better": 1, "equal": 0, "worse": 0, "unknown": 0}
    assert list(found.groups) == ["language"]


def test_runs_of_claims_are_counted_apart(make):
    names = [*seeds(make, "mha", [1.0, 0.9]), *seeds(make, "cog", [0.9, 0.8])]
    claimed = [
        make(attention=a, seed=s, recipe="cope_counting", report=f)
        for a, f in (("mha", 0.9), ("cog", 0.8))
        for s in (0, 1)
    ]
    found = compare([*names, *claimed], "cog", "mha")
    assert list(found.groups) == ["recall", "claims"]
    assert [len(pairings) for pairings in found.groups.values()] == [1, 1]


def test_the_groups_of_recipes_now(make):
    now = config.identify(config.load("mqar")).group
    records = [make(), make(recipe="nobody_has_it"), make(recipe="cope_counting")]
    assert comparison.groups_now(records) == {"mqar": now}
    assert group_now("nobody_has_it") is None


def test_records_are_read_from_every_folder(make, tmp_path):
    write(make(seed=0), tmp_path)
    write(make(seed=1), tmp_path / "claims" / "one")
    (tmp_path / "broken.json").write_text("{")
    assert [record.seed for record in read(tmp_path)] == [0, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match="holds no record"):
        read(tmp_path / "empty")
    with pytest.raises(ZooError, match="does not exist"):
        read(tmp_path / "nowhere")
