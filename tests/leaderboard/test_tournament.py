"""The sweep over the leaderboard, with runs that leave a record at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.errors import ZooError
from zoo.leaderboard.tournament import Match, plan, tournament
from zoo.runs import config
from zoo.runs.records import read_all, write

MATCH = Match("flip_flop", "cog", (0.002, 0.005, 0.01), 3)


class Ended:
    """A run that is over."""

    pid = None

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode


class Late(Ended):
    """A run that goes on until it is told to end."""

    def __init__(self):
        super().__init__(None)

    def terminate(self):
        self.returncode = -15


class Field:
    """Runs that reach at once what their learning rate says."""

    def __init__(self, make, reach):
        self.make, self.reach = make, reach
        self.started = []

    def start(self, arguments, log, environment):
        recipe, *words = arguments[: arguments.index("--records")]
        records = Path(arguments[arguments.index("--records") + 1])
        asked = dict(word.split("=", 1) for word in words)
        cell = float(asked["lr"]), int(asked["seed"])
        self.started.append(cell)
        status = self.reach(*cell)
        if status == "late":
            return Late()
        if status == "killed":
            return Ended(-9)
        changes = {"status": "nan"} if status == "nan" else {"report": status}
        name = config.run_id(recipe, words)
        write(
            self.make(
                id=name,
                recipe=recipe,
                attention=asked["attention"],
                lr=cell[0],
                seed=cell[1],
                **changes,
            ),
            records,
        )
        return Ended(0)

    def close(self):
        pass


@pytest.fixture
def go(make, tmp_path):
    def start(reach, matches=(MATCH,), **options):
        field = Field(make, reach)
        result = tournament(
            matches,
            records=tmp_path / "records",
            runs=tmp_path / "runs",
            spawner=field,
            progress=False,
            **options,
        )
        return result, field.started, tmp_path / "records"

    return start


def test_all_rates_at_one_seed_then_the_best_at_the_others(go):
    result, started, records = go(lambda lr, seed: 0.9 if lr == 0.005 else 0.5)
    assert started == [(0.002, 0), (0.005, 0), (0.01, 0), (0.005, 1), (0.005, 2)]
    assert len(result.finished) == len(read_all(records)) == MATCH.runs == 5
    assert result.exit_code == 0


def test_a_second_time_nothing_is_run(go):
    go(lambda lr, seed: lr)
    result, started, _ = go(lambda lr, seed: lr)
    assert started == []
    assert len(result.skipped) == 5


def test_a_rate_that_diverges_is_not_chosen(go):
    _, started, _ = go(lambda lr, seed: "nan" if lr == 0.01 else lr)
    assert started[3:] == [(0.005, 1), (0.005, 2)]


def test_where_every_rate_diverges_there_is_nothing_to_go_on_with(go):
    result, started, _ = go(lambda lr, seed: "nan")
    assert len(started) == 3
    assert not result.failed


def test_a_killed_run_leaves_a_record_that_says_so_and_stops_nothing(go):
    result, started, records = go(lambda lr, seed: "killed" if lr == 0.01 else lr)
    assert started[3:] == [(0.005, 1), (0.005, 2)]
    (lost,) = [record for record in read_all(records) if record.status == "failed"]
    assert lost.lr == 0.01
    assert "signal 9" in lost.error
    assert result.exit_code == 1
    # It is tried again the next time.
    _, again, _ = go(lambda lr, seed: lr)
    assert again[0] == (0.01, 0)


def test_a_run_out_of_time_is_ended_and_leaves_a_record(go):
    result, _, records = go(lambda lr, seed: "late" if lr == 0.01 else lr, minutes=1e-3)
    (cell,) = result.failed
    assert cell.error == "out of time: it took more than 0.001 minutes"
    (lost,) = [record for record in read_all(records) if record.status == "failed"]
    assert lost.error == cell.error


def test_the_seeds_of_a_match_come_before_the_next_match(go):
    other = Match("flip_flop", "linear", MATCH.rates, 2)
    _, started, _ = go(lambda lr, seed: lr, matches=(MATCH, other))
    assert started[3:5] == [(0.01, 1), (0.01, 2)]
    assert len(started) == 5 + 4


def test_the_plan_is_every_contender_of_every_recipe_at_hand():
    found = plan(["track=recall,state"])
    recipes = {match.recipe for match in found}
    assert {"mqar", "selective_copy", "flip_flop", "counting"} <= recipes
    assert "digits" not in recipes
    assert "moba(block=8, topk=2)" in {match.spec for match in found}
    assert all(match.rates for match in found)


def test_the_plan_can_be_restricted():
    (match,) = plan(["recipe=flip_flop", "attention=cog", "seeds=5"])
    assert match == Match("flip_flop", "cog", (0.002, 0.005, 0.01), 5)
    assert match.runs == 7
    (named,) = plan(["recipe=flip_flop", "attention=moba"])
    assert named.spec == "moba(block=8, topk=2)"
    assert {m.spec for m in plan(["recipe=digits", "attention=gru,rope"])} == {"mha+rope"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["track=recal"], r"unknown track 'recal'.*recall"),
        (["recipe=mqr"], r"unknown recipe.*'mqr'.*mqar"),
        (["attention=moab"], r"'moab'.*moba"),
        (["lr=1e-3"], r"'lr'.*allowed.*track"),
        (["seeds=0"], "seeds=0"),
        (["seeds=3,5"], "seeds='3,5' must be a whole number of at least 1"),
        (["seeds"], "write key=value"),
        (["track=recall", "track=state"], "given twice"),
        (["recipe=digits", "attention=gru"], "nothing to run.*digits has no 'gru': it sees earl"),
        (["recipe=needle", "attention=learned"], "needle has no 'learned': .* longest test set"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(ZooError, match=message):
        plan(words)


def test_bad_numbers_are_refused(go):
    with pytest.raises(ZooError, match="jobs=0 must be a whole number"):
        go(lambda lr, seed: lr, jobs=0)
    with pytest.raises(ZooError, match="minutes=0 must be a number above 0"):
        go(lambda lr, seed: lr, minutes=0)
