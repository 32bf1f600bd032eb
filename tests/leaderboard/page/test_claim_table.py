from __future__ import annotations

import dataclasses

import pytest

from zoo.claims.schema import Claim
from zoo.claims.trials import Published
from zoo.claims.verdicts import judge
from zoo.leaderboard.page.claim_table import STALE, section
from zoo.runs.records import write

CLAIM = Claim(
    statement="Ours is <better> | faster.",
    mechanism="differential",
    source="Table 1",
    variants={"ours": ["attention=differential"], "base": []},
    figures={"loss": "test/loss", "size": "parameters", "time": "step_time_cpu"},
    criterion=["ours.loss < base.loss", "ours.loss < 0.5"],
    requires=["base.loss < 1"],
    seeds=2,
)


@pytest.fixture
def verdict(make, tmp_path):
    rest = {"val/accuracy": 0.5, "test/accuracy": 0.5}
    for name, losses in (("ours", (0.1, 0.2)), ("base", (0.4, 0.4))):
        for seed, loss in enumerate(losses):
            write(make(id=f"{name}-{seed}", metrics={**rest, "test/loss": loss}), tmp_path)
    ids = {name: [f"{name}-{seed}" for seed in range(2)] for name in CLAIM.variants}
    return judge("tiny", CLAIM, ids, tmp_path)


def row(text):
    cells = text.splitlines()[-1].strip("|").split(" | ")
    return [cell.strip() for cell in cells]


def test_a_row_has_everything(verdict):
    assert row(section([Published(verdict, False)])) == [
        "`differential`",
        "`tiny`: Ours is &lt;better> \\| faster. (Table 1)".replace(" | ", " \\| "),
        "`ours.loss < base.loss`<br>`ours.loss < 0.5`<br>requires `base.loss < 1`",
        "`ours` loss 0.1500 ± 0.0707 (2), size 18.2k, time 12.3 ms"
        "<br>`base` loss 0.4000 ± 0.0000 (2), size 18.2k, time 12.3 ms",
        "**reproduced**: the criterion holds on 2 of 2 seeds",
        "`zoo claims tiny`",
    ]


def test_a_claim_that_was_changed_shows_no_verdict(verdict):
    text = section([Published(verdict, True)])
    assert row(text)[-2] == STALE
    assert "**reproduced**" not in text
    assert "\n1 stale.\n" in text


def test_the_verdicts_are_counted(verdict, tmp_path):
    needy = dataclasses.replace(CLAIM, needs="gpu")
    unseen = judge("tiny", needy, {"ours": ["a"], "base": ["b"]}, tmp_path / "nothing")
    text = section([Published(verdict, False), Published(unseen, False), Published(verdict, False)])
    assert "\n2 reproduced, 1 needs a GPU.\n" in text
    assert "| — | **needs a GPU**: its runs are out of reach" in text
