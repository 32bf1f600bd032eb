"""Every outcome of the rule, on records made by hand."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import yaml

from zoo.claims import verdicts
from zoo.claims.schema import Claim
from zoo.claims.verdicts import (
    NEEDS_GPU,
    NOT_REPRODUCED,
    REPRODUCED,
    UNDECIDED,
    Incomplete,
    judge,
    read,
    stated,
)
from zoo.errors import ZooError
from zoo.report.files import replace_text
from zoo.runs.records import write

CLAIM = Claim(
    statement="Ours is better than the others.",
    mechanism="differential",
    source="Table 1",
    variants={"ours": ["attention=differential"], "base": [], "other": ["attention=linear"]},
    figures={"loss": "test/loss", "size": "parameters"},
    criterion=["ours.loss < base.loss", "ours.loss < 0.5"],
    seeds=3,
)
IDS = {variant: [f"{variant}-{seed}" for seed in range(3)] for variant in CLAIM.variants}
NAN, FAILED = "nan", "failed"


@pytest.fixture
def outcome(make, tmp_path):
    """Judge losses by variant; a word instead of a loss is the status of a run without one."""

    def go(ours=(0.1,) * 3, base=(0.4,) * 3, other=(0.4,) * 3, sizes=10, **changes):
        claim = dataclasses.replace(CLAIM, **changes)
        for variant, losses in (("ours", ours), ("base", base), ("other", other)):
            for seed, loss in enumerate(losses):
                fields = {"id": f"{variant}-{seed}", "seed": seed, "parameters": sizes}
                if isinstance(loss, str):
                    fields["status"] = loss
                else:
                    rest = {"val/accuracy": 0.5, "test/accuracy": 0.5}
                    fields["metrics"] = {**rest, "test/loss": loss}
                write(make(**fields), tmp_path)
        return judge("tiny", claim, IDS, tmp_path)

    return go


@pytest.mark.parametrize(
    ("runs", "expected", "why"),
    [
        ({}, REPRODUCED, "the criterion holds on 3 of 3 seeds"),
        # The second comparison alone fails on one seed, then on all.
        ({"ours": (0.1, 0.1, 0.6), "base": (0.7,) * 3}, UNDECIDED, "holds on 2 of 3 seeds"),
        ({"ours": (0.6,) * 3, "base": (0.7,) * 3}, NOT_REPRODUCED, "holds on 0 of 3 seeds"),
        ({"ours": (0.45,) * 3}, NOT_REPRODUCED, "holds on 0 of 3 seeds"),
        # On each seed for itself: the best of ours is no match for the worst of the others.
        ({"ours": (0.1, 0.2, 0.3), "base": (0.2, 0.3, 0.4)}, REPRODUCED, "3 of 3 seeds"),
        ({"ours": (0.1, 0.2, 0.3), "base": (0.2, 0.3, 0.1)}, UNDECIDED, "2 of 3 seeds"),
        # A run of the mechanism without a figure counts against it.
        ({"ours": (0.1, 0.1, NAN)}, UNDECIDED, "holds on 2 of 3 seeds"),
        ({"ours": (FAILED, 0.1, 0.1)}, UNDECIDED, "holds on 2 of 3 seeds"),
        ({"ours": (NAN, FAILED, NAN)}, NOT_REPRODUCED, "holds on 0 of 3 seeds"),
        ({"ours": (0.6, NAN, math.inf)}, NOT_REPRODUCED, "holds on 0 of 3 seeds"),
        ({"ours": (math.nan,) * 3}, NOT_REPRODUCED, "holds on 0 of 3 seeds"),
        ({"ours": (NAN,) * 3, "base": (NAN,) * 3}, NOT_REPRODUCED, "holds on 0 of 3 seeds"),
        # One of another variant leaves the seed open, unless it is lost anyway.
        ({"base": (0.4, 0.4, NAN)}, UNDECIDED, "2 of 3 seeds and cannot be evaluated on 1"),
        ({"base": (NAN, FAILED, math.inf)}, UNDECIDED, "0 of 3 seeds and cannot be evaluated on 3"),
        ({"ours": (0.45,) * 3, "base": (0.4, 0.4, NAN)}, UNDECIDED, "cannot be evaluated on 1"),
        ({"ours": (0.6,) * 3, "base": (0.4, 0.4, NAN)}, NOT_REPRODUCED, "0 of 3 seeds"),
        # A variant that the criterion does not name has no say.
        ({"other": (NAN, FAILED, math.inf)}, REPRODUCED, "3 of 3 seeds"),
    ],
)
def test_the_rule(outcome, runs, expected, why):
    verdict = outcome(**runs)
    assert (verdict.outcome, verdict.why.endswith(why)) == (expected, True)


@pytest.mark.parametrize(
    ("requires", "runs", "expected"),
    [
        ("ours.loss < 0.2", {}, REPRODUCED),
        # Of the means: 0.4 on one seed is no matter.
        ("ours.loss < 0.21", {"ours": (0.1, 0.1, 0.4), "base": (0.45,) * 3}, REPRODUCED),
        ("ours.loss < 0.19", {"ours": (0.1, 0.1, 0.4), "base": (0.45,) * 3}, UNDECIDED),
        # Before the criterion, whichever way that goes.
        ("base.loss < 0.2", {}, UNDECIDED),
        ("base.loss < 0.2", {"ours": (0.9,) * 3}, UNDECIDED),
        # A mean with a run missing does not exist.
        ("ours.loss < 0.2", {"ours": (NAN,) * 3}, UNDECIDED),
        ("other.loss < 0.5", {"other": (0.1, NAN, 0.1)}, UNDECIDED),
        ("1 / (ours.size - 10) > 0", {}, UNDECIDED),
    ],
)
def test_what_is_required(outcome, requires, runs, expected):
    verdict = outcome(requires=["base.size == 10", requires], **runs)
    assert verdict.outcome == expected
    assert verdict.requires == [True, expected != UNDECIDED]
    if expected == UNDECIDED:
        assert verdict.why == f"required of the means over seeds, and not so: {requires}"


def test_what_holds_where_is_kept(outcome):
    verdict = outcome(ours=(0.1, 0.45, NAN), base=(0.4, NAN, NAN))
    assert verdict.criterion == [[True, None, False], [True, True, False]]
    assert outcome(criterion=["1 / (ours.size - 10) > 0"]).criterion == [[None] * 3]


def test_the_figures_are_mean_and_deviation_over_the_runs_that_have_one(outcome):
    verdict = outcome(ours=(0.1, 0.2, 0.4), base=(0.1, NAN, 0.4), other=(0.3, NAN, NAN))
    mean, std, n = verdict.spread("ours", "loss")
    assert (mean, n) == (pytest.approx(0.7 / 3), 3)
    assert std == pytest.approx(statistics.stdev([0.1, 0.2, 0.4]))  # ddof = 1
    assert verdict.spread("base", "loss") == (0.25, pytest.approx(0.3 / math.sqrt(2)), 2)
    assert verdict.spread("other", "loss") == (0.3, None, 1)
    assert verdict.spread("ours", "size").mean == 10
    assert outcome(other=(NAN,) * 3).spread("other", "loss") is None
    assert outcome(sizes=None).spread("ours", "size") is None
    assert verdict.statuses["other"] == ["finished", "nan", "nan"]


def test_records_that_are_missing(outcome, make, tmp_path):
    with pytest.raises(Incomplete, match="9 of 9 records are missing"):
        judge("tiny", CLAIM, IDS, tmp_path)
    outcome()
    (tmp_path / "base-1.json").unlink()
    with pytest.raises(Incomplete, match=r"'tiny' is incomplete: 1 of 9 .* first base-1"):
        judge("tiny", CLAIM, IDS, tmp_path)
    with pytest.raises(Incomplete):
        judge("tiny", dataclasses.replace(CLAIM, needs="gpu"), IDS, tmp_path)
    (tmp_path / "base-1.json").write_text("{")
    with pytest.raises(ZooError, match=r"base-1\.json"):
        judge("tiny", CLAIM, IDS, tmp_path)


def test_a_claim_that_needs_a_gpu(outcome, tmp_path):
    needy = dataclasses.replace(CLAIM, needs="gpu", requires=["ours.loss < 1"])
    verdict = judge("tiny", needy, IDS, tmp_path)
    assert (verdict.outcome, verdict.ids, verdict.requires) == (NEEDS_GPU, {}, [None])
    verdicts.write(verdict, tmp_path)
    assert read(tmp_path) == verdict
    assert outcome(needs="gpu").outcome == REPRODUCED  # somebody with one has made the runs


def test_the_file_depends_on_the_records_and_the_claim_alone(outcome, tmp_path):
    verdict = outcome(ours=(0.1, NAN, 1e-7), requires=["ours.size > 0"])
    path = verdicts.write(verdict, tmp_path)
    first = path.read_bytes()
    verdicts.write(outcome(ours=(0.1, NAN, 1e-7), requires=["ours.size > 0"]), tmp_path)
    assert path.read_bytes() == first
    assert read(tmp_path) == verdict
    content = yaml.safe_load(first)
    assert list(content) == sorted(content)
    assert content["verdict"] == UNDECIDED
    assert content["claim"]["hash"] == verdict.claim.hash
    assert content["criterion"][0] == {"holds": [True, False, True], "text": CLAIM.criterion[0]}
    ours = content["variants"]["ours"]
    assert ours["records"] == IDS["ours"]
    assert ours["status"] == ["finished", "nan", "finished"]
    assert ours["figures"]["loss"]["values"] == [0.1, None, 1e-7]
    assert ours["figures"]["loss"]["mean"] == pytest.approx(0.05, abs=1e-6)
    assert content["machine"]["devices"] == ["Some CPU (cpu, threads 1)"]
    assert content["machine"]["versions"] == ["python 3.11.0", "torch 2.11.0"]
    assert content["machine"]["commits"] == ["0123456789abcdef0123456789abcdef01234567"]


def test_the_order_of_the_variants_survives_the_file(outcome, tmp_path):
    backwards = dict(reversed(CLAIM.variants.items()))
    changed = {"variants": backwards, "criterion": ["other.loss < 1"]}
    verdicts.write(outcome(**changed), tmp_path)
    assert read(tmp_path).claim.subject == "other"


def test_a_verdict_that_is_not_what_its_records_give_is_refused(outcome, make, tmp_path):
    path = verdicts.write(outcome(), tmp_path)
    text = path.read_text()
    for before, after in (
        ("verdict: reproduced", "verdict: not reproduced"),
        ("ours.loss < 0.5", "ours.loss < 0.9"),
        ("mean: 0.1", "mean: 0.2"),
        ("[true, true, true]", "[true, true, false]"),
    ):
        assert before in text
        replace_text(path, text.replace(before, after, 1))
        with pytest.raises(ZooError, match="is not what its claim and records give"):
            read(tmp_path)
    replace_text(path, text)
    read(tmp_path)
    outcome(ours=(0.1, 0.1, 0.2))
    with pytest.raises(ZooError, match="'zoo claims tiny --verdict-only' makes it again"):
        read(tmp_path)


def test_a_file_that_is_no_verdict(tmp_path):
    assert stated(tmp_path) is None
    with pytest.raises(ZooError, match=r"verdict\.yaml does not exist"):
        read(tmp_path)
    for text in ("", "- 1", "claim: {}", "claim: 3", "a: [1", "\x00", "claim: {name: a, hash: b}"):
        (tmp_path / verdicts.FILE).write_text(text)
        with pytest.raises(ZooError, match=r"verdict\.yaml") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
