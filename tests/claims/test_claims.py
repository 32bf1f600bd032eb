"""Claims carried out: which runs there are, what is run again, and when a verdict is refused."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path

import pytest
from claim_examples import write as write_claim
from markdown_tables import tables

from zoo.claims import verdicts
from zoo.claims.trials import carry_out, conclude, find, is_stale, names, published
from zoo.claims.verdicts import Incomplete
from zoo.errors import ZooError
from zoo.leaderboard.page import markdown_page as leaderboard
from zoo.runs.config import identify, load, run_id
from zoo.runs.records import RecordWarning, read, read_all, write
from zoo.runs.train import run

RUNNER = Path(__file__).parents[1] / "support" / "claim_runner.py"


@pytest.fixture
def example(tmp_path):
    return str(write_claim(tmp_path))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "records" / "claims" / "tiny_claim"


def record_of(make, found, overrides, **changes):
    """The record of a run whose figures are planned: ours is the better, at every seed."""
    config = load(found.recipe, overrides)
    identity = identify(config)
    loss = 0.5 if config.attention == "differential" else 1.0 + config.model.heads / 8
    metrics = {"val/accuracy": 0.5, "test/accuracy": 0.5, "test_noise/accuracy": 0.25}
    fields = {
        "id": identity.id,
        "config_hash": identity.config_hash,
        "recipe": config.name,
        "attention": config.attention,
        "seed": config.seed,
        "metrics": {**metrics, "test/loss": loss},
    }
    return make(**fields | changes)


@pytest.fixture
def plan(make, example, folder, tmp_path):
    """Carry out the example with runs that are planned by their overrides."""
    found = find(example)

    def go(die=(), **options):
        planned = {
            " ".join(cell): {
                "record": json.loads(record_of(make, found, cell).to_json()),
                "die": cell in die,
            }
            for cell in found.cells
        }
        (tmp_path / "plan.json").write_text(json.dumps(planned))
        runner = [sys.executable, "-S", str(RUNNER), str(tmp_path / "plan.json")]
        return carry_out(
            found, folder, runs=tmp_path / "runs", runner=runner, progress=False, **options
        )

    return go


def starts(tmp_path):
    """How often each run was started."""
    return {
        path.parent.name: len(path.read_text().splitlines())
        for path in (tmp_path / "runs").glob("*/journal")
    }


def test_every_variant_runs_at_every_seed(example):
    found = find(example)
    assert found.name == "tiny_claim"
    assert found.cells == [
        ["attention=differential", "seed=0"],
        ["seed=0"],
        ["attention=mha", "model.heads=1", "seed=0"],
        ["attention=differential", "seed=1"],
        ["seed=1"],
        ["attention=mha", "model.heads=1", "seed=1"],
    ]
    ids = {v: [run_id(example, found.claim.overrides(v, s)) for s in (0, 1)] for v in found.ids}
    assert found.ids == ids
    assert len({i for each in ids.values() for i in each}) == 6


def test_names_that_are_no_claim():
    assert names() == sorted(names())
    with pytest.raises(ZooError, match="unknown claim 'nothing_like_it'"):
        find("nothing_like_it")
    with pytest.raises(ZooError, match="recipe 'mqar' states no claim"):
        find("mqar")
    with pytest.raises(ZooError, match=r"nowhere\.yaml does not exist"):
        find("nowhere.yaml")


def test_a_claim_runs_and_is_judged(plan, example, folder, tmp_path):
    with pytest.raises(Incomplete, match="6 of 6 records are missing"):
        conclude(find(example), folder)
    assert not folder.exists()
    result = plan(jobs=2)
    assert (len(result.finished), result.exit_code) == (6, 0)
    verdict = conclude(find(example), folder)
    assert verdict.outcome == verdicts.REPRODUCED
    assert verdict.values["narrow"]["loss"] == [1.125, 1.125]
    first = (folder / verdicts.FILE).read_bytes()
    again = plan()
    assert (len(again.skipped), len(again.finished)) == (6, 0)
    assert set(starts(tmp_path).values()) == {1}
    assert conclude(find(example), folder) == verdict
    assert (folder / verdicts.FILE).read_bytes() == first


def test_a_killed_run_is_the_only_one_that_is_made_again(plan, example, folder, tmp_path):
    victim = ["attention=differential", "seed=1"]
    result = plan(die=[victim], jobs=2)
    assert [cell.overrides for cell in result.failed] == [victim]
    with pytest.raises(Incomplete, match="1 of 6 records"):
        conclude(find(example), folder)
    again = plan(die=[victim])
    assert (len(again.finished), len(again.skipped)) == (1, 5)
    assert starts(tmp_path).pop(run_id(example, victim)) == 2
    assert sorted(starts(tmp_path).values()) == [1, 1, 1, 1, 1, 2]
    assert conclude(find(example), folder).outcome == verdicts.REPRODUCED


def test_the_threads_are_shared_out_as_in_a_sweep(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.sweeps.sweep.cores", lambda: 6)
    plan(jobs=2)
    (path, *_) = (tmp_path / "runs").glob("*/journal")
    assert path.read_text() == "start 3\n"


def test_a_diverged_run_is_an_outcome(make, plan, example, folder):
    plan()
    found = find(example)
    for seed in (0, 1):
        cell = found.claim.overrides("ours", seed)
        write(record_of(make, found, cell, status="nan", metrics={}), folder)
    requirement = conclude(found, folder)
    assert requirement.outcome == verdicts.UNDECIDED  # no mean of the noisy accuracy
    assert requirement.criterion == [[False, False], [False, False]]


def test_a_claim_that_was_changed_after_its_verdict_is_refused(plan, example, folder, tmp_path):
    plan()
    conclude(find(example), folder)
    before = (folder / verdicts.FILE).read_bytes()
    changed = ["ours.loss < 3 * softmax.loss"]
    found = find(str(write_claim(tmp_path, claim__criterion=changed)))
    assert found.ids == find(example).ids  # the same runs, judged by other words
    for call in (conclude, carry_out):
        with pytest.raises(ZooError, match=r"was changed after its verdict, 'reproduced'; remove"):
            call(found, folder)
    assert (folder / verdicts.FILE).read_bytes() == before
    (folder / verdicts.FILE).unlink()
    assert conclude(found, folder).claim.criterion == changed


def test_the_leaderboard_has_a_section_of_claims(make, plan, example, folder, tmp_path):
    own = make(recipe="own")  # one that does not ship, and so is never stale
    write(own, tmp_path / "records")
    ordinary = leaderboard.render([own])
    assert "Claims" not in ordinary
    plan()
    with pytest.warns(RecordWarning, match="tiny_claim has no verdict; 'zoo claims tiny_claim'"):
        text, count = leaderboard.page(tmp_path / "records")
    assert (text, count) == (ordinary, 1)
    conclude(find(example), folder)
    text, count = leaderboard.page(tmp_path / "records")
    assert count == 7
    _, claims, standings = tables(text)
    (row,) = claims
    assert row["mechanism"] == "`differential`"
    assert row["verdict"] == "**reproduced**: the criterion holds on 2 of 2 seeds"
    assert "`narrow` loss 1.1250 ± 0.0000 (2)" in row["figures"]
    assert len(standings) == 1  # the records of the claim stand in no other table
    assert "tiny_claim-mha" not in text
    path, _ = leaderboard.write(tmp_path / "records", tmp_path / "page.md")
    assert leaderboard.verify(path, tmp_path / "records") == ""
    assert leaderboard.page(tmp_path / "records")[0] == path.read_text()


def test_a_page_of_claims_alone(plan, example, folder, tmp_path):
    plan()
    conclude(find(example), folder)
    text, count = leaderboard.page(tmp_path / "records")
    assert count == 6
    assert "## Claims" in text
    assert "## Summary" not in text
    assert "There are no records yet" not in text


def test_the_readers_of_records_meet_no_stranger(plan, example, folder):
    plan()
    conclude(find(example), folder)
    assert len(read_all(folder)) == 6  # warnings are errors
    assert len(read_all(folder.parent, recursive=True)) == 6


def test_the_leaderboard_refuses_a_verdict_that_its_records_do_not_give(
    make, plan, example, folder, tmp_path
):
    plan()
    found = find(example)
    conclude(found, folder)
    metrics = {**read(folder / f"{found.ids['ours'][0]}.json").metrics, "test/loss": 9.0}
    write(record_of(make, found, found.cells[0], metrics=metrics), folder)
    with pytest.raises(ZooError, match="is not what its claim and records give"):
        leaderboard.page(tmp_path / "records")


def test_the_leaderboard_shows_a_claim_that_was_changed(
    plan, example, folder, tmp_path, monkeypatch
):
    plan()
    claim = conclude(find(example), folder).claim
    assert [one.stale for one in published(tmp_path / "records")] == [False]
    ships = tmp_path / "recipes" / "claims"
    ships.mkdir(parents=True)
    monkeypatch.setattr("zoo.runs.config.folder", lambda name: tmp_path / "recipes")
    write_claim(ships)
    assert not is_stale("tiny_claim", claim)
    write_claim(ships, claim__statement="Something else.")
    assert is_stale("tiny_claim", claim)
    text, _ = leaderboard.page(tmp_path / "records")
    assert "stale: the claim was changed after this verdict" in text
    assert "**reproduced**" not in text


def test_records_without_claims_publish_none(make, tmp_path):
    write(make(), tmp_path)
    assert published(tmp_path) == []


def test_a_claim_from_real_runs(example, folder, tmp_path):
    found = find(example)
    for cell in found.cells:
        record = run(found.recipe, cell, records=folder, runs=tmp_path / "runs", quiet=True)
        assert {"claim", "budget", "description"}.isdisjoint(record.config)
    assert sorted(p.stem for p in folder.glob("*.json")) == sorted(chain(*found.ids.values()))
    verdict = conclude(found, folder)
    assert verdict.outcome == verdicts.REPRODUCED  # after three steps all losses are alike
    for variant, losses in verdict.values.items():
        stored = [read(folder / f"{i}.json").metrics["test/loss"] for i in found.ids[variant]]
        assert losses["loss"] == stored
    assert len({tuple(values["loss"]) for values in verdict.values.values()}) == 3


@pytest.mark.slow
def test_a_claim_in_processes(example, folder, tmp_path):
    found = find(example)
    result = carry_out(found, folder, runs=tmp_path / "runs", jobs=2, progress=False)
    assert (len(result.finished), result.exit_code) == (6, 0)
    assert conclude(found, folder).outcome == verdicts.REPRODUCED
    assert (
        not (tmp_path / "runs" / found.ids["ours"][0] / "config.yaml").read_text().count("claim:")
    )
