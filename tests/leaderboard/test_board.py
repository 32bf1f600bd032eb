from __future__ import annotations

from dataclasses import replace

import pytest

from zoo.errors import ZooError
from zoo.leaderboard import board as module
from zoo.leaderboard import tracks
from zoo.leaderboard.board import assemble
from zoo.leaderboard.current import Current, current
from zoo.leaderboard.tracks import Contender
from zoo.runs import config


def seeds(make, attention, figures, **changes):
    return [make(attention=attention, seed=s, report=f, **changes) for s, f in enumerate(figures)]


@pytest.fixture
def two(make):
    return [*seeds(make, "mha", [0.5, 0.6, 0.7]), *seeds(make, "cog", [0.6, 0.7, 0.8])]


def only(records, now=None):
    """The only table of a board, its rows by attention."""
    (track,) = assemble(records, (), now).tracks
    (table,) = track.tables
    return table, {one.row.attention: one for one in table.standings}


def test_a_row_that_tried_other_rates_than_the_recipe_has_no_place(two):
    now = {"mqar": Current("g0", (1e-3, 3e-3))}
    table, rows = only(two, now)
    assert table.rates == (1e-3, 3e-3)
    assert [one.rank for one in rows.values()] == [None, None]
    assert rows["cog"].faults == ("learning rates not tried: 0.003",)
    assert table.ranked == []


def test_a_failed_attempt_counts_as_tried(two, make):
    now = {"mqar": Current("g0", (1e-3, 3e-3))}
    more = [make(attention=a, lr=3e-3, status="nan") for a in ("mha", "cog")]
    _, rows = only([*two, *more], now)
    assert {name: one.rank for name, one in rows.items()} == {"cog": 1, "mha": 2}


def test_rates_beyond_the_others_cost_the_place(two, make):
    _, rows = only([*two, make(attention="cog", lr=3e-3, select=0.1)])
    assert rows["cog"].faults == ("learning rates beyond the others': 0.003",)
    assert rows["mha"].rank == 1


def test_too_few_seeds_and_too_many_parameters_cost_the_place(make):
    records = [
        *seeds(make, "mha", [0.5] * 3),
        *seeds(make, "cog", [0.9] * 2),
        *seeds(make, "linear", [0.9] * 3, parameters=int(18234 * 1.3)),
        *seeds(make, "moba", [0.4] * 3, parameters=int(18234 * 1.2)),
    ]
    _, rows = only(records)
    assert rows["cog"].faults == ("seeds: 2 of 3",)
    assert rows["linear"].faults == ("parameters: 1.30 times the baseline's",)
    assert [rows[name].rank for name in ("mha", "moba", "cog", "linear")] == [1, 2, None, None]


def test_outcomes_follow_the_interval_and_the_direction(make):
    base = seeds(make, "mha", [0.5, 0.6, 0.7])
    same = seeds(make, "cog", [0.6, 0.7, 0.81])
    flat = seeds(make, "moba", [0.75, 0.85, 0.95])
    base_of_flat = seeds(make, "mha", [0.5, 0.6, 0.7])
    assert only([*base_of_flat, *flat])[1]["moba"].outcome == "tie"  # always 0.25: no width
    wide = seeds(make, "linear", [0.5, 0.9, 0.7])
    _, rows = only([*base, *same, *wide])
    found = {name: one.outcome for name, one in rows.items()}
    assert found == {"cog": "win", "linear": "tie", "mha": None}
    metric = {"select": "val/accuracy", "report": "test/accuracy", "mode": "min", "solved": None}
    lower = [replace(record, metric=metric) for record in (*base, *same)]
    assert only(lower)[1]["cog"].outcome == "loss"


def test_a_track_counts_places_over_tables_and_seeds(make, two):
    other = seeds(make, "mha", [0.9, 0.9, 0.9], recipe="copy", group="h")
    other += seeds(make, "cog", [0.9, 0.8, 0.8], recipe="copy", group="h")
    (track,) = assemble([*two, *other]).tracks
    ranks = track.ranks()
    assert ranks["cog"].mean == pytest.approx((1 + 1 + 1 + 1.5 + 2 + 2) / 6)
    assert ranks["mha"].n == 6
    assert track.outcomes()["cog"] == {"win": 1, "tie": 1, "loss": 0}


def test_a_table_of_a_changed_recipe_is_stale_and_counts_for_nothing(two):
    now = {"mqar": Current("g9", (1e-3,), (), {"model.dim": "128", "model.depth": "2"})}
    (track,) = assemble(two, (), now).tracks
    assert track.tables[0].stale
    assert track.tables[0].settings == {"model.dim": "64 (now 128)"}
    assert track.ranks() == track.outcomes() == {}


def test_who_is_absent_and_who_is_missing(two):
    contenders = (Contender("mha", "mha"), Contender("gru", "gru", "why not"), Contender("x", "x"))
    table, _ = only(two, {"mqar": Current("g0", (1e-3,), contenders)})
    assert [one.name for one in table.absent] == ["gru"]
    assert table.missing == ("x",)


def test_runs_of_different_length_are_refused_by_name(two):
    longer = replace(two[1], steps=2400, id="longer")
    with pytest.raises(ZooError, match=r"different budgets.*1200 steps.*longer has 2400"):
        assemble([two[0], longer])
    free = {"trainer": {"stop_at": 0.9}}
    assemble([two[0], replace(longer, config=free)])


def test_a_group_that_is_not_that_of_the_settings_is_refused(make):
    loaded = config.load("mqar")
    plain, group = config.settings(loaded), config.identify(loaded).group
    assert config.group_of(plain) == group
    assemble([make(config=plain, group=group)])
    wide = {**plain, "model": {**plain["model"], "dim": 64}}
    with pytest.raises(ZooError, match=r"different budgets.*says that its group"):
        assemble([make(config=wide, group=group)])


def test_the_group_does_not_depend_on_place_seed_rate_or_words():
    plain = config.settings(config.load("mqar"))
    group = config.group_of(plain)
    other = config.settings(
        config.load("mqar", ["seed=3", "lr=1e-3", "attention=cog", "data.num_workers=2"])
    )
    assert config.group_of({**other, "description": "x", "budget": {}}) == group
    assert config.group_of(config.settings(config.load("mqar", ["steps=3"]))) != group
    assert config.group_of({"model": {}}) is None


def test_recipes_as_they_are_now(make):
    now = current([make(), make(recipe="of my own")])
    assert list(now) == ["mqar"]
    assert now["mqar"].group == config.identify(config.load("mqar", ["seed=7"])).group
    assert now["mqar"].rates == tuple(config.load("mqar").budget.lrs)
    assert now["mqar"].settings["model.dim"] == "32"


def test_what_has_run_is_not_asked_whether_it_can(make, monkeypatch):
    asked = []
    monkeypatch.setattr(tracks, "_refusal", lambda spec, config, data: asked.append(spec))
    current([make(attention="linear"), make(attention="cog", status="failed")])
    assert "linear" not in asked
    assert {"mha", "cog"} <= set(asked)
    assert module.SEEDS == 3
