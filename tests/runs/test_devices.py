"""One run on several processes gives what it gives on one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import tiny

from zoo.runs import records
from zoo.runs.train import run


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path):
    # Every example asks for the same number of values, so the mean over both halves of a batch
    # is the mean over the batch.
    alone = run("mqar", tiny(model__dropout=0), records=tmp_path / "one", runs=tmp_path, quiet=True)
    overrides = tiny(model__dropout=0, trainer__devices=2, trainer__strategy="ddp")
    folders = ["--records", str(tmp_path / "two"), "--runs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "run", "mqar", *overrides, *folders, "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    (both,) = records.read_all(tmp_path / "two")
    assert (both.status, both.steps, both.examples) == ("finished", 30, alone.examples)
    assert both.group == alone.group
    assert both.metrics == pytest.approx(alone.metrics, rel=1e-3)
    for ours, theirs in zip(both.history, alone.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
