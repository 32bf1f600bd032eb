"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, outcome

from zoo.runs.checkpoints import read_checkpoint
from zoo.runs.train import run

# Checkpoints are written at steps 3, 6, 8 (the first best before the last), 9, 12, ...
KILLS = [
    ("step", 2),  # before the first checkpoint
    ("step", 7),  # after a checkpoint between validations
    ("step", 8),  # right after a validation
    ("step", 29),
    ("write", 1),
    ("write", 4),
    ("replace", 3),  # the best is in place, the last one is not
    ("record", 0),  # training and test are over
]


def weights(folder):
    (best,) = Path(folder).glob("checkpoints/best-*.ckpt")
    return best.name, read_checkpoint(best)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted, and its folder."""
    runs = tmp_path_factory.mktemp("whole")
    record = run("mqar", TINY, records=runs / "records", runs=runs, quiet=True)
    return record, runs / record.id


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs, each killed at its moment."""
    cases = [
        {
            "kill": kind,
            "number": number,
            "runs": str(tmp_path_factory.mktemp(f"{kind}{number}")),
            "overrides": TINY,
        }
        for kind, number in KILLS
    ]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "support" / "kills.py"),
            json.dumps(cases),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [signal.SIGKILL] * len(KILLS), done.stderr
    return {kill: Path(case["runs"]) for kill, case in zip(KILLS, cases, strict=True)}


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_a_killed_run_ends_with_the_same_figures_and_weights(kill, killed, whole):
    record, folder = whole
    runs = killed[kill]
    assert not list(runs.glob("records/*.json"))
    resumed = run(
        "mqar", TINY, records=runs / "records", runs=runs, quiet=True, resume_if_possible=True
    )
    assert outcome(resumed) == outcome(record)
    name, expected = weights(folder)
    resumed_name, found = weights(runs / record.id)
    assert resumed_name == name
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert resumed.step_time_cpu > 0
    assert not list(runs.glob("*/checkpoints/.*.tmp"))


def test_the_interrupted_run_has_a_history_to_compare(whole):
    record, _ = whole
    assert [row["step"] for row in record.history] == [8, 16, 24, 30]
    assert record.steps == 30
    assert len({row["train/loss"] for row in record.history}) == 4
